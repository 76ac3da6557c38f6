"""How images are made from a model: the same code during training, at its end, and in the commands."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.images import to_uint8
from diffusion.process.grids import steps_of
from diffusion.process.schedule import Denoiser, Prediction
from diffusion.samplers.base import Sampler, Visit
from diffusion.samplers.generate import default_labels, generate, walk
from diffusion.samplers.wrapper import Wrapper


class Counted:
    """A denoiser that counts the images it has seen, from which nfe follows, guidance included.

    Args:
        denoiser: what is called.
        attend: called before it, each time; may raise to end the sampling.
    """

    def __init__(self, denoiser: Denoiser, attend: Callable[[], None] = lambda: None) -> None:
        self.denoiser, self.attend, self.rows = denoiser, attend, 0

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        self.attend()
        self.rows += len(x_t)
        return self.denoiser(x_t, t, labels)


@dataclass
class Sampling:
    """All that decides the images of a model but their numbers.

    denoise: what the sampler calls, guided and clipped. counted: the network inside it. num_classes: 0 for an
    unconditional model. labels: chosen ones, in turn; none for k mod classes. wrappers: of denoiser and sampler. about:
    sampler's name, eta and the like, for the record.
    """

    denoise: Denoiser
    counted: Counted
    sampler: Sampler
    times: Sequence[float]
    image_shape: tuple[int, int, int]
    num_classes: int
    seed: int
    device: torch.device
    batch_size: int = 256
    labels: Sequence[int] = ()
    wrappers: Sequence[Wrapper] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def of_batch(self) -> bool:
        """Whether an image depends on the others of its batch."""
        return self.sampler.of_batch or any(wrapper.of_batch for wrapper in self.wrappers)

    @property
    def num_steps(self) -> int:
        """Levels that a walk visits, as the setting counts them: of several steps at each, `about` says the visits.
        Former versions recorded all steps, those that stay included."""
        return steps_of(self.times)

    def labels_of(self, numbers: Tensor) -> Tensor | None:
        return default_labels(numbers, self.num_classes, self.labels)

    def batches(self, numbers: Tensor) -> Iterator[Tensor]:
        """uint8 (b, C, H, W) for these image numbers, on the CPU, batch by batch."""
        return generate(
            self.denoise, self.sampler, self.times, numbers, self.image_shape, self.labels_of(numbers), self.seed,
            self.batch_size, self.device, self.wrappers,
        )  # fmt: skip

    def images(self, numbers: Tensor) -> Tensor:
        """All of them at once: uint8 (N, C, H, W)."""
        return torch.cat(list(self.batches(numbers)))

    def walk(self, numbers: Tensor) -> Iterator[Visit]:
        """Every step on the way of these images, as one batch."""
        return walk(
            self.denoise, self.sampler, self.times, numbers, self.image_shape, self.labels_of(numbers), self.seed,
            self.device, self.wrappers,
        )  # fmt: skip

    def film(self, numbers: Tensor, stages: int) -> tuple[Tensor, Tensor]:
        """How these images come about: x_t and the estimate of x0, uint8 (B, stages, C, H, W), evenly spread over the
        steps, the last stage the image itself. The estimate is the latest one; x_t itself while there is none."""
        steps = len(self.times) - 1
        wanted = [round(k * (steps - 1) / max(stages - 1, 1)) for k in range(stages)]
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        latest: Tensor | None = None
        for step, visit in enumerate(self.walk(numbers)):
            latest = latest if visit.prediction is None else visit.prediction.x0
            if step in wanted:
                kept[step] = to_uint8(visit.x).cpu(), to_uint8(visit.x if latest is None else latest).cpu()
        noisy, estimates = zip(*(kept[step] for step in wanted), strict=True)
        return torch.stack(noisy, dim=1), torch.stack(estimates, dim=1)

    def record(self) -> dict[str, Any]:
        """What results.jsonl says of the sampling, but for the work it took."""
        about = {**self.about, "num_steps": self.num_steps, "seed": self.seed, "batch_size": self.batch_size}
        return about | ({"wrappers": [wrapper.identity() for wrapper in self.wrappers]} if self.wrappers else {})

    def identity(self) -> dict[str, Any]:
        """What, beside the model, decides image k, as JSON. The batch size changes rounding at most and is not in it,
        unless the sampler looks at the whole batch."""
        chosen = {"times": [float(t) for t in self.times], "labels": list(self.labels), "shape": list(self.image_shape)}
        known = self.record() | chosen
        if not self.of_batch:
            del known["batch_size"]
        return known


def steps_in_words(record: Mapping[str, Any]) -> str:
    """ "50 steps", or "60 steps of 2 visits", of a record."""
    visits = record.get("visits") or 1
    return f"{record['num_steps']} steps" + (f" of {visits} visits" if visits > 1 else "")


def differences(old: Any, new: dict[str, Any]) -> list[str]:
    """'key: was a, is b' for each setting in which two samplings differ; [] if they make the same images.

    Args:
        old: {"model": ..., "sampling": ...} as it was recorded, also by a former version, or what was found instead.
        new: the same of this sampling: what identifies the model, and `Sampling.identity`.
    """
    if not (isinstance(old, dict) and isinstance(old.get("model"), dict) and isinstance(old.get("sampling"), dict)):
        return ["its record, about.json, cannot be read"]
    found = _model_differences(old["model"], new["model"])
    was, now = old["sampling"], new["sampling"]
    keys = [key for key in dict.fromkeys([*was, *now]) if was.get(key) != now.get(key)]
    if "batch_size" not in now:
        keys = [key for key in keys if key != "batch_size"]
    if "times" in was and "times" not in keys:  # the number of steps that stay was a part of it in former versions
        keys = [key for key in keys if key != "num_steps"]
    elif len(keys) > 1:  # they follow from another setting
        keys = [key for key in keys if key != "times"]
    return found + [f"{_setting(key)}: was {_short(was.get(key))}, is {_short(now.get(key))}" for key in keys]


def _model_differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Of the checkpoint: the step is shown, the sha256 decides where it is known."""
    found = []
    if was.get("weights") != now.get("weights"):
        found.append(f"ema: was {_average(was.get('weights'))}, is {_average(now.get('weights'))}")
    decides = "checkpoint_sha256" if "checkpoint_sha256" in now else "step"
    if was.get(decides) != now.get(decides):
        shown = [_of_model(model) for model in (was, now)]
        found.append(f"checkpoint: was {shown[0]}, is {shown[1]}")
    return found


def _average(weights: Any) -> str:
    """The value of the setting `ema` that takes these weights."""
    return {"ema": "true", "raw": "false"}.get(str(weights), str(weights).removeprefix("ema "))


def _of_model(model: dict[str, Any]) -> str:
    step = f"step {model['step']}" if "step" in model else "another"
    digest = str(model.get("checkpoint_sha256", ""))[:12]
    return f"{step} (sha256 {digest})" if digest else step


def _setting(key: str) -> str:
    """The setting that a key of the record stands for, as the user writes it."""
    whole = {"guidance_scale": "guidance.scale", "precision": "trainer.precision", "shape": "size of the images"}
    whole |= {"times": "times of the steps"}
    plain = ("seed", "sampler", "labels", "batch_size", "num_images", "wrappers")
    return whole.get(key) or (key if key in plain else f"sampler.{key}")


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True).strip('"')
    return text if len(text) < 100 else f"{text[:100]}..."
