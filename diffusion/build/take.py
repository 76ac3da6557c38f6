"""From a group of a configuration to the object of its settings."""

from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from diffusion.config.declared import arguments

Made = TypeVar("Made")


def take(group: DictConfig, kind: type[Made], **others: Any) -> Made:
    """The object of the settings that a class takes out of a group; the others are another class's.

    Args:
        others: arguments beside these.
    """
    names = arguments(f"{kind.__module__}.{kind.__qualname__}") or {}
    plain = OmegaConf.to_container(group)
    return kind(**{name: plain[name] for name in names if name in plain and name not in others}, **others)


def left(group: DictConfig, *kinds: type) -> DictConfig:
    """The group without the settings that these classes take."""
    taken = {name for kind in kinds for name in arguments(f"{kind.__module__}.{kind.__qualname__}") or {}}
    return OmegaConf.create({k: v for k, v in group.items() if k not in taken})
