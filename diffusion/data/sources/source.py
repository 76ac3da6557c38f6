"""Where images come from: a path of the user's -> a source, which hands out its entries one by one.

An entry is a key, a split, perhaps a label, and a way to read its bytes; a source lists its entries in an order that
depends on its content alone, and can begin anywhere in it. Sources read; they decode no image, extract nothing to
disk and unpickle nothing (`sources_cifar` says how it reads pickles). What is no source at all is refused by name.
"""

import csv
import gzip
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
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


def open_source(path: str | os.PathLike, labels_from: str = "auto", max_bytes: int = 1 << 29) -> Source:
    """The source that a path is: told by what is there, not by its name.

    Args:
        path: an LMDB as LSUN distributes it; a CIFAR-10 archive, python or binary, .tar.gz or unpacked; an .npz; a
            folder, .zip or .tar of images.
        labels_from: `auto` (dataset.json, else folders), `none`, `folders`, or a JSON or CSV file; for files of images.
        max_bytes: an encoded image may have, at most.

    Raises:
        ValueError: nothing is there, or it is none of these, or damaged, or empty.
    """
    from diffusion.data.sources.arrays import ArraySource, npz_arrays
    from diffusion.data.sources.cifar import cifar_source
    from diffusion.data.sources.files import FileSource
    from diffusion.data.sources.lmdb_folder import LmdbSource
    from diffusion.data.sources.members import FolderMembers, TarMembers, ZipMembers
    from diffusion.data.sources.tar import DamagedTar, begins_as_tar, compression_of

    path = Path(path)
    if path.name == "data.mdb":
        path = path.parent
    if not path.exists():
        raise ValueError(f"source={path}: there is no such file or folder. Give a path, or source=digits.")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"source={path} is neither a file nor a folder.")
    try:
        if path.is_dir():
            if (path / "data.mdb").is_file():
                return LmdbSource(path, max_bytes)
            return cifar_source(path) or FileSource(FolderMembers(path), labels_from, max_bytes)
        if begins_as_tar(path):  # before zips, which are known by their ends: a tar may end in one
            return cifar_source(path) or FileSource(TarMembers(path), labels_from, max_bytes)
        if zipfile.is_zipfile(path):
            arrays = npz_arrays(path)
            return ArraySource(*arrays) if arrays else FileSource(ZipMembers(path), labels_from, max_bytes)
        if by := compression_of(path):
            raise ValueError(f"source={path} is compressed by {by}: unpack it first.")
    except (DamagedTar, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"source={path} is damaged or truncated: {error}. Download it again.") from error
    except OSError as error:
        raise ValueError(f"source={path} cannot be read: {error}.") from error
    raise ValueError(
        f"source={path} is neither an LMDB (a folder with data.mdb), nor a folder, .zip or .tar of images, nor an "
        f".npz, nor a CIFAR-10 archive; if it is a download, it may be cut off."
    )


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
