"""The text of --help: the settings as the given words make them, each with its description and what it may be.

A description is the comment beside the key in its config file, or in the file that this one is based on. Needs neither
torch nor lightning.
"""

import functools
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion.config.compose import check_words
from diffusion.config.composer import compose, conf_dir, groups, searched
from diffusion.config.values import kind_at
from diffusion.config.words import shown
from diffusion.settings import ANY, Kind

KEY = re.compile(r"^(?P<indent> *)(?P<name>[\w.]+):(?P<rest>.*)$")
COMMENT = re.compile(r"^(?P<before>.*?(?:^|\s))#\s?(?P<text>.*)$")
WIDTH = 40  # of the column of settings


def help_text(command: str, doc: str, words: Sequence[str]) -> str:
    """Return the text of --help of a command, for these words.

    Raises:
        Refusal: the words cannot be used.
    """
    cfg = compose(command, check_words(command, list(words)), hydra=True)
    chosen = {k: v for k, v in cfg.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    width = max(80, min(shutil.get_terminal_size((110, 40)).columns, 140))
    parts = [doc.strip()]
    if listed := "\n".join(_groups(command, cfg, chosen, width)):
        parts.append(f"Groups (GROUP=OPTION; * is the one that is chosen):\n\n{listed}")
    settings = "\n".join(_settings(command, cfg, chosen, width))
    parts.append(f"Settings (KEY=VALUE) and their values for these words:\n\n{settings}")
    return "\n\n".join(parts) + "\n"


def _groups(command: str, cfg: DictConfig, chosen: dict[str, str], width: int) -> Iterator[str]:
    """The groups of a command, a line for each option."""
    for group, options in groups().items():
        if group not in chosen and not (group == "experiment" and command == "train"):
            continue
        yield f"  {'+' if group == 'experiment' else ''}{group}"
        for option in options:
            mark = "*" if chosen.get(group) == option else " "
            yield from _wrapped(f"  {mark} {option}", title(group, option), width, 24)


def _settings(command: str, cfg: DictConfig, chosen: dict[str, str], width: int) -> Iterator[str]:
    """All settings in the order of the configuration, those of no group first."""
    keys = sorted(_keys(cfg), key=lambda key: "." in key)
    group = ""
    for key in keys:
        if (first := key.partition(".")[0] if "." in key else "") != group:
            group = first
            yield ""
        raw = _raw(cfg, key)
        value = "REQUIRED" if raw == "???" else shown(raw)
        kind = allowed(kind_at(key, cfg, command))
        text = "  ".join(part for part in (description(key, command, chosen), f"[{kind}]" if kind else "") if part)
        yield from _wrapped(f"  {key}={value}", text, width, WIDTH)


def _keys(cfg: DictConfig, above: str = "") -> Iterator[str]:
    """All settings, those that are required and not given among them."""
    for name in cfg:
        if str(name).startswith("_"):
            continue
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            yield from _keys(node, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _raw(cfg: DictConfig, key: str) -> Any:
    """The value of a setting, an interpolation as it stands."""
    parent, _, name = key.rpartition(".")
    group = OmegaConf.select(cfg, parent) if parent else cfg
    return OmegaConf.to_container(group, resolve=False)[name]


def _wrapped(left: str, text: str, width: int, column: int) -> Iterator[str]:
    """A line with a text beside it, which goes on below."""
    lines = textwrap.wrap(text, max(width - column - 1, 30)) or [""]
    if len(left) >= column:
        yield left
        left = ""
    for line in lines:
        yield f"{left:{column}}{line}".rstrip()
        left = ""


def allowed(kind: Kind) -> str:
    """Return what a setting may be, in a few words; "" if anything."""
    if kind == ANY:
        return ""
    text = kind.words
    for one in kind.ranges:
        text += f", {one.words}"
    if kind.member is not None:
        text += "".join(f", each {one.words}" for one in kind.member.ranges)
    return text + (", or null" if kind.null else "")


# ---- comments ----


def title(group: str, option: str) -> str:
    """Return what an option is: the first sentence of the comment at the head of its config file."""
    file, lines = _file(group, option), []
    for line in file.read_text().splitlines() if file else ():
        if line.startswith("# @"):
            continue
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line[2:].strip())
    return re.split(r"(?<=[^.]{3}[.:])\s", " ".join(lines))[0].rstrip(":")


def description(key: str, command: str, chosen: dict[str, str]) -> str:
    """Return the description of a setting: the comment beside its key; "" if there is none."""
    group, _, rest = key.partition(".")
    if group in chosen and rest:
        others = (option for option in groups().get(group, ()) if option != chosen[group])
        for option in itertools.chain(_based_on(group, chosen[group]), others):
            if (file := _file(group, option)) and (found := comments(file).get(rest)):
                return found
    for name in (command, "base"):
        if found := comments(conf_dir() / f"{name}.yaml").get(key):
            return found
    return ""


def _based_on(group: str, option: str) -> Iterator[str]:
    """An option of a group and those that its defaults list names, the nearest first."""
    yield option
    file = _file(group, option)
    content = OmegaConf.load(file) if file else {}
    for other in content.get("defaults", []) if isinstance(content, DictConfig) else ():
        if isinstance(other, str) and other != "_self_":
            yield from _based_on(group, other)


def _file(group: str, option: str) -> Path | None:
    folders = [conf_dir(), *(Path(f.removeprefix("file://")) for f in searched() if "://" not in f or "file" in f[:4])]
    return next((file for folder in folders if (file := folder / group / f"{option}.yaml").is_file()), None)


def comments(file: Path) -> dict[str, str]:
    """As `_comments`, read once."""
    return _comments(file, file.stat().st_mtime_ns if file.is_file() else 0)


@functools.lru_cache(maxsize=512)
def _comments(file: Path, _: int) -> dict[str, str]:
    """Return the comments beside the keys of a config file, by key, as "sweep.eta".

    Lines of comment below one continue it; a line that ends with a colon is of the key below.
    """
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    last, column, above = "", 0, ""
    for line in file.read_text().splitlines() if file.is_file() else ():
        comment = COMMENT.match(line)
        key = KEY.match(comment["before"] if comment else line)
        if key:
            path = [(indent, name) for indent, name in path if indent < len(key["indent"])]
            path.append((len(key["indent"]), key["name"]))
            last, column = ".".join(name for _, name in path), len(comment["before"]) if comment else 0
            names = [last]
            if inner := re.findall(r"[{,]\s*(\w+):", key["rest"].partition("#")[0]):  # {root: null}
                names = [f"{last}.{name}" for name in inner]
            if comment or above:
                text = comment["text"].strip() if comment else above.removesuffix(":")
                found |= dict.fromkeys(names, text)
                last = names[0]
        elif comment and not comment["before"].strip() and last in found and len(comment["before"]) >= column > 0:
            text = f"{found[last]} {comment['text'].strip()}"
            found = {k: text if v == found[last] else v for k, v in found.items()}
        elif line.strip():
            last = ""
        above = line[2:].strip() if line.startswith("# ") and line.endswith(":") else ""
    return found
