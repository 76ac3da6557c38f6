"""The words of a command line: what is a flag, what a setting, and what of both can be read at all.

Hydra's own answers speak of its grammar, so every word is looked at before Hydra sees it. Paths may hold blanks, "=",
commas and brackets. Needs neither torch nor lightning.
"""

import difflib
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffusion.errors import Refusal

PACKAGE = Path(__file__).resolve().parents[1]
PATH_KEYS = ("checkpoint", "image", "images", "mask", "source", "out", "run_dir", "other", "runs", "reference")
PATH_KEYS += ("samples", "data.root", "data.remote.folder", "extractor.weights")
PATH_KEYS += ("loader.root", "loader.cifar_root", "loader.peers_python")
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
    """Config groups and their options, by listing conf/; what options have in common, in _NAME.yaml, is none."""
    found = sorted(p for p in conf_dir().iterdir() if p.is_dir() and not p.name.startswith("_"))
    return {p.name: sorted(f.stem for f in p.glob("*.yaml") if f.name[0] != "_") for p in found}


def nearest(word: str, allowed: list[str]) -> str:
    """' Did you mean ...?' where a name is near enough, else nothing."""
    for name in difflib.get_close_matches(word, allowed, n=1, cutoff=0.6):
        return f" Did you mean {name}?"
    return ""


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
        raise Refusal(f"{word!r} is not a setting: settings are key=value.{hint}")
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


def typeable(value: Any) -> str:
    """A value as Hydra's grammar reads it back."""
    if isinstance(value, list):
        return f"[{','.join(map(typeable, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{typeable(v)}' for k, v in value.items())}}}"
    return (value if value.startswith("${") else quoted(value)) if isinstance(value, str) else shown(value)


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
