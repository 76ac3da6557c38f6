"""Tars that may be damaged or hostile: every member up to the very end, or an error that says where it stops being one.

Python's tarfile ends in silence at a damaged header, as if the archive ended there; it believes any size, also a
negative one, and reads a header of any length into memory. Here a header is at most HEAD_BYTES long, members follow one
another, and after the last one there is nothing but zeros. This module finds members; it does not know what they are.
"""

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

HEAD_BYTES = 1 << 20  # of long names and pax headers: they take a few hundred
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
CHUNK = 1 << 20


class DamagedTar(ValueError):
    """What was begun as a tar does not go on as one; the message says from which byte on."""


class _Heads(io.RawIOBase):
    """A file of which only headers are read. `last` is what was read last."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file, self.last = file, b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEAD_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self.file.read(size)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


def compression_of(path: Path) -> str | None:
    """gzip, bzip2, xz or zstd, by the first bytes; None for a file that is none of these."""
    with open(path, "rb") as file:
        begin = file.read(6)
    return next((name for magic, name in COMPRESSED.items() if begin.startswith(magic)), None)


def begins_as_tar(path: Path) -> bool:
    """Whether a file, or what a file compressed by gzip holds, begins with the header of a tar.

    Raises:
        EOFError, OSError, zlib.error: the gzip is damaged.
    """
    with gzip.open(path) if compression_of(path) == "gzip" else open(path, "rb") as file:
        begin = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(begin, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def members_of_tar(file: BinaryIO, most: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar, in their order. The caller may read from the file between two of them.

    Args:
        file: open for reading, seekable.
        most: bytes to walk over, at most: the members that begin behind are not looked for.

    Raises:
        DamagedTar: a header is damaged, sizes do not fit, the file is cut off, or goes on after its end.
    """
    end, heads = 0, _Heads(file)
    try:
        tar = tarfile.open(fileobj=heads, mode="r:", errorlevel=2)
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile would keep a kilobyte for each
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"the member {member.name!r} of {member.size:,} bytes")
            end = tar.offset
            yield member
            if most is not None and end > most:
                return
    except Exception as error:  # beside its own, tarfile raises ValueError, IndexError, RecursionError and others
        reason = str(error) or type(error).__name__
        raise DamagedTar(f"from byte {end:,} on it is no tar ({reason})") from error
    _check_end(heads.last, file, end, most)


def _check_end(first: bytes, file: BinaryIO, end: int, most: int | None) -> None:
    """DamagedTar unless `first` and all that follows in the file are zeros, and enough of them."""
    count, data = 0, first
    while data:
        if data.count(0) != len(data):
            raise DamagedTar(f"from byte {end:,} on it is no tar: neither a header nor the zeros of its end")
        count += len(data)
        data = b"" if most is not None and count > most else file.read(CHUNK)
    if count < tarfile.BLOCKSIZE:
        raise DamagedTar(f"it ends at byte {end:,} without the zeros that end a tar: it is cut off")
