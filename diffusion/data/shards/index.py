"""The format of a data set on disk: WebDataset tars, described by one `index.json`.

    root/index.json                  format version, name, image size, channels, classes, and the shards of all splits
    root/train-00000.tar             an ordinary WebDataset tar: key.png|jpg|webp|npy and key.cls|json
    root/train-00000.tar.offsets     the offsets of the members of every sample, so that the tar need not be scanned
    root/train-00000.tar.xxh3        the digest of every sample, so that a changed sample is detected when it is read

An offsets file has four little-endian uint64 per sample: offset and size of the image, offset and size of the label
(0, 0 without a label). A digests file has one little-endian uint64 per sample: the `sample_digest` of its bytes. Sets
of earlier versions have no digests files. Digests are not part of `Index.digest`, and index.json lists them separately
from the shards, so that earlier versions can read the set too.

The folder may be remote (`remote`); then only the index is read here. This module can find the bytes of a sample. It
does not know what they mean or in which order they are used, and imports neither torch nor webdataset.
"""

import hashlib
import json
import os
import re
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from diffusion.data.shards.remote import PATIENT, Access, address, is_remote
from diffusion.errors import Refusal
from diffusion.files import replacing

VERSION = 2
INDEX_NAME = "index.json"
OFFSETS_SUFFIX, DIGESTS_SUFFIX = ".offsets", ".xxh3"
OFFSETS_ROW = np.dtype(("<u8", 4))  # image offset, image size, label offset, label size, in bytes
DIGESTS_ROW = np.dtype("<u8")
DIGESTS = "sample_digests"  # key of index.json: sha256 of the digests file, by the path of its shard


class MissingData(ValueError):
    """There is no data set at `data.root`. The message says how to create it."""


def sample_digest(image: bytes, label: bytes = b"") -> int:
    """The digest of a sample: xxh3_64 of the bytes of its image followed by those of its label."""
    return xxh3_64_intdigest(image + label if label else image)


def shard_files(path: str) -> tuple[str, str, str]:
    """The names of a tar, of its offsets file and of its digests file."""
    return path, path + OFFSETS_SUFFIX, path + DIGESTS_SUFFIX


@dataclass(frozen=True)
class Shard:
    """One tar of a data set.

    path: path relative to the root.
    split: its split.
    samples: number of samples.
    bytes: size in bytes.
    sha256, offsets_sha256, digests_sha256: sha256 of the tar, of its offsets file and of its digests file; the last is
        None in a set without digests.
    """

    path: str
    split: str
    samples: int
    bytes: int
    sha256: str
    offsets_sha256: str
    digests_sha256: str | None = None

    @property
    def files(self) -> tuple[tuple[str, int, str], ...]:
        """Path below the root, size in bytes and sha256 of the tar, of its offsets and of its digests file, if any."""
        tar, offsets, digests = shard_files(self.path)
        files = (tar, self.bytes, self.sha256), (offsets, self.samples * OFFSETS_ROW.itemsize, self.offsets_sha256)
        if self.digests_sha256 is None:
            return files
        return *files, (digests, self.samples * DIGESTS_ROW.itemsize, self.digests_sha256)

    @property
    def record(self) -> dict[str, str | int]:
        """All fields except digests_sha256: they determine the samples, and the digests follow from them."""
        return {key: value for key, value in asdict(self).items() if key != "digests_sha256"}


def held_out_from(splits: Sequence[str], split: str) -> str | None:
    """The split of held-out images when `split` is the training split: validation, or else test, or else None."""
    return next((other for other in ("validation", "test") if other in splits and other != split), None)


def check_splits(splits: Sequence[str], of: str, split: str, held_out: str | None = None) -> None:
    """Check the splits for training and for the held-out loss.

    Args:
        splits: the splits of the set.
        of: the set, for messages, like "the set in data.root=sets/a".
        split: the setting data.split.
        held_out: the setting held_out.split, or None.

    Raises:
        Refusal: the set does not have one of these splits, or both are the same.
    """
    for key, wanted in {"data.split": split, "held_out.split": held_out}.items():
        if wanted is not None and wanted not in splits:
            raise Refusal(f"{key}={wanted} is not a split of {of}, which has {', '.join(splits)}.")
    if held_out == split:
        raise Refusal(f"held_out.split={split} is the training split (data.split). Give another split, or null.")


@dataclass(frozen=True)
class Index:
    """A data set of square images with side `image_size`, `channels` channels and `classes` classes (0: no labels).

    The root is a folder, or a URL (`remote.SCHEMES`).
    """

    root: Path | str
    name: str
    image_size: int
    channels: int
    classes: int
    shards: tuple[Shard, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, in the order of their first shard."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split. Raises ValueError if there are none."""
        shards = tuple(shard for shard in self.shards if shard.split == split)
        if not shards:
            raise ValueError(
                f"data.split={split} is not a split of data.root={self.root}. Give one of {', '.join(self.splits)}."
            )
        return shards

    def held_out_from(self, split: str) -> str | None:
        """The split of held-out images when `split` is the training split: validation, or else test, or else None."""
        return held_out_from(self.splits, split)

    def count(self, split: str) -> int:
        """Number of samples of a split."""
        return sum(shard.samples for shard in self.of_split(split))

    @property
    def digest(self) -> str:
        """The digest that identifies this set: a sha256 over the records of its shards, which include their sha256."""
        text = json.dumps([self.image_size, self.channels, self.classes, [shard.record for shard in self.shards]])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def content(self) -> str:
        """The key under which derived data, such as features, are stored.

        It is the digest of the set, combined with its sample digests if it has them. In that case the sample digests
        decide which bytes are valid, not the sha256 of the tars. Without them in the key, a set with a copied index
        could use the features of another set.
        """
        digests = [shard.digests_sha256 for shard in self.shards]
        if None in digests:
            return self.digest
        return hashlib.sha256(json.dumps([self.digest, digests]).encode()).hexdigest()

    def path(self, shard: Shard) -> Path:
        """Path of a shard's tar file (local data sets only)."""
        return self.root / shard.path

    def offsets(self, shard: Shard) -> np.ndarray:
        """The offsets of a shard: uint64 (samples, 4) (local data sets only)."""
        return offsets_of(Path(f"{self.path(shard)}{OFFSETS_SUFFIX}").read_bytes())

    def digests(self, shard: Shard) -> array:
        """The digests of the samples of a shard (local data sets with digests only)."""
        return digests_of(Path(f"{self.path(shard)}{DIGESTS_SUFFIX}").read_bytes())


def offsets_of(data: bytes) -> np.ndarray:
    """The content of an offsets file: uint64 (samples, 4). Raises ValueError unless it consists of whole rows."""
    return np.frombuffer(data, OFFSETS_ROW)


def digests_of(data: bytes) -> array:
    """The content of a digests file as an `array`, whose elements are accessed faster than those of a NumPy array."""
    digests = array("Q", data)
    if sys.byteorder == "big":
        digests.byteswap()
    return digests


def read_index(root: str | os.PathLike, make: str | None = None, access: Access = PATIENT) -> Index:
    """Read the index of the data set in `root`, and check that all files exist and have the right sizes.

    The contents of the files are checked when they are used (`shards`). For a remote set only the index is read.

    Args:
        root: the folder with `index.json`, or a URL (the setting `data.root`).
        make: the command that creates this data set, for the message when it is missing.
        access: timeout and attempts for reading a remote index.

    Raises:
        MissingData: the folder, the index or a file that the index names is missing.
        ValueError: the index has another version or is damaged, a file has another size, or a remote index cannot be
            read.
    """
    cure = f" Make it with: {make}" if make else " Make it with `python -m diffusion.prepare`, or set data.root."
    if is_remote(root):
        return _parsed(root, access.read(address(root, INDEX_NAME)), cure)
    root = Path(root)
    file = root / INDEX_NAME
    if not file.is_file():
        seen = f"has no {INDEX_NAME}" if root.is_dir() else "does not exist"
        raise MissingData(f"data.root={root}: data set not found, the folder {seen}.{cure}")
    index = _parsed(root, file.read_bytes(), cure)
    _check_files(index, cure)
    return index


def _parsed(root: Path | str, text: bytes, cure: str) -> Index:
    """Parse the text of index.json."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.root={root}: {INDEX_NAME} is not JSON ({error}).{cure}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(f"data.root={root}: {INDEX_NAME} has format version {version}, expected {VERSION}.{cure}")
    try:
        digests = content.get(DIGESTS, {})
        assert isinstance(digests, dict), DIGESTS
        shards = tuple(Shard(**shard, digests_sha256=digests.get(shard["path"])) for shard in content["shards"])
        index = Index(root, content["name"], content["image_size"], content["channels"], content["classes"], shards)
        _check_values(index)
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"data.root={root}: {INDEX_NAME} is damaged ({error!r}).{cure}") from None
    return index


def _check_files(index: Index, cure: str) -> None:
    """Raise MissingData or ValueError unless all files that the index names exist and have the right sizes."""
    for name, size, _ in (file for shard in index.shards for file in shard.files):
        try:
            found = (index.root / name).stat().st_size
        except FileNotFoundError:
            raise MissingData(f"data.root={index.root}: {name}, listed in {INDEX_NAME}, is missing.{cure}") from None
        except OSError as error:
            what = f"{name[:100]}, listed in {INDEX_NAME}, cannot be read ({error.strerror})"
            raise ValueError(f"data.root={index.root}: {what}.{cure}") from None
        if found != size:
            raise ValueError(
                f"data.root={index.root}: shard file {name} has {found} bytes, but {INDEX_NAME} states {size}: it was "
                f"truncated or replaced.{cure}"
            )


def write_index(index: Index) -> None:
    """Write `index.json` to the root of the index, atomically. Write it after all other files."""
    _check_values(index)
    content = {"version": VERSION} | {f.name: getattr(index, f.name) for f in fields(index) if f.name != "root"}
    content["shards"] = [shard.record for shard in index.shards]
    if digests := {shard.path: shard.digests_sha256 for shard in index.shards if shard.digests_sha256}:
        content[DIGESTS] = digests
    with replacing(index.root / INDEX_NAME) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _check_values(index: Index) -> None:
    """Raise AssertionError unless the values of an index are valid. The path of a shard must be below the root."""

    def need(holds: bool, what: str) -> None:  # python -O removes `assert`
        if not holds:
            raise AssertionError(what)

    def count(value: Any, lowest: int) -> bool:
        return type(value) is int and lowest <= value < 1 << 62

    need(isinstance(index.name, str), "name")
    for key, lowest in (("image_size", 1), ("channels", 1), ("classes", 0)):
        need(count(getattr(index, key), lowest), key)
    need(bool(index.shards), "no shards")
    for shard in index.shards:
        need(isinstance(shard.path, str), "path of a shard")
        path = PurePosixPath(shard.path)
        need(not path.is_absolute() and ".." not in path.parts and "\0" not in shard.path, f"path {shard.path}")
        need(count(shard.samples, 1), f"samples of {shard.path}")
        need(count(shard.bytes, 1), f"bytes of {shard.path}")
        need(isinstance(shard.split, str), f"split of {shard.path}")
        digests = (shard.sha256, shard.offsets_sha256, shard.digests_sha256)
        for digest in digests[: 2 if shard.digests_sha256 is None else 3]:
            sound = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
            need(sound, f"sha256 of {shard.path}")
