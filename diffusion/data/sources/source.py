"""Where images come from: a path of the user's -> a source, which hands out its entries one by one.

An entry is a key, a split, perhaps a label, and a way to read its bytes; a source lists its entries in an order that
depends on its content alone, and can begin anywhere in it. Sources read; they decode no image, extract nothing to
disk and unpickle nothing (`sources_cifar` says how it reads pickles). What is no source at all is refused by name.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

MOST_CLASSES = 1_000_000  # a label beyond is a mistake
SHOWN = 40  # characters of a name in a message
KEY_LENGTH = 60  # characters of a name that become part of a key: a tar header holds 100


class BadEntry(ValueError):
    """One entry of a source cannot be used; the message says why, the caller says which."""


class Entry(NamedTuple):
    """One image of a source.

    Attributes:
        place: where `entries` begins with this entry again.
        key: its name in the source; unique there.
        split: `train`, `validation` or `test`.
        label: its class, None in a source without.
        read: its encoded bytes, or pixels uint8 (H, W, C); BadEntry when they cannot be had. To be called before the
            next entry is asked for.
    """

    place: int | bytes
    key: str
    split: str
    label: int | None
    read: Callable[[], bytes | np.ndarray]


class Source(Protocol):
    """A finite list of entries that can be walked through from any place, also in processes forked later.

    Attributes:
        kind: what it is, in words, for the person at the terminal.
        classes: names of the classes in the order of their numbers; () without labels.
        ignored: files that are no images by their names, or cannot be read as files, with the reason in brackets.
    """

    kind: str
    classes: tuple[str, ...]
    ignored: list[str]

    def entries(self, start: int | bytes | None = None) -> Iterator[Entry]:
        """The entries from a place on (None: all), always in the same order."""


def safe_key(name: str) -> str:
    """A name -> letters, digits, `_` and `-`, at most 60 of them: part of a sample's key, never a path."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(name)[0])[-KEY_LENGTH:]


def shown(name: str) -> str:
    """A name from a source as a person may see it: at most 40 characters, none that a terminal would obey."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: SHOWN + 1])
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def key_hash(key: str, purpose: bytes) -> int:
    """64 bits of a key, the same everywhere; independent between purposes."""
    name = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=purpose).digest(), "little")


def labels_of(path: str, data: bytes) -> dict[str, int | str] | None:
    """A file of labels -> name: label. JSON as EDM's and StyleGAN's dataset.json, {"labels": [[name, label], ...]}, or
    {name: label}; else CSV, a name and a label in a row. None where a dataset.json has no labels.

    Raises:
        ValueError: it is neither.
    """
    try:
        text = data.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            content = json.loads(text)
            content = content["labels"] if isinstance(content, dict) and "labels" in content else content
            if content is None:
                return None
            rows = list(content.items()) if isinstance(content, dict) else content
        else:
            rows = [row[:2] for row in csv.reader(text.splitlines()) if row]
        found = {name: label for name, label in rows}
    except (ValueError, TypeError, csv.Error, RecursionError) as error:
        raise ValueError(f"labels_from={path}: it is not name and label, in JSON or CSV ({error}).") from error
    for name, label in found.items():
        if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"labels_from={path}: the label {label!r} of {name!r} is neither an integer nor a name.")
    return found
