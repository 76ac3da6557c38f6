"""The source for LSUN as it is distributed: an LMDB with an encoded image (WebP) under each key, in the order of keys.

Yu et al. 2015. The keys are hashes, so that their order is already shuffled. Entries are not kept in memory: LSUN
bedroom has three million.

The file is parsed here and not by the LMDB library. The library maps the file and trusts it: a damaged page can crash
the process, cause an endless loop, or lose entries silently. Also, its iteration over the keys reads a page of every
value from the disk (60,000 entries, not cached: 61,266 page faults, here 1,272 pages). The format is that of LMDB 0.9
(Chu, mdb.c), little-endian, 64 bits:

    page    number u64, pad u16, kind u16, lower u16, upper u16, then an offset u16 for each of (lower - 16) / 2 nodes
    node    low u16, high u16, flags u16, key size u16, key; in a leaf low and high are the size of the value, followed
    by
            the value or the number of its first page; in a branch low, high and flags are the number of the child
    head    pages 0 and 1, of which the one with the later transaction is valid: magic, version, ..., page size, the
        tree
"""

import os
import struct
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.data.sources.source import BadEntry, Entry
from diffusion.progress import counted

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OUTER, META, KINDS = 0x01, 0x02, 0x04, 0x08, 0x6F  # kinds of a page; other bits are for transactions
OUTSIDE = 1  # flag of a node whose value has its own pages
PAGE, NODE, HEAD = 16, 8, 136  # header sizes in bytes of a page, a node and a head
LONGEST_KEY, DEEPEST, NO_PAGE = 511, 32, 2**64 - 1
PAGE_SIZES = tuple(1 << n for n in range(9, 17))


class LmdbSource:
    """A `Source` over an LMDB folder.

    Raises:
        ValueError: it is not an LMDB, is damaged or truncated, or is empty.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.classes: tuple[str, ...] = ()
        self.ignored: list[str] = []
        self._tree = Tree(path)
        count = self._tree.check()
        if not count:
            raise ValueError(f"source={path}: the LMDB is empty.")
        self.kind = f"LMDB, {counted(count, 'entry', 'entries')}"

    def entries(self, start: bytes | None = None) -> Iterator[Entry]:
        """The entries in the order of their keys. A value is accessed only when it is read."""
        for value in self._tree.values(start or b""):
            key = value.key.decode("utf-8", "backslashreplace")
            yield Entry(value.key, key, "train", None, partial(self._tree.read, value, self.max_bytes))


class Head(NamedTuple):
    """The head of an LMDB: page size, flags, depth, entries and root of the tree, number of pages, transaction."""

    page_size: int
    flags: int
    depth: int
    entries: int
    root: int
    pages: int
    transaction: int


class Value(NamedTuple):
    """The location of the value of a key: it starts at byte `place` of the file.

    first: number of its first page if it has its own pages; None if it is in a leaf.
    """

    key: bytes
    place: int
    size: int
    first: int | None


class Tree:
    """The tree of an LMDB. Forked processes can share it, because it is read by `pread`.

    Raises:
        ValueError: the file does not have the head of an LMDB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path / "data.mdb", os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._head = self._later_head()
        self._size = os.fstat(self._file).st_size
        self._seen: np.ndarray | None = None

    def check(self) -> int:
        """Check the whole tree and return the number of entries.

        Every page must occur once, and the number of entries must be the stated one.

        Raises:
            ValueError: the tree is damaged.
        """
        self._seen = np.zeros(min(self._head.pages, self._size // self._head.page_size), dtype=np.bool_)
        self._seen[:2] = True
        count = sum(1 for _ in self.values())
        self._seen = None
        if count != self._head.entries:
            raise self._damage(f"it has {count:,} entries, but states {self._head.entries:,}")
        return count

    def values(self, start: bytes = b"") -> Iterator[Value]:
        """All values from a key on, in the order of the keys."""
        if self._head.flags:
            raise self._damage(f"its tree has the flags {self._head.flags:#x}, but that of LSUN has none")
        if self._head.root != NO_PAGE:
            yield from self._below(self._head.root, 1, b"", None, start)

    def read(self, value: Value, most: int) -> bytes:
        """The bytes of a value. Raises BadEntry if its pages are damaged, or it has more than `most` bytes."""
        if value.size > most:
            raise BadEntry(f"{value.size:,} bytes, too large for an image of max_pixels")
        if value.first is not None:
            number, kind, pages = struct.unpack("<Q2xHI", os.pread(self._file, PAGE, value.place - PAGE))
            if (number, kind & KINDS) != (value.first, OUTER) or pages < self._pages_of(value.size):
                raise BadEntry(f"page {value.first} of the LMDB is not the page of its value")
        data = os.pread(self._file, value.size, value.place)
        if len(data) != value.size:
            raise BadEntry(f"{len(data):,} of {value.size:,} bytes: the LMDB is truncated")
        return data

    def _later_head(self) -> Head:
        found: list[Head] = []
        for at in range(2):
            page = os.pread(self._file, PAGE + HEAD, at * found[0].page_size if found else 0)
            if len(page) < PAGE + HEAD:
                raise ValueError(f"source={self.path} is not an LMDB: data.mdb has no head.")
            magic, version, page_size = struct.unpack_from("<2I16xI", page, PAGE)
            (kind,) = struct.unpack_from("<H", page, 10)
            if magic != MAGIC or not kind & META:
                raise ValueError(f"source={self.path} is not an LMDB: data.mdb does not begin with a valid head.")
            if version != VERSION or page_size not in PAGE_SIZES or (found and page_size != found[0].page_size):
                met = f"version {version}, pages of {page_size:,} bytes"
                raise ValueError(f"source={self.path} is not an LMDB of a supported version: {met}.")
            flags, depth, entries, root, last, transaction = struct.unpack_from("<2H24x4Q", page, PAGE + 76)
            found.append(Head(page_size, flags, depth, entries, root, last + 1, transaction))
        return found[found[0].transaction < found[1].transaction]

    def _below(self, number: int, depth: int, low: bytes, high: bytes | None, start: bytes) -> Iterator[Value]:
        """The values from `start` on below a page, whose keys must be in [low, high)."""
        page, kind, nodes = self._page(number, depth)
        heads = [struct.unpack_from("<4H", page, node) for node in nodes]
        keys = [page[node + NODE : node + NODE + head[3]] for node, head in zip(nodes, heads, strict=True)]
        if kind == BRANCH:
            keys[0] = low  # the first child has no key
        if keys[0] < low or (high is not None and keys[-1] >= high) or any(map(bytes.__ge__, keys, keys[1:])):
            raise self._damage(f"page {number} has keys in the wrong order")
        if kind == BRANCH:
            for (a, b, c, _), first, after in zip(heads, keys, [*keys[1:], high], strict=True):
                if after is None or after > start:
                    yield from self._below(a | b << 16 | c << 32, depth + 1, first, after, start)
            return
        for node, (a, b, flags, length), key in zip(nodes, heads, keys, strict=True):
            if key >= start:
                yield self._value(page, number, node + NODE + length, a | b << 16, flags, key)

    def _page(self, number: int, depth: int) -> tuple[bytes, int, list[int]]:
        """The bytes of a page, BRANCH or LEAF, and the offsets of its nodes, which are inside the page."""
        self._take(number, 1, f"a branch to page {number}")
        page = os.pread(self._file, self._head.page_size, number * self._head.page_size)
        itself, kind, lower, upper = struct.unpack_from("<Q2x3H", page)
        kind &= KINDS
        leaf = depth == self._head.depth
        if itself != number or kind != (LEAF if leaf else BRANCH) or depth > DEEPEST:
            raise self._damage(f"page {number} does not fit its place in the tree")
        if not PAGE < lower <= upper <= len(page) or lower % 2:
            raise self._damage(f"page {number} has no valid list of nodes")
        nodes = list(struct.unpack_from(f"<{(lower - PAGE) // 2}H", page, PAGE))
        if len(nodes) < 2 - leaf or min(nodes) < upper or max(nodes) + NODE > len(page):
            raise self._damage(f"page {number} has no valid list of nodes")
        return page, kind, nodes

    def _value(self, page: bytes, number: int, begin: int, size: int, flags: int, key: bytes) -> Value:
        """The value of a node. The value, or the number of its first page, starts at byte `begin` of the page."""
        if not 0 < len(key) <= LONGEST_KEY or flags not in (0, OUTSIDE):
            raise self._damage(f"page {number} has an entry of a kind that does not occur in LSUN")
        if begin + (8 if flags else size) > len(page):
            raise self._damage(f"page {number} has an entry that extends beyond the page")
        if not flags:
            return Value(key, number * len(page) + begin, size, None)
        (first,) = struct.unpack_from("<Q", page, begin)
        self._take(first, self._pages_of(size), f"the value of {key!r}")
        return Value(key, first * len(page) + PAGE, size, first)

    def _pages_of(self, size: int) -> int:
        return (PAGE - 1 + size) // self._head.page_size + 1

    def _take(self, first: int, count: int, what: str) -> None:
        """Check that these pages are inside the file and, during `check`, that they are not used twice."""
        if first + count > self._head.pages:
            raise self._damage(f"{what} is outside of the file")
        if (first + count) * self._head.page_size > self._size:
            stated = self._head.pages * self._head.page_size
            raise self._damage(f"it is truncated, with {self._size:,} of at most {stated:,} bytes")
        if self._seen is not None:
            if self._seen[first : first + count].any():
                raise self._damage(f"{what} uses pages that are already in use")
            self._seen[first : first + count] = True

    def _damage(self, what: str) -> ValueError:
        return ValueError(f"source={self.path}: data.mdb is damaged: {what}. Copy it again.")
