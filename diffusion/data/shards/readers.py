"""Open shards: reading bytes of a tar by their offset, the offsets of its samples, and detection of changes.

On a local or mounted file system a shard is read in place. A remote shard is downloaded completely when it is first
needed, and read from a local cache (`remote`).

A shard that changes while it is in use is detected (`DataChanged`):

    sets with digests         every sample that is read must match its digest
    sets without              the whole tar must match its sha256 when it is first opened; after each read its signature
                              (`changes`) must be unchanged
    both, in a local folder   `glance` checks the signatures of all opened shards, at most once per second, even if
                              decoded images are cached and nothing is read; `look` checks those of all shards

If a signature has changed, the content is compared. Offsets and digests are read when a shard is opened, and must match
their sha256. This module knows no images.
"""

import hashlib
import os
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from diffusion.data.shards.changes import GONE, DataChanged, Known, shared
from diffusion.data.shards.index import INDEX_NAME, Index, Shard, digests_of, offsets_of, sample_digest
from diffusion.data.shards.remote import FileCache, Prefetcher, address

TOUCHED = 2.0  # seconds after which a cached shard in use is marked as used again
LOOKED = 1.0  # seconds between two glances, for all processes of a rank together
GLANCE = 500  # largest number of shards that are checked in one glance
PROBES = 16  # samples that are checked to distinguish a replaced shard from a damaged sample
CURE = "Restore that file: copy it back, or remove it and prepare the set again. Then run the same command."


class ShardReader(Protocol):
    """An open shard.

    offsets: uint64 (samples, 4): offset and size of the image, offset and size of the label.
    digests: the digest of each sample, or None.
    """

    offsets: np.ndarray
    digests: array | None

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""

    def unchanged(self) -> bool:
        """Whether the file is the one whose content was checked."""

    def close(self) -> None:
        """Close the file."""


class Shards(Protocol):
    """Opens the shards of a data set and detects changes."""

    def open(self, shard: Shard) -> ShardReader:
        """Open a shard. Raises OSError or ValueError if that fails, and DataChanged if it differs from the index."""

    def announce(self, shards: list[Shard]) -> None:
        """Announce the shards that will be opened soon, in the order in which they are needed."""

    def wrong(self, shard: Shard, afresh: bool = False) -> DataChanged | None:
        """Compare the content of a shard with the index. Returns an error, or None if it is valid.

        If it is valid, the caller must open it again. `afresh` reads all of it, even if its signature is unchanged.
        """

    def glance(self) -> None:
        """Check the shards in use. It is cheap; call it often. Raises DataChanged."""

    def look(self, shards: Iterable[Shard], unopened: bool) -> None:
        """Check these shards. `unopened`: also those that have not been opened. Raises DataChanged."""


def changed(index: Index, name: str, found: str, whole: bool = True) -> DataChanged:
    """The error for a file of the set that differs from the index. `found` is a clause that says how."""
    return DataChanged(f"data.root={index.root}: shard {name} has changed: {found}. {CURE}", whole)


def named(shard: Shard, offsets: np.ndarray, place: int, read: Callable[[int, int], bytes]) -> str:
    """The name of a sample for a message: its number in the shard, and its file name in the tar."""
    header = max(int(offsets[place][0]) - 512, 0)
    name = read(header, 100).split(bytes(1))[0].decode(errors="replace") if header < shard.bytes else ""
    return f"sample {place}" + (f" ({name!r})" if name else "")


def differing(shard: Shard, reader: ShardReader, places: Iterable[int], read: Callable[[int, int], bytes]) -> list[int]:
    """Those of the samples at these places that do not match their digests."""
    found = []
    for place in places:
        at, size, label_at, label_size = reader.offsets[place].tolist()
        inside = at + size <= shard.bytes and label_at + label_size <= shard.bytes
        if not inside or sample_digest(read(at, size), read(label_at, label_size)) != reader.digests[place]:
            found.append(place)
    return found


def wrong_samples(
    index: Index, shard: Shard, reader: ShardReader, places: Sequence[int], read: Callable[[int, int], bytes]
) -> DataChanged | None:
    """The error if some or all of these samples do not match their digests; None if all of them match."""
    found = differing(shard, reader, places, read)
    if not found:
        return None
    what = "the digest recorded when the set was created"
    if len(found) == len(places) > 1:
        return changed(index, shard.path, f"its samples do not match {what}")
    return changed(index, shard.path, f"{named(shard, reader.offsets, found[0], read)} does not match {what}", False)


def wrong_sample(index: Index, shard: Shard, reader: ShardReader, place: int) -> DataChanged:
    """The error for a sample that does not match its digest: the sample is damaged, or its shard was replaced."""
    step = max(shard.samples // PROBES, 1)
    others = wrong_samples(index, shard, reader, range(place % step, shard.samples, step), reader.read)
    if others is not None and others.whole:
        return others
    return wrong_samples(index, shard, reader, [place], reader.read) or others


def table(data: bytes, sha256: str) -> bytes | None:
    """The content of a file of offsets or digests if it matches its sha256, else None."""
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


class LocalShards:
    """The shards of a data set in a folder.

    Args:
        index: index of the set.
        tolerant: a shard with some damaged samples is not an error; each of them is an error when it is read.
    """

    def __init__(self, index: Index, tolerant: bool = False) -> None:
        self.index, self.tolerant = index, tolerant
        self._numbers = {shard.path: number for number, shard in enumerate(index.shards)}
        self._known = Known(len(index.shards))
        self._glanced, self._next = shared(np.float64, 1), 0

    def open(self, shard: Shard) -> "LocalShard":
        return LocalShard(self, shard)

    def announce(self, shards: list[Shard]) -> None:
        """Do nothing: the operating system reads ahead."""

    def recognises(self, shard: Shard, *found: os.stat_result) -> bool:
        """Whether this is the file whose content was checked or, with digests, the file that was opened first."""
        return self._known.recognises(self._numbers[shard.path], *found)

    def note(self, shard: Shard, found: os.stat_result) -> None:
        """Note the signature of a shard with digests. Its content need not be checked: each read compares a digest."""
        self._known.note(self._numbers[shard.path], found)

    def wrong(self, shard: Shard, afresh: bool = False) -> DataChanged | None:
        """As `Shards.wrong`. Raises OSError if the file exists but cannot be read."""

        def complaint(descriptor: int) -> DataChanged | None:
            size = os.fstat(descriptor).st_size
            if size != shard.bytes:
                return changed(self.index, shard.path, f"it has {size} bytes, but {INDEX_NAME} states {shard.bytes}")
            if shard.digests_sha256 is None:
                return self._other_sha256(shard, descriptor)
            return self._other_samples(shard, descriptor)

        sha256 = shard.sha256 if shard.digests_sha256 is None else None
        try:
            number = self._numbers[shard.path]
            return self._known.check(number, self.index.path(shard), complaint, sha256, afresh)
        except GONE:
            return self.gone(shard.path)

    def gone(self, name: str) -> DataChanged:
        """The error for a missing file of the set."""
        return changed(self.index, name, "the file is missing")

    def _other_sha256(self, shard: Shard, descriptor: int) -> DataChanged | None:
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return None
        return changed(self.index, shard.path, f"it does not match the sha256 in {INDEX_NAME}")

    def _other_samples(self, shard: Shard, descriptor: int) -> DataChanged | None:
        """The error if samples do not match their digests; if `tolerant`, only if no sample does."""
        read = lambda offset, size: os.pread(descriptor, size, offset)  # noqa: E731
        wrong = wrong_samples(self.index, shard, Tables(self, shard), range(shard.samples), read)
        return None if wrong is None or self.tolerant and not wrong.whole else wrong

    def glance(self) -> None:
        """Check the opened shards, unless they were checked within the last second."""
        now = time.monotonic()
        if now - self._glanced[0] < LOOKED:
            return
        self._glanced[0] = now
        noted = self._known.noted()
        if len(noted) > GLANCE:
            noted, self._next = np.roll(noted, -self._next)[:GLANCE], (self._next + GLANCE) % len(noted)
        self.look([self.index.shards[number] for number in noted.tolist()], unopened=False)

    def look(self, shards: Iterable[Shard], unopened: bool) -> None:
        """As `Shards.look`. If the file system reports another error, the next read will raise it."""
        noted = set(self._known.noted().tolist())
        for shard in shards:
            number = self._numbers[shard.path]
            if number not in noted and not unopened:
                continue
            try:
                found = os.stat(self.index.path(shard))
                if number not in noted and found.st_size == shard.bytes:
                    continue
                if self._known.recognises(number, found) and not self._known.due(number):
                    continue
                wrong = self.wrong(shard)
            except GONE:
                wrong = self.gone(shard.path)
            except OSError:
                continue
            if wrong is not None:
                raise wrong


class Tables:
    """The offsets and the digests of a shard in a folder."""

    def __init__(self, shards: LocalShards, shard: Shard) -> None:
        found = []
        for name, _, sha256 in shard.files[1:]:
            try:
                data = table((Path(shards.index.root) / name).read_bytes(), sha256)
            except GONE:
                raise shards.gone(name) from None
            if data is None:
                raise changed(shards.index, name, f"it does not match the sha256 in {INDEX_NAME}")
            found.append(data)
        self.offsets = offsets_of(found[0])
        self.digests = digests_of(found[1]) if len(found) > 1 else None


class LocalShard:
    """A shard on a local or mounted file system. Forked processes can share it, because `pread` needs no position."""

    def __init__(self, shards: LocalShards, shard: Shard) -> None:
        self._shards, self._shard, self._path = shards, shard, shards.index.path(shard)
        tables = Tables(shards, shard)
        self.offsets, self.digests = tables.offsets, tables.digests
        try:
            self._file = os.open(self._path, os.O_RDONLY)
        except GONE:
            raise shards.gone(shard.path) from None
        self._closed = weakref.finalize(self, os.close, self._file)
        if self.digests is not None:
            shards.note(shard, os.fstat(self._file))
        elif not self.unchanged() and (wrong := shards.wrong(shard)):
            self.close()
            raise wrong

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""
        return os.pread(self._file, size, offset)

    def unchanged(self) -> bool:
        """Whether the open file and the file at its path are the one that was checked."""
        try:
            return self._shards.recognises(self._shard, os.fstat(self._file), os.stat(self._path))
        except GONE:
            return False

    def close(self) -> None:
        """Close the file. It is also closed when this object is deleted."""
        self._closed()


class CachedShards:
    """The shards of a remote data set, in a local cache. A copy that has changed is downloaded again.

    Args:
        index: index of the set, whose root is remote.
        cache: the cache of the files.
    """

    def __init__(self, index: Index, cache: FileCache) -> None:
        self.index, self.cache, self._prefetcher = index, cache, Prefetcher(cache)
        self._numbers = {shard.path: number for number, shard in enumerate(index.shards)}
        self._known = Known(len(index.shards))

    def open(self, shard: Shard) -> "CachedShard":
        return CachedShard(self, shard)

    def announce(self, shards: list[Shard]) -> None:
        """Download these shards in the background."""
        self._prefetcher.want([file for shard in shards for file in self.files(shard)])

    def files(self, shard: Shard) -> list[tuple[str, int, str]]:
        """Address, size and sha256 of the files of a shard."""
        return [(address(self.index.root, name), size, sha256) for name, size, sha256 in shard.files]

    def recognises(self, shard: Shard, *found: os.stat_result) -> bool:
        """Whether this is the copy whose content was checked."""
        return self._known.recognises(self._numbers[shard.path], *found)

    def wrong(self, shard: Shard, afresh: bool = False) -> DataChanged | None:
        """As `Shards.wrong`. A copy that does not match its sha256 is removed and downloaded again.

        Raises:
            Unreachable: it cannot be downloaded, or the file on the server has changed.
        """
        tar = self.files(shard)[0]

        def complaint(descriptor: int) -> DataChanged | None:
            with open(descriptor, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    return None
            return changed(self.index, shard.path, "its copy on this machine does not match its sha256")

        for last in (False, True):
            path = self.cache.path(*tar)
            try:
                wrong = self._known.check(self._numbers[shard.path], path, complaint, shard.sha256, afresh)
            except FileNotFoundError:  # the cache has removed it
                continue
            if wrong is None or last:
                return wrong
            self.cache.discard(shard.sha256)
        return None

    def glance(self) -> None:
        """Do nothing: a missing copy is downloaded again, and a changed one is detected when it is read."""

    def look(self, shards: Iterable[Shard], unopened: bool) -> None:
        """Do nothing, as `glance`."""


class CachedShard:
    """A remote shard, read from its local copy.

    The copy is opened for each read, so that the cache can remove it at any time and the disk space is free at once. A
    missing copy is downloaded again.
    """

    def __init__(self, shards: CachedShards, shard: Shard) -> None:
        self._shards, self._shard, self._cache, self._used = shards, shard, shards.cache, time.monotonic()
        self._tar, *tables = shards.files(shard)
        self._path = self._cache.path(*self._tar)
        found = [self._table(*file) for file in tables]
        self.offsets = offsets_of(found[0])
        self.digests = digests_of(found[1]) if len(found) > 1 else None
        if self.digests is None and not self.unchanged() and (wrong := shards.wrong(shard)):
            raise wrong

    def _table(self, url: str, size: int, sha256: str) -> bytes:
        """The content of a small file. It is downloaded again if its copy has changed."""
        for _ in range(3):
            try:
                data = table(self._cache.path(url, size, sha256).read_bytes(), sha256)
            except FileNotFoundError:  # the cache has removed it
                continue
            if data is not None:
                return data
            self._cache.discard(sha256)
        raise changed(self._shards.index, url, "its copies on this machine do not match its sha256")

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""
        while True:
            try:
                file = os.open(self._path, os.O_RDONLY)
            except FileNotFoundError:
                self._cache.path(*self._tar)
                continue
            try:
                now = time.monotonic()
                if now - self._used > TOUCHED:
                    self._cache.use(self._path)
                    self._used = now
                return os.pread(file, size, offset)
            finally:
                os.close(file)

    def unchanged(self) -> bool:
        """Whether the copy is the one that was checked."""
        try:
            return self._shards.recognises(self._shard, os.stat(self._path))
        except GONE:
            return False

    def close(self) -> None:
        """Do nothing: no file is open."""
