"""Named files in a folder, a zip or a tar, read where they lie.

No path is ever made of an archive's names, nothing is extracted, and no more is read than was asked for: what an
archive states of itself is not believed. This module knows containers; it does not know which members are images.
"""

import io
import os
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from diffusion.data.sources.source import BadEntry
from diffusion.data.sources.tar import compression_of, members_of_tar

ZIP_END = 22 + 2**16  # bytes of a zip's end, whose comment may have 65,535
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bzip2 and LZMA cannot be unpacked in bounded memory


class Members(Protocol):
    """Named files, in a folder or an archive.

    Attributes:
        left_out: what is there beside them and cannot be read as a file: a name, and why in brackets.
    """

    path: Path
    kind: str
    left_out: list[str]

    def names(self) -> list[str]:
        """Their names, with `/` between the parts."""

    def read(self, name: str, most: int) -> bytes:
        """One of them; BadEntry when it cannot be read or has more than `most` bytes."""


class SharedFile(io.RawIOBase):
    """A file for reading whose position is in this object and not in the descriptor: forked processes may share it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = os.open(path, os.O_RDONLY)
        self._size, self._at = os.fstat(self._file).st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """What there is of the next bytes: memory is taken for these alone, whatever size is asked for."""
        left = max(self._size - self._at, 0)
        data = os.pread(self._file, left if size is None or size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


class FolderMembers:
    """The files below a folder, hidden ones left out. A link to a file is that file, a link to a folder is left out.

    Raises:
        ValueError: a folder below cannot be listed.
    """

    kind = "folder"

    def __init__(self, path: Path) -> None:
        self.path, self.left_out = path, []
        self._names: list[str] = []
        for folder, inner, files in os.walk(path, onerror=self._refuse):
            below = os.path.relpath(folder, path)
            prefix = "" if below == "." else f"{below}/"
            self._names += [prefix + file for file in files]
            links = (name for name in inner if os.path.islink(os.path.join(folder, name)))
            self.left_out += [f"{prefix}{name} (a link to a folder)" for name in links]

    def _refuse(self, error: OSError) -> None:
        raise ValueError(f"source={self.path}: {error.filename!r} cannot be listed: {error.strerror}.") from error

    def names(self) -> list[str]:
        return self._names

    def read(self, name: str, most: int) -> bytes:
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise BadEntry("it is not a regular file")
                data = file.read(min(status.st_size, most) + 1)
        except OSError as error:
            raise BadEntry(f"it cannot be read: {error.strerror}") from error
        return _within(data, len(data), most)


def opened_zip(path: Path) -> zipfile.ZipFile:
    """A zip with its directory read; ValueError when that is damaged. Members are still to be judged."""
    file = SharedFile(path)
    try:
        archive = zipfile.ZipFile(file)
        file.seek(-ZIP_END, os.SEEK_END)
        end = file.read()
        stated = int.from_bytes(end[end.rindex(b"PK\5\6") + 10 :][:2], "little")
        met = len(archive.infolist())
        if stated not in (met % 2**16, 2**16 - 1):  # many begin anew, or say it elsewhere
            raise zipfile.BadZipFile(f"{met:,} members where it states {stated:,}")
    except Exception as error:  # beside BadZipFile, zipfile raises ValueError, NotImplementedError, struct.error
        raise ValueError(f"source={path} is damaged or truncated: {error}. Download it again.") from error
    return archive


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The content of a member, of which no more than its stated size is unpacked.

    Raises:
        BadEntry: it is encrypted, packed by another method than deflate, or damaged.
    """
    if member.flag_bits & 1:
        raise BadEntry("it is encrypted")
    if member.compress_type not in METHODS:
        method = zipfile.compressor_names.get(member.compress_type, f"method {member.compress_type}")
        raise BadEntry(f"it is compressed by {method}: make the zip with deflate, or unpack it")
    try:
        with archive.open(member) as file:
            data = file.read(member.file_size)  # and not read(), which unpacks first and then looks at the size
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise BadEntry(f"its place in the zip is damaged: {str(error) or type(error).__name__}") from error
    if len(data) != member.file_size:
        raise BadEntry(f"{len(data):,} of {member.file_size:,} bytes: the zip is damaged")
    return data


class ZipMembers:
    """The members of a zip, stored or deflated. Of two with one name the later counts, as everywhere.

    Raises:
        ValueError: its directory is damaged.
    """

    kind = "zip"

    def __init__(self, path: Path) -> None:
        self.path, self.left_out = path, []
        self._zip = opened_zip(path)
        for member in self._zip.infolist():
            if member.is_dir() and member.file_size:
                self.left_out.append(f"{member.filename} (a folder by its name, a file by its size)")
            elif self._zip.getinfo(member.filename) is not member:
                self.left_out.append(f"{member.filename} (there is a later one)")

    def names(self) -> list[str]:
        return [name for name, member in self._zip.NameToInfo.items() if not member.is_dir()]

    def read(self, name: str, most: int) -> bytes:
        member = self._zip.getinfo(name)
        _within(b"", member.file_size, most)
        return unpacked(self._zip, member)


class TarMembers:
    """The regular files of an uncompressed tar; links and devices are left out. Of two with one name the later counts.

    Raises:
        ValueError: it is compressed. DamagedTar (a ValueError): as `members_of_tar`.
    """

    kind = "tar"

    def __init__(self, path: Path) -> None:
        self.path, self.left_out = path, []
        self._where: dict[str, tuple[int, int]] = {}
        if by := compression_of(path):
            raise ValueError(f"source={path}: a compressed tar of images must be unpacked first (it is {by}).")
        with open(path, "rb") as file:
            for member in members_of_tar(file):
                if member.isreg() and not member.issparse():
                    if member.name in self._where:
                        self.left_out.append(f"{member.name} (there is a later one)")
                    self._where[member.name] = member.offset_data, member.size
                elif not member.isdir():
                    self.left_out.append(f"{member.name} ({_kind(member)})")
        self._file = SharedFile(path)

    def names(self) -> list[str]:
        return list(self._where)

    def read(self, name: str, most: int) -> bytes:
        offset, size = self._where[name]
        _within(b"", size, most)
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise BadEntry(f"{len(data):,} of {size:,} bytes: the tar is cut off")
        return data


def _kind(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "a file with holes"
    return "a link" if member.issym() or member.islnk() else "a device"


def _within(data: bytes, size: int, most: int) -> bytes:
    if size > most:
        raise BadEntry(f"more than {most:,} bytes, which no image of max_pixels needs")
    return data
