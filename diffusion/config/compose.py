"""From the words of a command line to a composed configuration, or to one clear message; without torch or lightning.

    @command("train")
    def main(cfg): ...

Hydra composes. Before it does, every word is looked at here, because Hydra's own answers speak of its grammar: an
unknown group, option, key or a value of another type is answered with what is allowed and the nearest name. Paths may
hold blanks, "=", commas and brackets. What is refused ends with exit status 2, without a traceback (one with
debug=true) and with nothing written. Values are judged in check.py.
"""

import ast
import difflib
import functools
import hashlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here instead of ending in Hydra's own report

import hydra  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.core.override_parser.types import Override, QuotedString  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, ListConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from diffusion.distributed.signals import end_if_interrupted, handled  # noqa: E402
from diffusion.errors import Refusal  # noqa: E402
from diffusion.files import reason, shortage  # noqa: E402

PACKAGE = Path(__file__).resolve().parents[1]
PATH_KEYS = ("checkpoint", "image", "images", "mask", "source", "out", "run_dir", "other", "runs", "reference")
PATH_KEYS += ("samples", "data.root", "data.remote.folder", "extractor.weights")
PATH_KEYS += ("loader.root", "loader.cifar_root", "loader.peers_python")
OPEN = {  # kinds of what is null or ??? by default, where a value itself does not show them; [int]: a list of these
    **dict.fromkeys(("name", "task", "data.name", "data.digest", "extractor.name", "extractor.target"), str),
    **dict.fromkeys(("extractor.weights", "extractor.sha256", "logger.entity", "logger.group"), str),
    **dict.fromkeys(
        ("checkpoint", "images", "reference", "samples", "out", "run_dir", "other", "toy", "data.root"), str
    ),
    **dict.fromkeys(("source", "dataset", "crop", "resize", "background"), str),
    **dict.fromkeys(("likelihood.split", "likelihood.variance", "errors.split"), str),
    **dict.fromkeys(("loader.root", "loader.cifar_root", "loader.peers_python"), str),
    **dict.fromkeys(("image_size", "channels", "quality", "shard_samples", "processes"), int),
    **dict.fromkeys(("data.image_size", "data.lanes", "extractor.image_size", "sampler.num_steps"), int),
    **dict.fromkeys(("trainer.threads", "likelihood.num_images", "gaussian.fitted_on"), int),
    **dict.fromkeys(("callbacks.score.during.num_images", "callbacks.score.during.num_steps"), int),
    **dict.fromkeys(("paper.fid", "paper.is", "paper.bits_per_dim"), float),
    "forward.times": [float],
    "logger.tags": [str],
}
READ = {  # by this package, of groups that also have keys of a class of the user's own
    "data": ("name", "root", "split", "image_size", "channels", "num_classes", "batch_size", "flip", "lanes", "digest"),
    "model": ("image_size", "channels", "num_classes"),
    "schedule": ("num_timesteps",),
    "objective": ("prediction", "label_dropout"),
    "sampler": ("num_steps", "spacing", "clip_x0"),
    "guidance": ("scale",),
    "optimizer": ("warmup_steps", "gradient_clip"),
}
MAY_BE_NULL = ("sampler.num_steps", "logger.project")
MAY_BE_NULL += ("callbacks.score.during.num_images", "callbacks.score.during.num_steps")
PLACEHOLDERS = {"out": "FOLDER", "checkpoint": "PATH", "task": "NAME", "name": "NAME", "data.name": "NAME"}
PLACEHOLDERS |= {"data.image_size": "PIXELS", "extractor.name": "NAME", "extractor.target": "package.module.function"}
FLAGS_WITH_VALUE = ("-c", "--cfg", "-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir", "-p")
FLAGS_WITH_VALUE += ("--package", "--experimental-rerun")
FLAGS = (*FLAGS_WITH_VALUE, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun")
FLAGS += ("-sc", "--shell-completion", "-i", "--info")


def conf_dir() -> Path:
    """The configs: inside the package in a wheel, beside it in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if folder.is_dir():
            return folder
    raise Refusal(f"No conf/ inside or beside {PACKAGE}: the installation is incomplete, install it again.")


def groups() -> dict[str, list[str]]:
    """Config groups and their options, by listing conf/."""
    found = sorted(p for p in conf_dir().iterdir() if p.is_dir() and not p.name.startswith("_"))
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in found}


def nearest(word: str, allowed: list[str]) -> str:
    """' Did you mean ...?' where a name is near enough, else nothing."""
    for name in difflib.get_close_matches(word, allowed, n=1, cutoff=0.6):
        return f" Did you mean {name}?"
    return ""


# ---- words ----


def quote_path(word: str) -> str:
    """`out=a b,[c]=d` -> `out='a b,[c]=d'`: the value of a path key is taken as it stands, whatever it holds."""
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS or value in ("", "null"):
        return word
    if value.startswith("${") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return word
    return f"{key}={quoted(value)}"


def quoted(value: str) -> str:
    """A text, whatever it holds, as Hydra's grammar writes it."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value).replace("${", r"\${")
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """(flags of Hydra with their values, overrides)."""
    flags, words, takes_value = [], [], False
    for word in argv:
        if takes_value or (word.startswith("-") and "=" not in word.split()[0]) or word.startswith("--"):
            flags.append(word)
            takes_value = word in FLAGS_WITH_VALUE
        else:
            words.append(word)
    return flags, words


def check_flags(flags: list[str]) -> None:
    """Refuse flags that Hydra does not have, whose parser would answer with its own grammar."""
    words = iter(flags)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in FLAGS:
            raise Refusal(
                f"{word}: unknown flag. Settings are key=value, without dashes; --help lists them, --cfg job shows "
                f"them composed, -m begins a sweep."
            )
        if flag in FLAGS_WITH_VALUE and not equals and (value := next(words, "")) == "":
            raise Refusal(f"{flag} needs a value after it.")
        if flag in ("-c", "--cfg") and value not in ("job", "hydra", "all"):
            raise Refusal(f"{flag} {value}: give one of job, hydra, all.")


def parse(word: str) -> Override:
    if "=" not in word and not word.startswith("~"):
        hint = f" Did you mean +experiment={word}?" if word in groups()["experiment"] else ""
        raise Refusal(f"{word!r} is no setting: settings are key=value.{hint}")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as e:
        raise Refusal(
            f"{word!r} cannot be read ({str(e).splitlines()[0]}). "
            f"Put the value in quotes: {word.partition('=')[0]}=\"'...'\""
        ) from e


def plain(value: object) -> object:
    """A parsed value without Hydra's quoting."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def check_group(override: Override, known: dict[str, list[str]]) -> str:
    """Refuse an option that its group does not have; the word with which the reference is composed."""
    group = override.key_or_group
    if override.is_sweep_override():
        options = [str(plain(v)) for v in override.sweep_iterator()]
    else:
        options = [str(plain(override.value()))]
    for option in options:
        if option not in known[group]:
            raise Refusal(
                f"{group}={option}: there is no such {group}.{nearest(option, known[group])} "
                f"There are: {', '.join(known[group])}."
            )
    plus = "+" if group == "experiment" else ""
    return f"{plus}{group}={options[0]}"


# ---- keys and types, against the configuration without the user's values ----


def signature(target: str) -> list[str] | None:
    """Parameter names of a class or function of this package, read from its source; None for anything else."""
    module, _, name = target.rpartition(".")
    path = PACKAGE.parent / (module.replace(".", "/") + ".py")
    if not module.startswith("diffusion.") or not path.is_file():
        return None
    for node in ast.parse(path.read_text()).body:
        if getattr(node, "name", None) == name:
            if isinstance(node, ast.ClassDef):
                inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                if not inits:
                    return None
                node = inits[0]
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            return [a.arg for a in arguments if a.arg != "self"]
    return None


def lookup(cfg: DictConfig, key: str) -> tuple[DictConfig, str, bool]:
    """(parent node, last name, whether it is there); refuses a path that leads through what is no group of keys."""
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
    hint = nearest(name, allowed).replace("mean ", f"mean {where}." if where else "mean ")
    return f"Unknown setting: {key}.{hint} {listed}: {', '.join(allowed)}."


def kind_of(key: str, default: object) -> Any:
    """The kind of a setting by its default: bool, int, float, str, dict, or [kind] for a list; None: any."""
    if default is None or isinstance(default, list | ListConfig) and not default:
        return OPEN.get(key, None if default is None else [None])
    if isinstance(default, list | ListConfig):
        return [type(default[0])]
    return dict if isinstance(default, dict | DictConfig) else type(default)


def kind(wanted: Any) -> str:
    """A kind, or that of a value, in words."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a group of keys"}
    several = {int: "integers, as [1,2]", float: "numbers, as [1,2]", str: "words, as [a,b]"}
    if not isinstance(wanted, type | list):
        wanted = kind_of("", wanted)
    if isinstance(wanted, list | ListConfig):
        return f"a list of {several[wanted[0]]}" if wanted and wanted[0] in several else "a list, as [1,2]"
    return names[wanted]


def fitted(key: str, value: Any, wanted: Any, default: Any) -> Any:
    """A value as one of the kind that is wanted, which a number may be written as in more than one way.

    Raises:
        Refusal: it is of another kind.
    """
    beside = f"; the default is {key}={shown(default)}" if default is not None and len(shown(default)) < 80 else ""
    if wanted is None or is_interpolation(value):
        return value
    if isinstance(wanted, list):
        if isinstance(value, dict):
            raise Refusal(f"{key}={shown(value)} is not {kind(wanted)}{beside}.")
        return [
            fitted_member(key, value, v, wanted[0], beside) for v in (value if isinstance(value, list) else [value])
        ]
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if wanted is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise Refusal(f"{key}={shown(value)} is not {kind(wanted)}{beside}.")
    if wanted is float and not abs(value) <= sys.float_info.max:  # nan too
        raise Refusal(f"{key}={value} is not a finite number{beside}.")
    if value == "":
        raise Refusal(f"{key}= is empty: give {kind(wanted)}{beside}.")
    return value


def fitted_member(key: str, whole: Any, value: Any, wanted: type | None, beside: str) -> Any:
    """`fitted`, of a value in a list; the refusal shows the whole."""
    try:
        return fitted(key, value, wanted, None)
    except Refusal as e:
        raise Refusal(f"{key}={shown(whole)} is not {kind([wanted])}{beside}.") from e


def is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {shown(v)}' for k, v in value.items())}}}"
    if value is None or type(value) is bool:
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "''"


def check_kind(key: str, value: Any, default: Any) -> Any:
    """The value as Hydra shall see it; refuses another kind than the default's, and null where a value is needed."""
    if value is None:
        if default is not None and key not in MAY_BE_NULL:
            raise Refusal(
                f"{key}=null: a value is needed, {kind(default)}; the default is {key}={shown(default)}."
                if not isinstance(default, DictConfig)
                else f"{key}=null: this group of settings cannot be switched off."
            )
        return None
    wanted = kind_of(key, default)
    value = fitted(key, value, wanted, default)
    if wanted is dict and isinstance(value, dict):
        for name, inner in value.items():
            parent, last, present = lookup(default, str(name))
            if not present:
                if isinstance(parent, DictConfig) and parent.get("_target_"):
                    continue  # its class judges when everything is built
                raise Refusal(unknown(f"{key}.{name}", parent, last))
            value[name] = check_kind(f"{key}.{name}", inner, OmegaConf.select(default, str(name)))
    return value


def check_deletion(key: str, parent: DictConfig) -> None:
    """Refuse to take away what this package reads itself; a class of the user's own may lack any other key."""
    group = key.rpartition(".")[0]
    if "_target_" not in parent or key.rpartition(".")[2] in READ.get(group, ()):
        raise Refusal(f"~{key}: this setting cannot be removed. Give it another value: {key}=VALUE.")


def check_value(override: Override, reference: DictConfig) -> str | None:
    """Refuse an unknown key or a value of another kind than the default's; a rewritten word where one is plain."""
    key = override.key_or_group
    parent, name, present = lookup(reference, key)
    if not present:
        target = parent.get("_target_") if isinstance(parent, DictConfig) else None
        allowed = signature(target) if target else None
        if override.is_add() and allowed is not None and name in allowed:
            return None
        if override.is_add() and target and allowed is None and not str(target).startswith("diffusion."):
            return None  # another package's: its own constructor judges when everything is built
        if override.is_add() and allowed is not None:
            raise Refusal(f"{key} is no argument of {target}.{nearest(name, allowed)} It has: {', '.join(allowed)}.")
        raise Refusal(unknown(key, parent, name))
    if override.is_delete():
        return check_deletion(key, parent)
    default = OmegaConf.select(reference, key, throw_on_missing=False)
    if override.is_sweep_override():
        for value in override.sweep_iterator():
            check_kind(key, plain(value), default)
        return None
    value = plain(override.value())
    found = check_kind(key, value, default)
    if type(found) is type(value) and found == value:
        return None
    name, _, text = override.input_line.partition("=")
    return (
        f"{name}={quoted(text) if isinstance(found, str) else typeable(found)}"  # trainer.precision=32 as it is typed
    )


def typeable(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    if isinstance(value, list):
        return f"[{','.join(map(typeable, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{typeable(v)}' for k, v in value.items())}}}"
    return (value if value.startswith("${") else quoted(value)) if isinstance(value, str) else shown(value)


def check_words(config_name: str, words: list[str], sweep: bool = False) -> list[str]:
    """Refuse what cannot be composed, by name; returns the words as Hydra shall see them.

    In a sweep a comma separates values, so paths are left as they are written.
    """
    known, chosen, settings = groups(), [], []
    words = list(words) if sweep else [quote_path(w) for w in words]
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
            chosen.append(check_group(override, known))
            if override.is_sweep_override():  # of several names: there is no runs/NAME for what the sweep itself leaves
                words.append("hydra.sweep.dir=runs")
        elif name in known and not override.is_delete() and "_" != str(plain(override.value()))[:1]:
            chosen.append(check_group(override, known))
        else:
            settings.append((i, override))
    reference = composed_of_options(config_name, tuple(chosen))
    for i, override in settings:
        if override.key_or_group in {"+" + k for k in known}:
            continue
        words[i] = check_value(override, reference) or words[i]
    return words


@functools.cache
def composed_of_options(config_name: str, chosen: tuple[str, ...]) -> DictConfig:
    """The configuration of these options of groups, without the user's settings, and with Hydra's own; to be read."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return compose(config_name, overrides=list(chosen), return_hydra_config=True)
        except HydraException as e:
            group = next((w.partition("=")[0] for w in chosen if w.partition("=")[0] in str(e)), "")
            raise Refusal(f"{group or 'The configuration'}: {str(e).splitlines()[0]}") from e


@contextmanager
def composing() -> Iterator[None]:
    """Hydra composes for one at a time: within, also inside of a command, it composes for this."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def composed(config_name: str, words: list[str]) -> DictConfig:
    """What a command would be given for these words, resolved; refused as there. May be asked for within a command."""
    with composing():
        words = check_words(config_name, words)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(config_name, overrides=words)
    OmegaConf.resolve(cfg)
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
        with composing():
            return composed_of_options(self.command, tuple(chosen))


def flattened(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} below `key` -> {"key.a.b": 1}."""
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in flattened(f"{key}.{name}", inner).items()}


def check_resolved(cfg: DictConfig, typed: Typed) -> None:
    """Refuse interpolations whose value is of another kind than the default's, which only the whole shows."""
    for key, word in typed.settings.items():
        if "${" in word:
            value = OmegaConf.select(cfg, key)
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            if check_kind(key, value, OmegaConf.select(typed.defaults, key, throw_on_missing=False)) != value:
                raise Refusal(f"{word}: its value, {shown(value)}, is of another kind than this setting has.")


def typed() -> Typed:
    """The words of the command that runs in this process."""
    if not HydraConfig.initialized():
        return Typed()
    hydra_cfg = HydraConfig.get()
    words = OmegaConf.to_container(hydra_cfg.overrides.task, resolve=False)  # which may be interpolations themselves
    return Typed(str(hydra_cfg.job.config_name), tuple(words))


def check_shown(command: str, words: list[str]) -> None:
    """Refuse to show a configuration that the command would refuse; one that lacks a setting is shown."""
    from diffusion.config.check import check  # which takes its words from here

    cfg = composed(command, words)
    if not OmegaConf.missing_keys(cfg):
        check(cfg, Typed(command, tuple(words)))


def sweep_folder(run_dir: str, words: list[str]) -> str:
    """The run folder of one job of a sweep: below the common one, named by its overrides, the same on every start."""
    own = sorted(w.lstrip("+") for w in words if not w.lstrip("+").startswith(("run_dir=", "experiment=")))
    slug = re.sub(r"[^\w.=,+-]+", "-", ",".join(own)) or "default"
    if len(slug.encode()) > 200:  # file systems take 255 bytes
        slug = f"{slug.encode()[:150].decode(errors='ignore')}-{hashlib.sha256(slug.encode()).hexdigest()[:12]}"
    return str(Path(run_dir) / slug)


# ---- commands ----


@contextmanager
def refusing(debug: bool = False) -> Iterator[None]:
    """A ValueError, or an error of Hydra's, while a command checks and builds: one message, exit status 2."""
    try:
        yield
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as e:
        end_if_interrupted()
        if debug:
            traceback.print_exc()
        cause = e.__cause__ if isinstance(e, HydraException) and isinstance(e.__cause__, ValueError) else e
        message = shortage(e) or str(cause).strip() or reason(cause)
        if not isinstance(cause, Refusal) and isinstance(cause, HydraException | OmegaConfBaseException):
            key = getattr(cause, "full_key", None)
            message = (f"{key}: " if key else "") + message.splitlines()[0]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def help_text(config_name: str, doc: str) -> str:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        first = ["+experiment=digits"] if config_name == "train" else []
        cfg = compose(config_name, overrides=first)
    used = [g for g in groups() if g in cfg or g == "experiment" and config_name == "train"]
    lines = [f"  {('+' if g == 'experiment' else '') + g:12} {', '.join(groups()[g])}" for g in used]
    options = "\nGroups (group=option):\n" + "\n".join(lines) + "\n" if lines else ""
    settings = OmegaConf.to_yaml(cfg).replace("\n", "\n  ").rstrip()
    return f"{doc.strip()}\n{options}\nSettings (key.key=value) and what they are now:\n\n  {settings}\n"


def command(config_name: str, experiment: str | None = None) -> Callable:
    """Make `main(cfg)` a Hydra application over conf/<config_name>.yaml.

    `experiment` is what no `+experiment=` means. The module's docstring is the text of --help.
    """

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            with handled() as signals:
                try:
                    called()
                except Exception:
                    end_if_interrupted()  # in code of others, which may have made another error of the signal's
                    raise
                finally:
                    signals.over()

        def called() -> None:
            flags, words = split_words(sys.argv[1:])
            doc = sys.modules[main.__module__].__doc__ or ""
            debug = any(w.replace(" ", "").lower() == "debug=true" for w in words)
            with refusing(debug):
                if "--help" in flags or "-h" in flags:
                    print(help_text(config_name, doc), end="")
                    return
                if experiment and not any(re.match(r"\+{0,2}experiment=", w) for w in words):
                    words.insert(0, f"+experiment={experiment}")
                sweep = "-m" in flags or "--multirun" in flags
                if sweep and config_name == "train":
                    from diffusion.config.sweep import sweep_words  # which composes in its turn

                    flags, words = sweep_words(flags, words)
                else:
                    words = check_words(config_name, words, sweep)
                check_flags(flags)
                if sweep and config_name != "train":
                    from diffusion.config.sweep import check_jobs

                    check_jobs(config_name, words)
                elif not sweep and {"-c", "--cfg"} & {flag.partition("=")[0] for flag in flags}:
                    check_shown(config_name, words)
                sys.argv[1:] = [*flags, *words]
            application = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
            try:
                application(functools.partial(_task, main))()
            except (HydraException, OmegaConfBaseException) as e:  # raised by Hydra itself: _task lets none through
                with refusing(debug):
                    raise e

        return run

    return decorate


def _task(main: Callable[[DictConfig], None], cfg: DictConfig) -> None:
    with refusing(cfg.get("debug", False)):
        missing = sorted(OmegaConf.missing_keys(cfg) - {"hydra"})
        if missing:
            raise Refusal(f"Missing required setting: {missing[0]}={PLACEHOLDERS.get(missing[0], 'VALUE')}.")
        if HydraConfig.get().mode == RunMode.MULTIRUN and "run_dir" in cfg:
            cfg.run_dir = sweep_folder(cfg.run_dir, list(HydraConfig.get().overrides.task))
        OmegaConf.resolve(cfg)
    OmegaConf.set_readonly(cfg, True)
    if not cfg.get("debug", False):
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code it is from
    try:
        main(cfg)
    except Exception:  # no refusal but a failure: the whole story, and a status of its own
        end_if_interrupted()
        traceback.print_exc()
        sys.exit(1)
