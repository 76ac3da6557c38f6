"""The recorded configuration of a run, which can be read and compared; nothing can be built from it directly.

A checkpoint or a run folder may come from an untrusted source. So its configuration is plain data, of a type that Hydra
and OmegaConf do not accept: `instantiate`, `OmegaConf.create` and `OmegaConf.merge` raise an error. Text such as
`${oc.env:HOME}` is not resolved. Only `build/door.py` builds objects from such settings.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion.metrics.published import TIMESTEPS
from diffusion.runs.migration import migrated

MOST_VALUES, DEEPEST, LONGEST = 10_000, 20, 20_000  # limits: values, nested groups, characters of a text
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # could move the cursor or forge lines on a terminal


def _integer(low: int) -> Any:
    return lambda v: type(v) is int and v >= low, f"an integer, at least {low}"


TEXT = (lambda v: isinstance(v, str), "text")
NUMBER = (lambda v: type(v) in (int, float) and math.isfinite(v), "a finite number")
COUNT, POSITIVE = _integer(0), _integer(1)
DIGEST = (lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None, "a sha256")
KINDS = {  # types of the values that this program reads; null is always allowed
    "name": TEXT, "run_dir": TEXT, "seed": COUNT,
    "data._target_": TEXT, "data.name": TEXT, "data.root": TEXT, "data.split": TEXT, "data.digest": DIGEST,
    "data.image_size": POSITIVE, "data.channels": POSITIVE, "data.num_classes": COUNT, "data.batch_size": POSITIVE,
    "data.lanes": POSITIVE, "data.toy": TEXT, "data.num_points": POSITIVE, "data.on_bad_sample": TEXT,
    "data.max_bad_share": NUMBER,
    "model._target_": TEXT, "model.num_classes": COUNT, "schedule._target_": TEXT, "schedule.num_timesteps": POSITIVE,
    "objective._target_": TEXT, "objective.prediction": TEXT, "objective.variance": TEXT,
    "objective.label_dropout": NUMBER,
    "sampler.variance": TEXT, "extractor.name": TEXT, "ema.decay": NUMBER, "trainer.max_steps": POSITIVE,
    "ema.warmup": (lambda v: isinstance(v, bool), "true or false"),
}  # fmt: skip


class Recorded(Mapping[str, Any]):
    """A read-only group of settings. Values are None, bool, int, float, str, lists of these, and further groups.

    Args:
        content: content of the file, of any type.
        where: name of the file for messages, like "runs/a/config.yaml".

    Raises:
        ValueError: content is not a group of plain values, is too large or too deep, or a value that this program reads
            has the wrong type (KINDS).
    """

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{where} holds {type(content).__name__}, expected a mapping of settings.")
        self._values = _Reader(where).group(migrated(content))
        published = self.at("paper")
        kinds = KINDS | {f"paper.{key}": NUMBER for key in published or ()} if isinstance(published, Mapping) else KINDS
        for key, (fits, kind) in kinds.items():
            value = self.at(key)
            if value is not None and not fits(value):
                raise ValueError(f"{where}: {key}={_shown(value)}, expected {kind}.")

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Recorded({self._values!r})"

    def at(self, key: str, default: Any = None) -> Any:
        """The value of a key like 'data.root'; `default` if the key or one of its groups is missing."""
        return at(self, key, default)

    def plain(self) -> dict[str, Any]:
        """The settings as nested dictionaries, for writing."""
        return {key: value.plain() if isinstance(value, Recorded) else value for key, value in self._values.items()}

    def replaced(self, group: str, **values: Any) -> "Recorded":
        """A copy in which some settings of a group have other values."""
        return _group({**self._values, group: _group({**self.group(group)._values, **values})})

    def group(self, key: str) -> "Recorded":
        """The group of this name; an empty group if it is missing or not a group."""
        found = self.at(key)
        return found if isinstance(found, Recorded) else _group({})


def at(record: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """record["a"]["b"] for the key "a.b"; `default` if any part is missing."""
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


@dataclass(frozen=True)
class Facts:
    """The values of a record that code outside `build/` and `page/` may read.

    Args:
        name, data_name: names of the run and of its data set; None if they are not recorded.
        split: the split of the training data.
        points: whether the data are points drawn from a mixture, not read from files.
        label_dropout: share of images trained without their label.
        variances: objective.variance and sampler.variance, in this order, without those that are None.
        paper: published scores to compare with, by metric.
        described: the result of `described`.
    """

    name: str | None
    data_name: str | None
    split: str
    points: bool
    label_dropout: float
    variances: tuple[str, ...]
    paper: Mapping[str, float | None]
    described: Mapping[str, Any]

    @classmethod
    def of(cls, record: Recorded) -> "Facts":
        variances = (record.at(f"{group}.variance") for group in ("objective", "sampler"))
        return cls(
            name=record.at("name"),
            data_name=record.at("data.name"),
            split=record.at("data.split") or "train",
            points=str(record.at("data._target_")).endswith(".MixtureDataModule"),
            label_dropout=float(record.at("objective.label_dropout") or 0.0),
            variances=tuple(str(variance) for variance in variances if variance is not None),
            paper={key: record.at(f"paper.{key}") for key in record.group("paper")},
            described=described(record),
        )


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """A description of the trained model, with the keys of results.jsonl.

    The keys are objective, prediction, learned_variance, schedule, num_classes and image_size.
    """
    last = lambda key: str(at(record, key) or "").rpartition(".")[2]  # noqa: E731
    levels = at(record, "schedule.num_timesteps")
    of_levels = "" if levels in (None, TIMESTEPS) else f" of {levels:,} levels"
    known = {
        "objective": last("objective._target_").lower() or None,
        "prediction": at(record, "objective.prediction"),
        "learned_variance": at(record, "objective.variance") == "learned",
        "schedule": last("schedule._target_") + of_levels or None,
        "num_classes": at(record, "model.num_classes"),
        "image_size": at(record, "data.image_size"),
    }
    return {k: v for k, v in known.items() if v is not None}


def _group(values: dict[str, Any]) -> Recorded:
    made = object.__new__(Recorded)
    made._values = values
    return made


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Copies plain values, up to a limit: YAML and pickle can refer to one list a billion times."""

    def __init__(self, where: str) -> None:
        self.where, self.left = where, MOST_VALUES

    def group(self, content: dict, depth: int = 0) -> dict[str, Any]:
        self._count(len(content), depth)
        if not all(isinstance(key, str) for key in content):
            raise ValueError(f"{self.where} is not a configuration: it has a key that is not text.")
        return {_clean(key): self.value(value, depth + 1) for key, value in content.items()}

    def value(self, value: Any, depth: int) -> Any:
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            if abs(value) >= 1 << 64:
                raise ValueError(f"{self.where} is not a configuration: it has an integer of more than 64 bits.")
            return value
        if isinstance(value, str):
            if len(value) > LONGEST:
                raise ValueError(
                    f"{self.where} is not a configuration: it has a text of {len(value):,} characters, more than "
                    f"{LONGEST:,}."
                )
            return _clean(value)
        if isinstance(value, dict):
            return _group(self.group(value, depth))
        if isinstance(value, list | tuple):
            self._count(len(value), depth)
            return [self.value(item, depth + 1) for item in value]
        raise ValueError(f"{self.where} is not a configuration: it has a value of type {type(value).__name__}.")

    def _count(self, number: int, depth: int) -> None:
        self.left -= number
        if self.left < 0 or depth > DEEPEST:
            raise ValueError(
                f"{self.where} is not a configuration: it has more than {MOST_VALUES:,} values or more than {DEEPEST} "
                "nested levels."
            )


def _clean(text: str) -> str:
    return CONTROL.sub("\ufffd", text)
