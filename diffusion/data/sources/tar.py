"""Reading of tars that may be damaged or malicious: all members, or an error that names the byte of the damage.

Python's tarfile stops silently at a damaged header, as if the archive ended there. It accepts any size, even a negative
one, and reads headers of any length into memory. Here a header has at most HEAD_BYTES, members must follow one another,
and after the last one there must be only zeros. This module finds members; it does not know what they contain.
"""

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

HEAD_BYTES = 1 << 20  # largest header (long names and pax headers); they usually have a few hundred bytes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
CHUNK = 1 << 20


class DamagedTar(ValueError):
    """A tar is damaged. The message names the first byte that is not part of a valid tar."""


class _Heads(io.RawIOBase):
    """A file from which only headers are read. `last` are the bytes that were read last."""

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
    """The compression of a file, from its first bytes: gzip, bzip2, xz or zstd; None for other files."""
    with open(path, "rb") as file:
        begin = file.read(6)
    return next((name for magic, name in COMPRESSED.items() if begin.startswith(magic)), None)


def begins_as_tar(path: Path) -> bool:
    """Whether a file begins with the header of a tar, possibly compressed by gzip.

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
    """Iterate over the members of an uncompressed tar. The caller may read from the file between two members.

    Args:
        file: open for reading, seekable.
        most: number of bytes after which to stop; None means the whole file.

    Raises:
        DamagedTar: a header is damaged, sizes are inconsistent, the file is truncated, or has data after its end.
    """
    end, heads = 0, _Heads(file)
    try:
        tar = tarfile.open(fileobj=heads, mode="r:", errorlevel=2)
        while (member := tar.next()) is not None:
            tar.members = []  # otherwise tarfile keeps a kilobyte per member
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"the member {member.name!r} of {member.size:,} bytes")
            end = tar.offset
            yield member
            if most is not None and end > most:
                return
    except Exception as error:  # tarfile raises its own errors, ValueError, IndexError, RecursionError and others
        reason = str(error) or type(error).__name__
        raise DamagedTar(f"from byte {end:,} on it is not a valid tar ({reason})") from error
    _check_end(heads.last, file, end, most)


def _check_end(first: bytes, file: BinaryIO, end: int, most: int | None) -> None:
    """Raise DamagedTar unless `first` and the rest of the file are zeros, and enough of them."""
    count, data = 0, first
    while data:
        if data.count(0) != len(data):
            raise DamagedTar(f"from byte {end:,} on it is not a valid tar: neither a header nor the zeros of its end")
        count += len(data)
        data = b"" if most is not None and count > most else file.read(CHUNK)
    if count < tarfile.BLOCKSIZE:
        raise DamagedTar(f"it ends at byte {end:,} without the zeros that end a tar: it is truncated")
