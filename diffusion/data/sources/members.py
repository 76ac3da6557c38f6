"""Named files in a folder, a zip or a tar, read in place.

Names in an archive are never used as paths, nothing is extracted, and no more is read than was requested, because the
sizes that an archive states may be wrong. This module knows containers. It does not know which members are images.
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

ZIP_END = 22 + 2**16  # largest end record of a zip in bytes; its comment may have 65,535
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bzip2 and LZMA cannot be unpacked with limited memory


class Members(Protocol):
    """Named files, in a folder or an archive.

    Attributes:
        path: path of the folder or archive.
        kind: "folder", "zip" or "tar".
        left_out: other entries that cannot be read as files: their names, with the reason in brackets.
    """

    path: Path
    kind: str
    left_out: list[str]

    def names(self) -> list[str]:
        """The names, with `/` between the parts."""

    def read(self, name: str, most: int) -> bytes:
        """The content of a file. Raises BadEntry if it cannot be read or has more than `most` bytes."""


class SharedFile(io.RawIOBase):
    """A file for reading that forked processes can share: its position is in this object, not in the descriptor."""

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
        """The next bytes. Memory is allocated only for bytes that exist, for any requested size."""
        left = max(self._size - self._at, 0)
        data = os.pread(self._file, left if size is None or size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


class FolderMembers:
    """The files below a folder. Links to files are followed, links to folders are not.

    Raises:
        ValueError: a subfolder cannot be listed.
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
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK)  # otherwise a pipe would block
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise BadEntry("it is not a regular file")
                data = file.read(min(status.st_size, most) + 1)
        except OSError as error:
            raise BadEntry(f"it cannot be read: {error.strerror}") from error
        return _within(data, len(data), most)


def opened_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip and read its directory. Raises ValueError if that is damaged. Members are not checked."""
    file = SharedFile(path)
    try:
        archive = zipfile.ZipFile(file)
        file.seek(-ZIP_END, os.SEEK_END)
        end = file.read()
        stated = int.from_bytes(end[end.rindex(b"PK\5\6") + 10 :][:2], "little")
        met = len(archive.infolist())
        if stated not in (met % 2**16, 2**16 - 1):  # large numbers wrap around, or are stated elsewhere
            raise zipfile.BadZipFile(f"it has {met:,} members, but states {stated:,}")
    except Exception as error:  # zipfile raises BadZipFile, ValueError, NotImplementedError and struct.error
        raise ValueError(f"source={path} is damaged or truncated: {error}. Download it again.") from error
    return archive


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The content of a member. No more than its stated size is unpacked.

    Raises:
        BadEntry: it is encrypted, compressed by another method than deflate, or damaged.
    """
    if member.flag_bits & 1:
        raise BadEntry("it is encrypted")
    if member.compress_type not in METHODS:
        method = zipfile.compressor_names.get(member.compress_type, f"method {member.compress_type}")
        raise BadEntry(f"it is compressed by {method}: create the zip with deflate, or unpack it")
    try:
        with archive.open(member) as file:
            data = file.read(member.file_size)  # read() without a size would unpack everything before checking the size
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise BadEntry(f"its data in the zip are damaged: {str(error) or type(error).__name__}") from error
    if len(data) != member.file_size:
        raise BadEntry(f"{len(data):,} of {member.file_size:,} bytes: the zip is damaged")
    return data


class ZipMembers:
    """The members of a zip, stored or deflated. If a name occurs twice, the last one is used.

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
    """The regular files of an uncompressed tar, without links and devices. If a name occurs twice, the last is used.

    Raises:
        ValueError: the tar is compressed.
        DamagedTar: as `members_of_tar` (a ValueError).
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
            raise BadEntry(f"{len(data):,} of {size:,} bytes: the tar is truncated")
        return data


def _kind(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "a sparse file"
    return "a link" if member.issym() or member.islnk() else "a device"


def _within(data: bytes, size: int, most: int) -> bytes:
    if size > most:
        raise BadEntry(f"more than {most:,} bytes, too large for an image of max_pixels")
    return data
