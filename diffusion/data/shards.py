"""Open shards: any bytes of a tar by their offset, and where its samples lie.

On a local or mounted file system a shard is read in place; a remote one out of a local cache (`remote`), where it is
fetched whole when it is first wanted.
"""

import os
import time
import weakref
from typing import Protocol

import numpy as np

from diffusion.data.index import Index, Shard
from diffusion.data.remote import FileCache, Prefetcher, address
from diffusion.files import sha256_of

TOUCHED = 2.0  # seconds after which a cached shard in use is marked as used again


class ShardReader(Protocol):
    """An open shard.

    `offsets` is uint64 (samples, 4): offset and size of the image, offset and size of the label.
    """

    offsets: np.ndarray

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""

    def close(self) -> None:
        """Give the file back."""

    def intact(self) -> bool:
        """Whether the tar has the sha256 of the index; reads all of it."""


class Shards(Protocol):
    """Where the shards of a data set are opened."""

    def open(self, shard: Shard) -> ShardReader:
        """Open one; OSError or ValueError when it cannot be."""

    def announce(self, shards: list[Shard]) -> None:
        """What will be opened soon, the first needed first."""


class LocalShards:
    """The shards of a data set in a folder."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def open(self, shard: Shard) -> "LocalShard":
        return LocalShard(self.index, shard)

    def announce(self, shards: list[Shard]) -> None:
        """The operating system reads ahead by itself."""


class LocalShard:
    """A shard on a local or mounted file system. `pread` has no position, so forked processes may share it."""

    def __init__(self, index: Index, shard: Shard) -> None:
        self._path, self._sha256 = index.path(shard), shard.sha256
        self._file = os.open(self._path, os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, self._file)
        self.offsets = index.offsets(shard)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""
        return os.pread(self._file, size, offset)

    def close(self) -> None:
        """Close the file; it is closed at the latest when nobody has this object any more."""
        self._closed()

    def intact(self) -> bool:
        """Whether the file of that name has the sha256 of the index."""
        return self._path.is_file() and sha256_of(self._path) == self._sha256


class CachedShards:
    """The shards of a remote data set.

    Args:
        index: of the set; its root is remote.
        cache: where the files are kept.
    """

    def __init__(self, index: Index, cache: FileCache) -> None:
        self.index, self.cache, self._prefetcher = index, cache, Prefetcher(cache)

    def open(self, shard: Shard) -> "CachedShard":
        return CachedShard(shard, self._files(shard), self.cache)

    def announce(self, shards: list[Shard]) -> None:
        """Fetch them in the background."""
        self._prefetcher.want([file for shard in shards for file in self._files(shard)])

    def _files(self, shard: Shard) -> list[tuple[str, int, str]]:
        return [(address(self.index.root, name), size, sha256) for name, size, sha256 in shard.files]


class CachedShard:
    """A remote shard, read from its copy. The copy is opened for each read, so that the cache can take it away at any
    time and its bytes are free at once; one that is gone is fetched again."""

    def __init__(self, shard: Shard, files: list[tuple[str, int, str]], cache: FileCache) -> None:
        self._tar, self._offsets = files
        self._cache, self._used = cache, time.monotonic()
        self._path = cache.path(*self._tar)
        self.offsets = np.fromfile(cache.path(*self._offsets), dtype="<u8").reshape(shard.samples, 4)

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
                    os.utime(file)
                    self._used = now
                return os.pread(file, size, offset)
            finally:
                os.close(file)

    def close(self) -> None:
        """Nothing is held."""

    def intact(self) -> bool:
        """Whether the copy has the sha256 of the index, as it had when it came."""
        return sha256_of(self._cache.path(*self._tar)) == self._tar[2]
