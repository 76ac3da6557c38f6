"""What a checkpoint may have built: classes and functions of a known kind, of this package or of a module that the
user has named.

    component("mine.Net", "model", trust=["mine"])      the class, ready to be called

A checkpoint is a file that may come from anybody. A name in it is imported only if it is one of those that our own
conf/ gives to that group, or stands in a module that the user trusts; and it is called only if it is of the kind that
the group takes. Importing a module runs its code, so no other module is imported.
"""

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from diffusion.config.composer import option, our_options
from diffusion.data.module import ImageShardsDataModule
from diffusion.errors import Refusal
from diffusion.process.schedule import Schedule
from diffusion.runs.recorded import Recorded

KINDS: dict[str, tuple[type, str]] = {  # group -> what is built must be one, and its name in a message
    "model": (nn.Module, "a network (a subclass of torch.nn.Module)"),
    "schedule": (Schedule, "a schedule (a subclass of Schedule, or a function that is annotated to return one)"),
    "data": (ImageShardsDataModule, "a data module (a subclass of ImageShardsDataModule)"),
}


@functools.cache
def targets(group: str) -> tuple[str, ...]:
    """Return the classes and functions of this package that conf/ names in a group: what any checkpoint may ask for."""
    found = (option(group, name).get("_target_") for name in our_options(group))
    return tuple(sorted({str(target) for target in found if str(target).startswith("diffusion.")}))


def foreign(config: Recorded) -> list[str]:
    """Return the modules outside this package that a model of this configuration is built from, in order: what
    `trust` must name for it to be loaded."""
    found: dict[str, None] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Recorded):
            target = value.at("_target_")
            if isinstance(target, str) and not target.startswith("diffusion."):
                found[target.rpartition(".")[0]] = None
            value = list(value.values())
        for inner in value if isinstance(value, list) else ():
            visit(inner)

    for group in KINDS:
        visit(config.group(group))
    return list(found)


def component(target: Any, group: str, trust: Sequence[str], where: str) -> Callable[..., Any]:
    """Return the class or function that a checkpoint names for a group.

    Args:
        target: package.module.name. trust: modules that the user has named. where: names the file, for messages.

    Raises:
        Refusal: it may not be built.
    """
    if target in targets(group):
        return _imported(target)
    found = _trusted(target, f"{group}._target_", trust, where, targets(group))
    kind, words = KINDS[group]
    if not _is_of(found, kind):
        raise Refusal(f"{where} asks for {group}._target_={target}, which is not {words}. It is not built.")
    return found


def nested(value: Any, key: str, wanted: Any, trust: Sequence[str], where: str) -> Any:
    """Return a value of a setting of the user's own class: plain values as they are, groups with a `_target_` built.

    Args:
        key: of the setting, for messages. wanted: the annotation of the argument that takes it, a class if it has one.

    Raises:
        Refusal: a group names what may not be built, or what is not of the argument's class.
    """
    if isinstance(value, list):
        return [nested(inner, key, Any, trust, where) for inner in value]
    if not isinstance(value, Recorded):
        return value
    values = {k: v for k, v in value.items() if not k.startswith("_")}
    if (target := value.at("_target_")) is None:
        return {k: nested(v, f"{key}.{k}", Any, trust, where) for k, v in values.items()}
    found = _trusted(target, f"{key}._target_", trust, where, ())
    classes = [kind for kind in typing.get_args(wanted) or (wanted,) if isinstance(kind, type)]
    kinds = [kind for kind in classes if kind not in (object, type(None))] or [nn.Module]
    if not (isinstance(found, type) and issubclass(found, tuple(kinds))):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise Refusal(f"{where} asks for {key}._target_={target}, which is not a subclass of {names}. It is not built.")
    built = {k: nested(v, f"{key}.{k}", annotations(found).get(k, Any), trust, where) for k, v in values.items()}
    try:
        return functools.partial(found, **built) if value.at("_partial_") is True else found(**built)
    except Exception as error:  # whatever the user's code raises
        raise Refusal(f"{where}: {key} cannot be built: {type(error).__name__}: {error}") from error


def annotations(made: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations of the arguments of a class or function, by name; {} where they cannot be read."""
    try:
        return typing.get_type_hints(made.__init__ if isinstance(made, type) else made)
    except Exception:  # of names that are there for a type checker only
        return {}


def _trusted(target: Any, key: str, trust: Sequence[str], where: str, ours: Sequence[str]) -> Any:
    """The object of this name, of a module that the user has named."""
    module = target.rpartition(".")[0] if isinstance(target, str) else ""
    if not module or target.startswith("diffusion."):
        allowed = f" It may name: {', '.join(ours)}." if ours else ""
        raise Refusal(f"{where} asks for {key}={target}, which is not a class that a checkpoint may name.{allowed}")
    if not any(module == name or module.startswith(f"{name}.") for name in trust):
        raise Refusal(
            f"{where} asks for {key}={target}, which is outside this package. A checkpoint may come from anybody, and "
            f"importing a module runs its code. If you trust this module, give trust=[{module}]."
        )
    return _imported(target)


def _imported(target: str) -> Any:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise Refusal(f"{target}: the module {module} has no {name}.") from error
    except Exception as error:  # whatever the code of a module raises
        raise Refusal(
            f"{target}: the module {module} cannot be imported ({type(error).__name__}: {error}). Its folder must be "
            f"the current folder, or be listed in PYTHONPATH."
        ) from error


def _is_of(found: Any, kind: type) -> bool:
    if isinstance(found, type):
        return issubclass(found, kind)
    if not inspect.isfunction(found) or kind is not Schedule:
        return False
    returned = annotations(found).get("return")
    return isinstance(returned, type) and issubclass(returned, kind)
