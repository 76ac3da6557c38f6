"""What a data set on disk is: WebDataset tars and one `index.json` that describes them.

    root/index.json                  format version, name, image size, channels, classes, and the shards of all splits
    root/train-00000.tar             an ordinary WebDataset tar: key.png|jpg|webp|npy and key.cls|json
    root/train-00000.tar.offsets     where the members of every sample lie in it, so that nothing needs scanning
    root/train-00000.tar.xxh3        the digest of every sample, so that a changed one is noticed when it is read

An offsets file is a row of four little-endian uint64 per sample: offset and size of the image, offset and size of the
label (0, 0 without one). A digests file is one little-endian uint64 per sample: `sample_digest` of its bytes. Sets made
before there were digests have no such files. The digests are no part of what a set is recognised by (`Index.digest`),
and in index.json they stand apart from the shards, so that older programs read the set as well.

The folder may be a remote one (`remote`), of which the index alone is read here. This module reads the index and knows
how to find a sample's bytes; it knows neither their meaning nor the order they are used in, and imports neither torch
nor webdataset.
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
    """There is no data set where `data.root` points; the message says how to make it."""


def sample_digest(image: bytes, label: bytes = b"") -> int:
    """The digest of a sample: xxh3_64 of the bytes of its image, followed by those of its label."""
    return xxh3_64_intdigest(image + label if label else image)


def shard_files(path: str) -> tuple[str, str, str]:
    """The names of a tar, of its offsets and of its digests."""
    return path, path + OFFSETS_SUFFIX, path + DIGESTS_SUFFIX


@dataclass(frozen=True)
class Shard:
    """One tar: path relative to the root, split, number of samples, size in bytes, sha256 of it, of its offsets and of
    its digests; the last is None in a set that has none."""

    path: str
    split: str
    samples: int
    bytes: int
    sha256: str
    offsets_sha256: str
    digests_sha256: str | None = None

    @property
    def files(self) -> tuple[tuple[str, int, str], ...]:
        """Name below the root, size in bytes and sha256 of the tar, of its offsets and, where it has them, digests."""
        tar, offsets, digests = shard_files(self.path)
        files = (tar, self.bytes, self.sha256), (offsets, self.samples * OFFSETS_ROW.itemsize, self.offsets_sha256)
        if self.digests_sha256 is None:
            return files
        return *files, (digests, self.samples * DIGESTS_ROW.itemsize, self.digests_sha256)

    @property
    def record(self) -> dict[str, str | int]:
        """What decides which samples it holds: all but the digests, which follow from it."""
        return {key: value for key, value in asdict(self).items() if key != "digests_sha256"}


def held_out_from(splits: Sequence[str], split: str) -> str | None:
    """The split whose images nobody trains on when this one is trained on: validation or else test; None if there is
    neither."""
    return next((other for other in ("validation", "test") if other in splits and other != split), None)


def check_splits(splits: Sequence[str], of: str, split: str, held_out: str | None = None) -> None:
    """Refuse a split that a set does not have, and to hold out what is trained on.

    Args:
        splits: that it has. of: the set, as "the set in data.root=sets/a".
        split: of the setting data.split. held_out: of held_out.split; None: it is not chosen.
    """
    for key, wanted in {"data.split": split, "held_out.split": held_out}.items():
        if wanted is not None and wanted not in splits:
            raise Refusal(f"{key}={wanted} is not a split of {of}, which has {', '.join(splits)}.")
    if held_out == split:
        raise Refusal(f"held_out.split={split} is the split that is trained on: give another one, or null.")


@dataclass(frozen=True)
class Index:
    """A data set: square images of `image_size` pixels and `channels` channels, `classes` labels (0: unlabelled).

    The root is a folder, or a remote one's URL (`remote.SCHEMES`).
    """

    root: Path | str
    name: str
    image_size: int
    channels: int
    classes: int
    shards: tuple[Shard, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are, in the order of their first shard."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split; ValueError when there are none."""
        shards = tuple(shard for shard in self.shards if shard.split == split)
        if not shards:
            raise ValueError(
                f"data.split={split} is not a split of data.root={self.root}, which has {', '.join(self.splits)}."
            )
        return shards

    def held_out_from(self, split: str) -> str | None:
        """`held_out_from` of its splits."""
        return held_out_from(self.splits, split)

    def count(self, split: str) -> int:
        """Number of samples of a split."""
        return sum(shard.samples for shard in self.of_split(split))

    @property
    def digest(self) -> str:
        """What tells this set from any other: a sha256 over the shards' own and what the index says of them."""
        text = json.dumps([self.image_size, self.channels, self.classes, [shard.record for shard in self.shards]])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def content(self) -> str:
        """What is kept of the images, outside of the set or beside it, is kept under this: the digest of the set, and
        of its samples' digests where it has them, for then these decide which bytes are sound, and not the sha256 of
        the tars. Else a set with another's index could leave its features to be found by the other."""
        digests = [shard.digests_sha256 for shard in self.shards]
        if None in digests:
            return self.digest
        return hashlib.sha256(json.dumps([self.digest, digests]).encode()).hexdigest()

    def path(self, shard: Shard) -> Path:
        """Where the tar of a set that is on this machine is."""
        return self.root / shard.path

    def offsets(self, shard: Shard) -> np.ndarray:
        """Where the shard's samples lie: uint64 (samples, 4), of a set that is on this machine."""
        return offsets_of(Path(f"{self.path(shard)}{OFFSETS_SUFFIX}").read_bytes())

    def digests(self, shard: Shard) -> array:
        """The digests of the shard's samples, of a set that is on this machine and has them."""
        return digests_of(Path(f"{self.path(shard)}{DIGESTS_SUFFIX}").read_bytes())


def offsets_of(data: bytes) -> np.ndarray:
    """The content of an offsets file: uint64 (samples, 4). ValueError unless it is made of whole rows."""
    return np.frombuffer(data, OFFSETS_ROW)


def digests_of(data: bytes) -> array:
    """The content of a digests file as an array of integers, which is looked up faster than NumPy's."""
    digests = array("Q", data)
    if sys.byteorder == "big":
        digests.byteswap()
    return digests


def read_index(root: str | os.PathLike, make: str | None = None, access: Access = PATIENT) -> Index:
    """The index of the data set in `root`, after checking that its files are there and have the sizes it states.

    Contents are not read: that they are as recorded is seen when they are used (`shards`). Of a remote set only the
    index is read.

    Args:
        root: the folder with `index.json`, or a remote one (the setting `data.root`).
        make: the command that makes this data set, for the message when it is missing.
        access: how patiently to read a remote index.

    Raises:
        MissingData: no folder, no index in it, or a file named by the index is not there.
        ValueError: not an index of this version, or a file's size differs from what the index states; a remote index
            that cannot be read.
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
    """The index that the text of index.json describes."""
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
    """MissingData or ValueError unless all files that the index names are there with their sizes."""
    for name, size, _ in (file for shard in index.shards for file in shard.files):
        try:
            found = (index.root / name).stat().st_size
        except FileNotFoundError:
            raise MissingData(f"data.root={index.root}: {name}, named by {INDEX_NAME}, is missing.{cure}") from None
        except OSError as error:
            what = f"{name[:100]}, named by {INDEX_NAME}, cannot be looked at ({error.strerror})"
            raise ValueError(f"data.root={index.root}: {what}.{cure}") from None
        if found != size:
            raise ValueError(
                f"data.root={index.root}: shard file {name} has {found} bytes where {INDEX_NAME} states {size}: "
                f"it is truncated or was replaced.{cure}"
            )


def write_index(index: Index) -> None:
    """Write `index.json` at the index's root, atomically: it is there whole or not at all, and it comes last."""
    _check_values(index)
    content = {"version": VERSION} | {f.name: getattr(index, f.name) for f in fields(index) if f.name != "root"}
    content["shards"] = [shard.record for shard in index.shards]
    if digests := {shard.path: shard.digests_sha256 for shard in index.shards if shard.digests_sha256}:
        content[DIGESTS] = digests
    with replacing(index.root / INDEX_NAME) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _check_values(index: Index) -> None:
    """AssertionError unless an index fulfils what every one does; a shard lies below the root, whatever the file
    says."""

    def need(holds: bool, what: str) -> None:  # an `assert` is left out by python -O
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
