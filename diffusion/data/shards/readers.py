"""Open shards: any bytes of a tar by their offset, where its samples lie, and whether they still are what they were.

On a local or mounted file system a shard is read in place; a remote one out of a local cache (`remote`), where it is
fetched whole when it is first wanted.

A shard that changes while it is in use is noticed (`DataChanged`):

    sets with digests         every sample that is read must have its digest
    sets without              the whole tar must have its sha256 when it is first opened; after each read its signature
                              (`changes`) must be the one it had then
    both, in a local folder   `glance` looks at the signatures of all shards that were opened, once a second, also when
                              decoded images are kept and nothing is read; `look` at those of all shards

Where a signature is another one, the content decides. Offsets and digests are read when a shard is opened, and must
have their sha256. This module knows no images.
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
LOOKED = 1.0  # seconds between two glances at the signatures of the shards, for all processes of a rank together
GLANCE = 500  # shards that are looked at in one glance
PROBES = 16  # samples that are looked at to tell a replaced shard from a damaged sample
CURE = "Restore that file: copy it back, or remove it and prepare the set again. Then start the same command."


class ShardReader(Protocol):
    """An open shard.

    `offsets` is uint64 (samples, 4): offset and size of the image, offset and size of the label. `digests` holds the
    digest of each sample, or is None.
    """

    offsets: np.ndarray
    digests: array | None

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""

    def unchanged(self) -> bool:
        """Whether the file is the one whose content was checked."""

    def close(self) -> None:
        """Give the file back."""


class Shards(Protocol):
    """Where the shards of a data set are opened."""

    def open(self, shard: Shard) -> ShardReader:
        """Open one; OSError or ValueError when it cannot be, DataChanged when it is not what the index says."""

    def announce(self, shards: list[Shard]) -> None:
        """What will be opened soon, the first needed first."""

    def wrong(self, shard: Shard, afresh: bool = False) -> DataChanged | None:
        """What is wrong with a shard, by its content; None if nothing is any more, and then it is to be opened anew.
        `afresh` reads all of it, even if nothing shows that it has changed."""

    def glance(self) -> None:
        """A cheap look at the shards in use, to be taken often. Raises DataChanged."""

    def look(self, shards: Iterable[Shard], unopened: bool) -> None:
        """A look at these shards, with those or without those that have not been opened. Raises DataChanged."""


def changed(index: Index, name: str, found: str, whole: bool = True) -> DataChanged:
    """That a file of the set is not what the index says."""
    return DataChanged(f"data.root={index.root}: shard {name} has changed: {found}. {CURE}", whole)


def named(shard: Shard, offsets: np.ndarray, place: int, read: Callable[[int, int], bytes]) -> str:
    """A sample for a message: its place in the shard, and what its header in the tar calls it."""
    header = max(int(offsets[place][0]) - 512, 0)
    name = read(header, 100).split(bytes(1))[0].decode(errors="replace") if header < shard.bytes else ""
    return f"sample {place}" + (f" ({name!r})" if name else "")


def differing(shard: Shard, reader: ShardReader, places: Iterable[int], read: Callable[[int, int], bytes]) -> list[int]:
    """The samples at these places that do not have their digests."""
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
    """That these samples do not have their digests, or that no sample of those looked at has; None if all have them."""
    found = differing(shard, reader, places, read)
    if not found:
        return None
    what = "the digest recorded when the set was made"
    if len(found) == len(places) > 1:
        return changed(index, shard.path, f"its samples do not have {what}")
    return changed(index, shard.path, f"{named(shard, reader.offsets, found[0], read)} does not have {what}", False)


def wrong_sample(index: Index, shard: Shard, reader: ShardReader, place: int) -> DataChanged:
    """What is said of a sample without its digest: that it is damaged, or that its shard is another one."""
    step = max(shard.samples // PROBES, 1)
    others = wrong_samples(index, shard, reader, range(place % step, shard.samples, step), reader.read)
    if others is not None and others.whole:
        return others
    return wrong_samples(index, shard, reader, [place], reader.read) or others


def table(data: bytes, sha256: str) -> bytes | None:
    """The content of a file of offsets or digests if it has its sha256."""
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


class LocalShards:
    """The shards of a data set in a folder.

    Args:
        index: of the set.
        tolerant: whether a shard with damaged samples is no error as a whole: they are met when they are read.
    """

    def __init__(self, index: Index, tolerant: bool = False) -> None:
        self.index, self.tolerant = index, tolerant
        self._numbers = {shard.path: number for number, shard in enumerate(index.shards)}
        self._known = Known(len(index.shards))
        self._glanced, self._next = shared(np.float64, 1), 0

    def open(self, shard: Shard) -> "LocalShard":
        return LocalShard(self, shard)

    def announce(self, shards: list[Shard]) -> None:
        """The operating system reads ahead by itself."""

    def recognises(self, shard: Shard, *found: os.stat_result) -> bool:
        """Whether this is the file whose content was checked, or with digests the one that was opened first."""
        return self._known.recognises(self._numbers[shard.path], *found)

    def note(self, shard: Shard, found: os.stat_result) -> None:
        """Take a shard with digests as it is found: they tell at each read whether it is sound."""
        self._known.note(self._numbers[shard.path], found)

    def wrong(self, shard: Shard, afresh: bool = False) -> DataChanged | None:
        """As `Shards.wrong`. OSError if the file is there and cannot be read."""

        def complaint(descriptor: int) -> DataChanged | None:
            size = os.fstat(descriptor).st_size
            if size != shard.bytes:
                return changed(self.index, shard.path, f"it has {size} bytes, and {INDEX_NAME} says {shard.bytes}")
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
        """That a file of the set is not there."""
        return changed(self.index, name, "the file is gone")

    def _other_sha256(self, shard: Shard, descriptor: int) -> DataChanged | None:
        with open(descriptor, "rb", closefd=False) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return None
        return changed(self.index, shard.path, f"it does not have the sha256 in {INDEX_NAME}")

    def _other_samples(self, shard: Shard, descriptor: int) -> DataChanged | None:
        """DataChanged if samples do not have their digests, all of them where the set may have damaged ones."""
        read = lambda offset, size: os.pread(descriptor, size, offset)  # noqa: E731
        wrong = wrong_samples(self.index, shard, Tables(self, shard), range(shard.samples), read)
        return None if wrong is None or self.tolerant and not wrong.whole else wrong

    def glance(self) -> None:
        """Look at the shards that have been opened, if nobody has for a second."""
        now = time.monotonic()
        if now - self._glanced[0] < LOOKED:
            return
        self._glanced[0] = now
        noted = self._known.noted()
        if len(noted) > GLANCE:
            noted, self._next = np.roll(noted, -self._next)[:GLANCE], (self._next + GLANCE) % len(noted)
        self.look([self.index.shards[number] for number in noted.tolist()], unopened=False)

    def look(self, shards: Iterable[Shard], unopened: bool) -> None:
        """As `Shards.look`. A file system that does not answer is left to whoever reads."""
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
                raise changed(shards.index, name, f"it does not have the sha256 in {INDEX_NAME}")
            found.append(data)
        self.offsets = offsets_of(found[0])
        self.digests = digests_of(found[1]) if len(found) > 1 else None


class LocalShard:
    """A shard on a local or mounted file system. `pread` has no position, so forked processes may share it."""

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
        """Whether the open file and the one of its name are those that were checked."""
        try:
            return self._shards.recognises(self._shard, os.fstat(self._file), os.stat(self._path))
        except GONE:
            return False

    def close(self) -> None:
        """Close the file; it is closed at the latest when nobody has this object any more."""
        self._closed()


class CachedShards:
    """The shards of a remote data set. Their copies in the cache are what can change; a copy that has is fetched again.

    Args:
        index: of the set; its root is remote.
        cache: where the files are kept.
    """

    def __init__(self, index: Index, cache: FileCache) -> None:
        self.index, self.cache, self._prefetcher = index, cache, Prefetcher(cache)
        self._numbers = {shard.path: number for number, shard in enumerate(index.shards)}
        self._known = Known(len(index.shards))

    def open(self, shard: Shard) -> "CachedShard":
        return CachedShard(self, shard)

    def announce(self, shards: list[Shard]) -> None:
        """Fetch them in the background."""
        self._prefetcher.want([file for shard in shards for file in self.files(shard)])

    def files(self, shard: Shard) -> list[tuple[str, int, str]]:
        """Address, size and sha256 of the files of a shard."""
        return [(address(self.index.root, name), size, sha256) for name, size, sha256 in shard.files]

    def recognises(self, shard: Shard, *found: os.stat_result) -> bool:
        """Whether this is the copy whose content was checked."""
        return self._known.recognises(self._numbers[shard.path], *found)

    def wrong(self, shard: Shard, afresh: bool = False) -> DataChanged | None:
        """As `Shards.wrong`: a copy without its sha256 is removed and fetched again, so that in the end nothing is.
        Unreachable if it cannot be fetched, or the file of the server has changed."""
        tar = self.files(shard)[0]

        def complaint(descriptor: int) -> DataChanged | None:
            with open(descriptor, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    return None
            return changed(self.index, shard.path, "its copy on this machine does not have its sha256")

        for last in (False, True):
            path = self.cache.path(*tar)
            try:
                wrong = self._known.check(self._numbers[shard.path], path, complaint, shard.sha256, afresh)
            except FileNotFoundError:  # taken away by the cache
                continue
            if wrong is None or last:
                return wrong
            self.cache.discard(shard.sha256)
        return None

    def glance(self) -> None:
        """A copy that is gone is fetched again, and one that has changed is noticed when it is read."""

    def look(self, shards: Iterable[Shard], unopened: bool) -> None:
        """As `glance`."""


class CachedShard:
    """A remote shard, read from its copy. The copy is opened for each read, so that the cache can take it away at any
    time and its bytes are free at once; one that is gone is fetched again."""

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
        """The content of a small file, fetched again if its copy has changed."""
        for _ in range(3):
            try:
                data = table(self._cache.path(url, size, sha256).read_bytes(), sha256)
            except FileNotFoundError:  # taken away by the cache
                continue
            if data is not None:
                return data
            self._cache.discard(sha256)
        raise changed(self._shards.index, url, "its copies on this machine do not keep their sha256")

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
        """Nothing is held."""
