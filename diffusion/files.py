"""Atomic writing of files, digests, locks, and the free space of disks.

It needs the standard library only. It knows folders and the settings that name them, but not what the files contain.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import os
import re
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

STEP = re.compile("[0-9]{1,18}")  # a step in a table
MOST_TEXT = 1 << 30  # largest table or log, in bytes, that is read
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of a full or read-only disk
LEFTOVER = ".*.tmp"  # pattern of the temporary files that a killed writer leaves


class Unwritable(ValueError):
    """A folder cannot be written to. The message names its setting, the reason and the space needed."""


class Room(NamedTuple):
    """The disk space that is needed in a folder.

    key: the setting that names the folder.
    folder: the folder.
    needs: approximate number of bytes; 0 if it is small or unknown.
    what: what they are needed for, like "1,000 images".
    """

    key: str
    folder: Path
    needs: int = 0
    what: str = ""

    @property
    def free(self) -> int:
        """Free bytes for this user on the disk of the folder."""
        return shutil.disk_usage(nearest_folder(self.folder)).free

    @property
    def lack(self) -> str | None:
        """A message if the disk has too little space, else None."""
        size = shutil.disk_usage(nearest_folder(self.folder)).total  # 0 if the file system does not report it
        return None if self.needs <= self.free or not size else f"{self}."

    def check(self) -> None:
        """Raise Unwritable if the disk has too little space."""
        if self.lack:
            raise Unwritable(self.lack)

    def __str__(self) -> str:
        needed = f"{size_of(self.needs)} are needed for {self.what}, " if self.needs else ""
        return f"{self.key}={self.folder}: {needed}{size_of(self.free)} are free"


@contextmanager
def writing(*rooms: Room) -> Iterator[None]:
    """Context that turns the error of a full or read-only disk into Unwritable, whose message names setting and folder.

    Other errors are not changed.

    Args:
        rooms: the folders that are written to. An error without a file name is attributed to the first one.
    """
    try:
        yield
    except OSError as error:
        message = describe_disk_error(error, *rooms)
        if message is None:
            raise
        raise Unwritable(message) from error


def describe_disk_error(error: BaseException | None, *rooms: Room) -> str | None:
    """The message for an error of a full or read-only disk; None for other errors and for files in other folders."""
    while not isinstance(error, OSError) or error.errno not in UNWRITABLE:
        if (error := error.__cause__ or error.__context__) is None:
            return None
    path = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else None
    for room in rooms:
        if path is None or path == room.folder.absolute() or room.folder.absolute() in path.parents:
            message = f"{room.key}={room.folder}: {error.strerror}"
            if error.errno == errno.EROFS:
                return f"{message}. Give a folder that can be written to."
            if error.errno == errno.EFBIG:
                return f"{message}. Finished files are kept. Raise the limit (ulimit -f) and run the same command."
            needed = f"{size_of(room.needs)} are needed for {room.what}, " if room.needs else ""
            message += f": {needed}{size_of(room.free)} are free"
            return f"{message}. Finished files are kept. Free some space and run the same command."
    return None


def size_of(number: float) -> str:
    """A number of bytes as text, like 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next((at for at in (path, *path.absolute().parents) if at.exists()), Path("."))


def cache_folder() -> Path:
    """The cache folder, for files that can be recreated: $XDG_CACHE_HOME/diffusion or ~/.cache/diffusion."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else Path.home() / ".cache") / "diffusion"


def sha256_of(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Context that writes a file atomically: it yields a temporary file, which replaces `path` at the end.

    The temporary file is in the same folder; its name is `file.name`. It is synced and renamed, and the folder is
    synced. After an error neither the file nor new folders are left. A kill can leave the temporary file, see
    `remove_leftovers`.
    """
    path, temporary = Path(path), None
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        remove_empty(made)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not name the file
        raise
    sync_folder(path.parent)


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file atomically, see `replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: str | os.PathLike, text: str) -> None:
    """Append text to a file. Links are not followed. On an error, which names the file, the file is not changed."""
    descriptor = _opened(path, os.O_WRONLY | os.O_APPEND)
    try:
        size, rest = os.fstat(descriptor).st_size, memoryview(text.encode())
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _opened(path: str | os.PathLike, flags: int) -> int:
    """Open a regular file, and create it if it is missing. Returns the descriptor.

    Raises:
        OSError: it is a link, a pipe or another special file. Following it could write to a file that someone else
            chose.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, "is not a regular file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def lock(file: int | IO, wait: bool = True, byte: int | None = None, of_opening: bool = False) -> None:
    """Lock an open file, or one byte of it. The system releases the lock when the file is closed or the process ends.

    Args:
        wait: whether to wait until the lock is free.
        byte: the byte to lock; None means the whole file.
        of_opening: the lock also excludes other openings of the file in this process, such as those of threads. A
            forked process that keeps the file open then keeps the lock.

    Raises:
        OSError: it is locked and `wait` is False (EACCES, EAGAIN), or the file system does not support locks.
    """
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    if of_opening:
        fcntl.flock(file, how)
    else:
        fcntl.lockf(file, how, *(() if byte is None else (1, byte)))


def unlock(file: int | IO, byte: int) -> None:
    """Release the lock of one byte of an open file."""
    fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


@contextmanager
def locked(path: str | os.PathLike, named: str, cure: str = "Wait for it.", wait: bool = False) -> Iterator[None]:
    """Context that holds a lock file for this process.

    The file contains the process that holds it. At the end the file is removed, and the folders created for it if they
    are empty. A POSIX record lock belongs to the process, so that forked workers do not keep it when the process is
    killed.

    Args:
        path: path of the lock file.
        named: what is locked, like "run_dir=runs/a"; for messages.
        cure: what to do if it is in use; for messages.
        wait: whether to wait until another process releases it.

    Raises:
        ValueError: another process holds it, the file system does not support locks, or the path is not a regular file.
        OSError: the file cannot be created.
    """
    path = Path(path)
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, named, cure, wait)
        try:
            with contextlib.suppress(OSError):  # on a full disk the lock works without this text
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)
    finally:
        remove_empty(made)


def _locked(path: Path, named: str, cure: str, wait: bool) -> int:
    """Open and lock a lock file; returns its descriptor."""
    while True:
        there = path.exists()
        try:
            descriptor = _opened(path, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EISDIR):
                raise ValueError(
                    f"{named}: {path} is not a regular file, so it cannot be used as a lock. Remove it."
                ) from error
            raise
        try:
            lock(descriptor, wait)
            if is_file_of(descriptor, path):
                return descriptor
            os.close(descriptor)  # its holder has removed it meanwhile
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{named} is in use by another process ({holder}). {cure}") from error
            if not there:
                path.unlink(missing_ok=True)
            raise ValueError(
                f"{named}: its file system does not support locks ({error.strerror}), which prevent two processes "
                f"from using one folder. Mount it with locks (Lustre: -o flock), or give another folder."
            ) from error


def is_file_of(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders that are empty. List the innermost folders first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def reason(error: BaseException) -> str:
    """The message of an error as a sentence, never empty.

    For a lack of resources it is the message of `shortage`; for an OSError, the file and the text of the system; for an
    error without a text, its type.
    """
    if words := shortage(error):
        return words
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error).strip() or f"{type(error).__name__}, without a message."


def shortage(error: BaseException) -> str | None:
    """A message if an error was caused by a lack of resources: the limit, and how to raise it. None otherwise.

    Full disks are not covered, see `describe_disk_error`.
    """
    seen: BaseException | None = error
    while seen is not None:
        number, text = getattr(seen, "errno", None), str(seen)
        if number == errno.EMFILE or "Too many open files" in text or "items of ancillary data" in text:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return (
                f"Too many open files: the limit is {limit} per process (ulimit -n). Raise the limit, for example by "
                f"`ulimit -n {max(4096, 2 * limit)}`, or give a smaller data.num_workers."
            )
        if number == errno.ENFILE:
            return "Too many open files on this machine (fs.file-max). Close other programs, or raise the limit."
        forking = isinstance(seen, BlockingIOError) and seen is error  # otherwise it is from a lock
        if forking or "can't start new thread" in text:
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            known = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
            return (
                f"No further process or thread can be started. The limit for this user is {known} (ulimit -u); a "
                "container may have a lower one. Raise it, or give a smaller data.num_workers and trainer.threads."
            )
        if number == errno.ENOMEM or isinstance(seen, MemoryError):
            return "Out of memory. Give a smaller data.batch_size, a smaller data.num_workers, or data.cache=none."
        if "shared memory" in text and ("No space left" in text or "Bus error" in text or "unable to" in text):
            return "/dev/shm, the shared memory of processes, is full. Enlarge it, or give a smaller data.num_workers."
        seen = seen.__cause__ or seen.__context__
    return None


def csv_text(rows: Sequence[Mapping[str, Any]], names: Iterable[str] = ()) -> str:
    """Rows as the text of a CSV file with a header: the columns `names` first, then the others as they occur."""
    columns = dict.fromkeys([*names, *(name for row in rows for name in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def obstacle(folder: Path) -> str | None:
    """Why a folder cannot be created or written to, as a clause; None if it can."""
    there = nearest_folder(folder)
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def sync_folder(folder: str | os.PathLike) -> None:
    """Sync a folder, so that renames in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder that no process writes to."""
    for path in folder.glob(LEFTOVER):
        path.unlink(missing_ok=True)


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """Read a regular file that may come from an untrusted source.

    Raises:
        OSError: it is not a regular file (a pipe would block), or is larger than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"has more than {size_of(most)}", str(path))
        return file.read(most + 1)


def read_csv(path: str | os.PathLike) -> tuple[list[dict[str, str]], int]:
    """Read a CSV file with a header: its rows, and the number of damaged lines.

    A line is damaged if its number of values differs from the header, or if it is not UTF-8. A last line that a kill
    has truncated is not counted. A value cannot contain a line break.
    """
    names, *lines = read_regular(path, MOST_TEXT).split(b"\n")
    found, unread, columns = [], 0, _csv_values(names)
    for number, line in enumerate(lines, 1):
        values = _csv_values(line)
        if columns and values and len(values) == len(columns):
            found.append(dict(zip(columns, values, strict=True)))
        elif line.strip() and number < len(lines):
            unread += 1
    return found, unread


def keep_damaged(path: Path) -> None:
    """Copy a file to `NAME.damaged`, or to `NAME.damaged.2` and so on if that exists with other content.

    Call it before the file is rewritten without its damaged lines.
    """
    content, number = read_regular(path, MOST_TEXT), 1
    while (copy := path.with_name(f"{path.name}.damaged{'' if number == 1 else f'.{number}'}")).exists():
        if read_regular(copy, MOST_TEXT) == content:
            return
        number += 1
    write_atomically(copy, content)
    print(f"warning: {path} has damaged lines, which are removed. The original file is {copy}.", file=sys.stderr)


def _csv_values(line: bytes) -> list[str] | None:
    try:
        (values,) = csv.reader([line.decode().rstrip("\r")], strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError):
        return None
    return values
