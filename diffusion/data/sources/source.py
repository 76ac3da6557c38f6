"""The interface of sources of images. A source is opened from a path and yields its entries one by one.

An entry has a key, a split, optionally a label, and a function that reads its bytes. A source yields its entries in an
order that depends on its content only, and can start at any entry. Sources only read: they decode no image, extract
nothing to disk and unpickle nothing (`sources.cifar` describes how it reads pickles).
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

MOST_CLASSES = 1_000_000  # labels must be below this number
SHOWN = 40  # largest number of characters of a name in a message
KEY_LENGTH = 60  # largest number of characters of a name in a key; a tar header holds 100


class BadEntry(ValueError):
    """One entry of a source cannot be used. The message says why; the caller adds which one."""


class Entry(NamedTuple):
    """One image of a source.

    Attributes:
        place: the argument of `entries` that starts with this entry.
        key: its unique name in the source.
        split: `train`, `validation` or `test`.
        label: number of its class; None in a source without labels.
        read: returns its encoded bytes, or pixels uint8 (H, W, C). It raises BadEntry if they cannot be read. Call it
            before requesting the next entry.
    """

    place: int | bytes
    key: str
    split: str
    label: int | None
    read: Callable[[], bytes | np.ndarray]


class Source(Protocol):
    """A finite sequence of entries that can be iterated from any place, also in processes forked later.

    Attributes:
        kind: a description for the user.
        classes: names of the classes in the order of their numbers; () without labels.
        ignored: files whose names are not those of images, or which cannot be read as files, with the reason in
            brackets.
    """

    kind: str
    classes: tuple[str, ...]
    ignored: list[str]

    def entries(self, start: int | bytes | None = None) -> Iterator[Entry]:
        """The entries from a place on (None: all entries), always in the same order."""


def safe_key(name: str) -> str:
    """A name without its extension, reduced to letters, digits, `_` and `-`, and to its last 60 characters.

    It becomes part of the key of a sample, and can never be a path.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(name)[0])[-KEY_LENGTH:]


def shown(name: str) -> str:
    """A name from a source for display: at most 40 characters, with control characters escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[: SHOWN + 1])
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def key_hash(key: str, purpose: bytes) -> int:
    """A 64-bit hash of a key, the same on every machine, and independent between purposes."""
    name = key.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, person=purpose).digest(), "little")


def labels_of(path: str, data: bytes) -> dict[str, int | str] | None:
    """Parse a file of labels into a dict of name -> label. None if a dataset.json has no labels.

    A .json file is the dataset.json of EDM and StyleGAN, {"labels": [[name, label], ...]}, or {name: label}. Any other
    file is CSV, with a name and a label per row.

    Raises:
        ValueError: it has neither format.
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
        raise ValueError(
            f"labels_from={path} must be JSON or CSV with a name and a label for each image ({error})."
        ) from error
    for name, label in found.items():
        if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"labels_from={path}: the label {label!r} of {name!r} is neither an integer nor text.")
    return found
