"""Which settings there are, and what each may be: by the class that takes it, else by its default in conf/.

The kind of a setting of a group is declared by the class of its `_target_`, or by those that OWNERS names for groups,
and for what beside its target a group has. Needs neither torch nor lightning.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from hydra.core.override_parser.types import Override, Transformer
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffusion.config.added import added_part
from diffusion.config.declared import arguments
from diffusion.config.words import is_interpolation, nearest, plain, quoted, shown, typeable
from diffusion.errors import Refusal
from diffusion.settings import ANY, Between, Each, Kind, Positive, kind_of

COMMANDS = ("train", "sample", "evaluate", "lab", "prepare", "report", "benchmark")

OWNERS: dict[str, tuple[str, ...]] = {  # group -> who takes its settings, beside the class of its _target_
    "callbacks": ("diffusion.scoring.looks.Looks",),
    "callbacks.grid": ("diffusion.scoring.looks.Grids",),
    "callbacks.score": ("diffusion.scoring.looks.Scores",),
    "callbacks.score.during": ("diffusion.scoring.looks.During",),
    "data": ("diffusion.data.module.Described", "diffusion.config.commands.Data"),
    "data.remote": ("diffusion.data.shards.remote.Remote",),
    "data.rule": ("diffusion.data.prepare.image.Rule",),
    "digests": ("diffusion.benchmark.settings.Digests",),
    "ema": ("diffusion.training.ema.EMA",),
    "equivalence": ("diffusion.lab.settings.Equivalence",),
    "errors": ("diffusion.lab.settings.Errors",),
    "extractor": ("diffusion.build.extractors.Choice",),
    "forward": ("diffusion.lab.settings.Forward",),
    "gaussian": ("diffusion.lab.settings.Gaussian",),
    "gpu_check": ("diffusion.benchmark.settings.GpuCheck",),
    "guidance": ("diffusion.guidance.ClassifierFree",),
    "held_out": ("diffusion.training.held_out.HeldOut",),
    "likelihood": ("diffusion.scoring.bits.Settings",),
    "loader": ("diffusion.benchmark.settings.Loader",),
    "logger": ("diffusion.training.logger.Choice", "diffusion.training.logger.Wandb"),
    "modes": ("diffusion.lab.settings.Modes",),
    "optimizer": ("diffusion.training.module.Descent",),
    "overhead": ("diffusion.benchmark.settings.Overhead",),
    "reverse": ("diffusion.lab.settings.Reverse",),
    "sampler": ("diffusion.scoring.recipe.Plan",),
    "save": ("diffusion.training.checkpoint.Saving",),
    "sweep": ("diffusion.scoring.evaluation.Sweep",),
    "trainer": ("diffusion.distributed.launcher.Compute", "diffusion.training.fit.Length"),
    **{name: (f"diffusion.config.commands.{name.capitalize()}",) for name in COMMANDS},
}  # fmt: skip
FOREIGN = {  # of other packages, whose annotations do not say all
    "torch.optim.Adam": {
        "lr": kind_of(Positive), "eps": kind_of(Positive),
        "betas": kind_of(Annotated[tuple[float, float], Each(Between(0, 1, "", "[)"), "two numbers in [0, 1)")]),
    },
}  # fmt: skip
FIXED = {  # what this package reads itself of a class of the user's own, and so cannot be removed
    "model": ("image_size", "channels", "num_classes"),
    "schedule": ("num_timesteps",),
    "objective": ("prediction",),
    "data": ("root", "split", "batch_size", "flip", "lanes", "digest"),
    "guidance": ("scale",),
}


MOVED = {"optimizer.warmup_steps": "lr_schedule.warmup_steps"}  # keys of former versions

# ---- kinds ----


def kind_at(key: str, cfg: DictConfig, command: str = "") -> Kind:
    """What a setting may be, as far as it is declared; ANY if it is not.

    Args:
        cfg: that its group stands in. command: whose settings those of no group are.
    """
    group, _, name = key.rpartition(".")
    found = (kinds.get(name, ANY) for kinds in _declared(group, cfg, command))
    return next((kind for kind in found if kind != ANY), ANY)


def _declared(group: str, cfg: DictConfig, command: str) -> Iterator[dict[str, Kind]]:
    node = OmegaConf.select(cfg, group, throw_on_missing=False) if group else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if isinstance(target, str):
        yield FOREIGN.get(target, {})
        yield arguments(target) or {}
    for owner in OWNERS.get(group or command, ()):
        yield arguments(owner) or {}
    if group == "paper" and isinstance(node, DictConfig):  # by the names of metrics
        yield dict.fromkeys(map(str, node), kind_of(float | None))


def kind_of_default(default: Any) -> Kind:
    """The kind that a default shows: that of a setting which nobody declares."""
    if isinstance(default, DictConfig | dict):
        return Kind(dict)
    if isinstance(default, ListConfig | list):
        return Kind(list, member=kind_of_default(default[0]) if len(default) else ANY)
    return ANY if default is None else Kind(type(default))


# ---- keys ----


def lookup(cfg: DictConfig, key: str) -> tuple[DictConfig, str, bool]:
    """(parent node, last name, whether it is there). Refusal where a name on the way is a value and not a group."""
    node, names = cfg, key.split(".")
    for i, name in enumerate(names[:-1]):
        child, above = node._get_node(name, validate_access=False), ".".join(names[: i + 1])
        if child is not None and not isinstance(child, DictConfig):
            raise Refusal(f"Unknown setting: {key}. {above} is a value, not a group of keys: give {above}=VALUE.")
        if child is None:
            raise Refusal(unknown(key, node, name, above))
        if child._is_none() or child._is_missing():
            raise Refusal(f"{key}: {above} is switched off (null) by the chosen options.")
        node = child
    return node, names[-1], node._get_node(names[-1], validate_access=False) is not None


def unknown(key: str, parent: DictConfig, name: str, path: str | None = None) -> str:
    """That a key is unknown, as `parent` has no `name`, which stands at `path` if that is not the whole key."""
    allowed = [str(k) for k in parent.keys() if not str(k).startswith("_") and k != "hydra"]
    where = (path or key).rpartition(".")[0]
    listed = f"{where} has" if where else "There are"
    if key in MOVED:
        return f"Unknown setting: {key}. It is {MOVED[key]} now."
    hint = nearest(name, allowed).replace("mean ", f"mean {where}." if where else "mean ")
    return f"Unknown setting: {key}.{hint} {listed}: {', '.join(allowed)}."


# ---- values ----


def check_kind(key: str, value: Any, default: Any, kind: Kind, beside: str | None = None) -> Any:
    """The value as Hydra shall see it.

    Args:
        default: what holds without it, None if nothing does. kind: what it may be.

    Raises:
        Refusal: it is of another kind, out of its range, or null where a value is needed.
    """
    shows = default is not None and not isinstance(default, DictConfig) and len(shown(default)) < 80
    beside = f"; the default is {key}={shown(default)}" if shows else ""
    kind = kind if kind != ANY else kind_of_default(default)
    if value is None:
        if isinstance(default, DictConfig):
            raise Refusal(f"{key}=null: this group of settings cannot be switched off.")
        if not kind.null and kind != ANY:
            raise Refusal(f"{key}=null: a value is needed, {kind.words}{beside}.")
        return None
    if is_interpolation(value):
        return value
    if value == "":
        raise Refusal(f"{key}= is empty: give {kind.words}{beside}.")
    try:
        value = kind.fitted(value)
    except TypeError:
        wanted = "a finite number" if kind.of is float and isinstance(value, float) else kind.words
        wanted += " or null" if kind.null and not kind.allowed else ""
        raise Refusal(f"{key}={shown(value)} is not {wanted}{beside}.") from None
    if why := kind.outside(value):
        raise Refusal(f"{key}={shown(value)} {why}.")
    return value


def check_group_value(key: str, value: dict, default: DictConfig, command: str) -> dict:
    """`check_kind` of a group of settings that is given as a whole, each of them."""
    found = {}
    for name, inner in value.items():
        parent, last, present = lookup(default, str(name))
        if not present and not (isinstance(parent, DictConfig) and parent.get("_target_")):
            raise Refusal(unknown(f"{key}.{name}", parent, last))
        found[name] = checked(f"{key}.{name}", inner, OmegaConf.create({key: default}), command) if present else inner
    return value if all(found[name] is inner for name, inner in value.items()) else found


def checked(key: str, value: Any, reference: DictConfig, command: str) -> Any:
    """A value, or all values of a group, as Hydra shall see them; refused as by `check_kind`."""
    default = OmegaConf.select(reference, key, throw_on_missing=False)
    if isinstance(value, dict) and isinstance(default, DictConfig):
        return check_group_value(key, value, default, command)
    return check_kind(key, value, default, kind_at(key, reference, command))


def check_word(override: Override, reference: DictConfig, command: str) -> str | None:
    """Refuse an unknown key, or a value that its setting cannot have; a rewritten word where one is plain.

    Args:
        reference: the configuration without the user's settings.
    """
    key = override.key_or_group
    if added_part(override, reference):
        return None
    parent, name, present = lookup(reference, key)
    if not present:
        return _check_added(override, parent, name)
    if override.is_delete():
        return _check_deletion(key, parent)
    name, _, text = override.input_line.partition("=")
    if override.is_sweep_override():
        values = list(override.sweep_iterator())
        typed = text.split(",") if override.is_choice_sweep() and not re.search(r"[\"'()\[\]{}]", text) else values
        words = [_rewritten(key, *pair, reference, command) for pair in zip(values, typed, strict=True)]
        if not any(words):
            return None
        kept = map(Transformer.str, values)
        return f"{name}={','.join(new or old for new, old in zip(words, kept, strict=True))}"
    rewritten = _rewritten(key, override.value(), text, reference, command)
    return None if rewritten is None else f"{name}={rewritten}"


def _rewritten(key: str, value: Any, typed: Any, reference: DictConfig, command: str) -> str | None:
    """A checked value in the form of its kind, as Hydra's grammar writes it; None where it has it.

    Args:
        typed: the value as the user has typed it, if it is known: a text stays what it is, as in trainer.precision=32.
    """
    given = plain(value)
    found = checked(key, given, reference, command)
    if found is given:
        return None
    return quoted(str(typed).strip()) if isinstance(found, str) else typeable(found)


def _check_added(override: Override, parent: DictConfig, name: str) -> None:
    """Refuse `+key` unless the class of its group takes it, or is one of which nothing is known."""
    key, target = override.key_or_group, parent.get("_target_") if isinstance(parent, DictConfig) else None
    if not override.is_add() or not target:
        raise Refusal(unknown(key, parent, name))
    allowed = arguments(str(target))
    if allowed is None and not str(target).startswith("diffusion."):
        return  # its own constructor judges when everything is built
    if name not in (allowed or {}):
        listed = list(allowed or {})
        raise Refusal(
            f"{key}: {target} has no argument {name}.{nearest(name, listed)} Its arguments: {', '.join(listed)}."
        )


def _check_deletion(key: str, parent: DictConfig) -> None:
    """Refuse to take away what this package reads itself; a class of the user's own may lack any other key."""
    group, _, name = key.rpartition(".")
    owned = {n for owner in OWNERS.get(group, ()) for n in arguments(owner) or ()} | set(FIXED.get(group, ()))
    if "_target_" not in parent or name in owned:
        raise Refusal(f"~{key}: this setting cannot be removed. Give it another value: {key}=VALUE.")


def fit_all(cfg: DictConfig, command: str, typed: Any = None) -> None:
    """Give each value of a composed, resolved configuration the form of its kind; refuse one that its setting cannot
    have.

    Args:
        typed: `compose.Typed`: of a value that it holds an interpolation for, also the kind of the default counts.
    """
    for key in _keys(cfg):
        value = OmegaConf.select(cfg, key)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        kind, default = kind_at(key, cfg, command), None
        if kind == ANY and typed is not None and "${" in typed.settings.get(key, ""):
            default = OmegaConf.select(typed.defaults, key, throw_on_missing=False)
        if value is None and kind.null or kind == ANY and default is None:
            continue
        try:
            found = check_kind(key, value, default, kind)
        except Refusal as e:
            if isinstance(value, str) and typed is not None and "${oc.env:" in typed.settings.get(key, ""):
                number = f"{key}='${{oc.decode:${{oc.env:NAME}}}}'"  # Hydra reads the nested one in quotes alone
                raise Refusal(f"{e} A variable of the environment is text; {number}, in quotes, decodes it.") from None
            raise
        if found is not value:
            OmegaConf.update(cfg, key, found)


def _keys(cfg: DictConfig, above: str = "") -> Iterator[str]:
    """All settings that have a value."""
    for name in cfg:
        key = f"{above}{name}"
        if str(name).startswith("_") or key == "hydra" or OmegaConf.is_missing(cfg, name):
            continue
        if isinstance(node := cfg._get_node(name), DictConfig) and not node._is_none():
            yield from _keys(node, f"{key}.")
        else:
            yield key
