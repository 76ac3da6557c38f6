"""The words of a command line: what is a flag, what a setting, and what of both can be read at all.

Hydra's own answers speak of its grammar, so every word is looked at before Hydra sees it. Paths may hold blanks, "=",
commas and brackets. Needs neither torch nor lightning.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from diffusion.config.composer import groups
from diffusion.errors import Refusal

PATH_KEYS = ("checkpoint", "image", "images", "mask", "source", "out", "run_dir", "other", "runs", "reference")
PATH_KEYS += ("samples", "data.root", "data.remote.folder", "extractor.weights")
PATH_KEYS += ("loader.root", "loader.cifar_root", "loader.peers_python")
FLAGS_WITH_VALUE = ("-c", "--cfg", "-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir", "-p")
FLAGS_WITH_VALUE += ("--package", "--experimental-rerun")
FLAGS = (*FLAGS_WITH_VALUE, "-h", "--help", "--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun")
FLAGS += ("-sc", "--shell-completion", "-i", "--info")


def nearest(word: str, allowed: list[str]) -> str:
    """' Did you mean ...?' where a name is near enough, else nothing."""
    same = [name for name in allowed if name.casefold() == word.casefold()]
    for name in same or difflib.get_close_matches(word, allowed, n=1, cutoff=0.6):
        return f" Did you mean {name}?"
    return ""


def quote_path(word: str) -> str:
    """`out=a b,[c]=d` -> `out='a b,[c]=d'`: the value of a path key is taken as it stands, whatever it holds."""
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS or value in ("", "null"):
        return word
    value = at_home(value)
    if value.startswith("${") or is_quoted(value):
        return f"{key}={value}"
    return f"{key}={quoted(value)}"


def home_path(word: str) -> str:
    """`out=~/a` -> `out=/home/me/a`, of a path key; nothing else is changed, as in a sweep a comma separates values."""
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in PATH_KEYS or "," in value:
        return word
    return f"{key}={at_home(value)}"


def is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def at_home(value: str) -> str:
    """Return a path as it is typed, in quotes or not, with the home folder in the place of `~`, which no shell replaces
    behind an equals sign."""
    inner = value[1:-1] if is_quoted(value) else value
    if inner != "~" and not inner.startswith("~/"):
        return value
    found = str(Path(inner).expanduser())
    return quoted(found) if is_quoted(value) else found


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


def config_folders(flags: list[str], words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the config folders of a command line, its other flags, and its words, one of which gives all folders.

    They are given by `--config-dir FOLDER` (`-cd`), any number of times, and by `hydra.searchpath=[...]`.
    """
    folders, others, rest = [], [], iter(flags)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if name not in ("-cd", "--config-dir"):
            others.append(flag)
        elif value := value if equals else next(rest, ""):
            folders.append(value)
        else:
            raise Refusal(f"{name} needs a value after it: the path of a config folder.")
    kept = []
    for word in words:
        if word.lstrip("+").startswith("hydra.searchpath="):
            value = plain(parse(word).value())
            if not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
                raise Refusal(f"{word}: a list of config folders is needed: hydra.searchpath=[FOLDER].")
            folders += value
        else:
            kept.append(word)
    folders = [folder if "://" in folder else str(Path(folder).expanduser().absolute()) for folder in folders]
    if folders:
        kept.append(search_word(folders))
    return folders, others, kept


def search_word(folders: Sequence[str]) -> str:
    """Return the word that has Hydra look for config files in these folders."""
    return f"hydra.searchpath=[{','.join(map(quoted, folders))}]"


def check_flags(flags: list[str], argv: list[str]) -> None:
    """Refuse flags that Hydra does not have, whose parser would answer with its own grammar.

    Args:
        argv: the whole command line.
    """
    words = iter(flags)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in FLAGS:
            key = flag.lstrip("-").replace("-", "_")
            after = argv[argv.index(word) + 1 :][:1]
            value = value if equals else after[0] if after and not re.match(r"-|[\w.]+=", after[0]) else "VALUE"
            raise Refusal(
                f"{word}: unknown flag. Settings are given without dashes: did you mean {key}={value}? --help lists "
                f"the settings, --cfg job shows them composed, -m begins a sweep."
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
