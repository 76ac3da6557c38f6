"""LSUN as it is distributed: an LMDB with an encoded image (WebP) under each key, in the order of the keys.

Yu et al. 2015. The keys are hashes, so their order is already a shuffled one. Nothing is held in memory: LSUN bedroom
has three million entries.
"""

from collections.abc import Iterator
from pathlib import Path

import lmdb

from diffusion.data.sources import BadEntry, Entry


class LmdbSource:
    """A `Source` over an LMDB folder. It is opened anew for each walk, so walks may be in forked processes.

    Raises:
        ValueError: it cannot be opened, is cut off, or has no entry.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.classes: tuple[str, ...] = ()
        self.ignored: list[str] = []
        try:
            with self._open() as environment:
                size, page = (path / "data.mdb").stat().st_size, environment.stat()["psize"]
                needed = (environment.info()["last_pgno"] + 1) * page
                count = environment.stat()["entries"]
        except lmdb.Error as error:
            raise ValueError(f"source={path} is not an LMDB: {error}.") from error
        if size < needed:
            raise ValueError(f"source={path}: data.mdb has {size:,} of {needed:,} bytes: it is cut off; copy it again.")
        if not count:
            raise ValueError(f"source={path}: the LMDB is empty.")
        self.kind = f"LMDB, {count:,} entries"

    def _open(self) -> lmdb.Environment:
        return lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, create=False)

    def entries(self, start: bytes | None = None) -> Iterator[Entry]:
        """The entries in the order of their keys; a value is looked at only when it is read."""
        with self._open() as environment, environment.begin(buffers=False) as transaction:
            with transaction.cursor() as cursor:
                if not (cursor.first() if start is None else cursor.set_range(start)):
                    return

                def read() -> bytes:
                    data = transaction.get(key)
                    if len(data) > self.max_bytes:
                        raise BadEntry(f"{len(data):,} bytes, more than an image of max_pixels needs")
                    return data

                for key in cursor.iternext(keys=True, values=False):
                    yield Entry(key, key.decode("utf-8", "backslashreplace"), "train", None, read)
