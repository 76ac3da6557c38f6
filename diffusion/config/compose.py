"""From the words of a command line to a composed configuration, or to one clear message; without torch or lightning.

Hydra composes. Before it does, each word is held against the configuration without the user's settings: an unknown
group, option or key, or a value that its setting cannot have, is answered with what is allowed and the nearest name.
What several settings make impossible together is found by check.py, what has no effect by effect.py.
"""

import functools
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from diffusion.config.composer import compose, groups, searched
from diffusion.config.values import check_word, fit_all, kind_at
from diffusion.config.words import home_path, nearest, parse, plain, quote_path, shown
from diffusion.errors import Refusal

# ---- words ----


def check_group(override: Override, known: dict[str, list[str]], sweep: bool = False) -> str:
    """Refuse an option that its group does not have, and several without a sweep; the word with which the reference is
    composed."""
    group = override.key_or_group
    if override.is_sweep_override():
        options = [str(plain(v)) for v in override.sweep_iterator()]
    else:
        options = ["null" if override.value() is None else str(plain(override.value()))]
    if len(options) > 1 and not sweep:
        raise Refusal(several(override))
    for option in options:
        if option not in known[group]:
            raise Refusal(
                f"Unknown option: {group}={shown(option)}.{nearest(option, known[group])} "
                f"Options of {group}: {', '.join(known[group])}."
            )
    plus = "+" if group == "experiment" else ""
    return f"{plus}{group}={options[0]}"


def several(override: Override, reference: DictConfig | None = None, command: str = "") -> str:
    """That several values are given where one is expected, and how a list or a sweep is written."""
    key, _, values = override.input_line.lstrip("+").partition("=")
    if reference is not None and kind_at(key, reference, command).of is list:
        return f"{key}={values}: a list is written in brackets: {key}=[{values}]."
    return f"{key}={values}: several values make a sweep, which needs the flag -m. Without it give one value."


def check_words(config_name: str, words: list[str], sweep: bool = False) -> list[str]:
    """Refuse what cannot be composed, by name; returns the words as Hydra shall see them.

    In a sweep a comma separates values, so paths are left as they are written.
    """
    known, chosen, settings = groups(), [], []
    words = [home_path(w) if sweep else quote_path(w) for w in words]
    for i, word in enumerate(list(words)):
        override = parse(word)
        name = override.key_or_group
        if name == "hydra/launcher":
            chosen.append(word)
        elif name.startswith("hydra.launcher."):
            settings.append((i, override))
        if name == "hydra" or name.startswith(("hydra.", "hydra/")):
            continue
        if name == "experiment":
            words[i] = "+" + word.lstrip("+")
            chosen.append(check_group(override, known, sweep))
            if override.is_sweep_override():  # of several names: there is no runs/NAME for what the sweep itself leaves
                words.append("hydra.sweep.dir=runs")
        elif name in known and not override.is_delete() and "_" != str(plain(override.value()))[:1]:
            chosen.append(check_group(override, known, sweep))
        else:
            settings.append((i, override))
    reference = composed_of_options(config_name, tuple(chosen))
    for i, override in settings:
        if override.key_or_group in {"+" + k for k in known}:
            continue
        if override.is_sweep_override() and not sweep:
            raise Refusal(several(override, reference, config_name))
        words[i] = check_word(override, reference, config_name) or words[i]
    return words


def composed_of_options(config_name: str, chosen: tuple[str, ...]) -> DictConfig:
    """The configuration of these options of groups, without the user's settings, and with Hydra's own; to be read."""
    return _composed_of_options(config_name, chosen, searched())


@functools.lru_cache(maxsize=256)
def _composed_of_options(config_name: str, chosen: tuple[str, ...], _: tuple[str, ...]) -> DictConfig:
    try:
        return compose(config_name, chosen, hydra=True)
    except HydraException as e:
        group = next((w.partition("=")[0] for w in chosen if w.partition("=")[0] in str(e)), "")
        raise Refusal(f"{group or 'The configuration'}: {str(e).splitlines()[0]}") from e


def composed(config_name: str, words: list[str]) -> DictConfig:
    """What a command is given for these words, resolved, each value in the form of its kind; refused as there."""
    words = check_words(config_name, words)
    cfg = compose(config_name, words)
    OmegaConf.resolve(cfg)
    fit_all(cfg, config_name, Typed(config_name, tuple(words)))
    return cfg


# ---- what the user has typed, as against the defaults ----


@dataclass(frozen=True)
class Typed:
    """The words of a command line, checked: what the user has asked for, as against what conf/ says.

    Args:
        command: the name of its configuration in conf/. words: overrides, as Hydra has them.
    """

    command: str = ""
    words: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> dict[str, str]:
        """What gives a setting a value, as `key=value`, by the key; of a group of keys each of them."""
        found = {}
        for key, override in self._overrides.items():
            if key not in groups() and not override.is_delete():
                value = None if override.is_sweep_override() else plain(override.value())
                inner = flattened(key, value) if isinstance(value, dict) else {}
                word = f"{key}={value}" if isinstance(value, str) else override.input_line.lstrip("+")
                found |= {k: f"{k}={shown(v)}" for k, v in inner.items()} or {key: word}
        return found

    @cached_property
    def options(self) -> dict[str, str]:
        """What chooses an option of a group, by the group."""
        return {k: str(plain(o.value())) for k, o in self._overrides.items() if k in groups() and not o.is_delete()}

    @property
    def all(self) -> dict[str, str]:
        """`settings`, and `options` as `group=option`."""
        return self.settings | {group: f"{group}={option}" for group, option in self.options.items()}

    @cached_property
    def defaults(self) -> DictConfig:
        """The configuration of the chosen options without the settings, resolved as far as it can be."""
        return self._composed([w for w in self.words if w.lstrip("+").partition("=")[0] in groups()])

    @cached_property
    def default_options(self) -> dict[str, str]:
        """The option of each group that would be chosen without the words that choose one."""
        plain_words = [w for w in self.words if w.lstrip("+").startswith("experiment=")]
        return dict(self._composed(plain_words).hydra.runtime.choices)

    @cached_property
    def _overrides(self) -> dict[str, Override]:
        found = {}
        for word in self.words:
            override = parse(word)
            if not override.key_or_group.startswith("hydra"):
                found[override.key_or_group] = override
        return found

    def _composed(self, chosen: list[str]) -> DictConfig:
        return composed_of_options(self.command, tuple(chosen))


def flattened(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} below `key` -> {"key.a.b": 1}."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in flattened(f"{key}.{name}", inner).items()}


def sweep_folder(run_dir: str, words: list[str]) -> str:
    """The run folder of one job of a sweep: below the common one, named by its overrides, the same on every start."""
    own = sorted(w.lstrip("+") for w in words if not w.lstrip("+").startswith(("run_dir=", "experiment=")))
    slug = re.sub(r"[^\w.=,+-]+", "-", ",".join(own)) or "default"
    if len(slug.encode()) > 200:  # file systems take 255 bytes
        slug = f"{slug.encode()[:150].decode(errors='ignore')}-{hashlib.sha256(slug.encode()).hexdigest()[:12]}"
    return str(Path(run_dir) / slug)
