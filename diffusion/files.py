"""Files that are there whole or not at all, their digests, locks, and the room that a disk has for them.

Needs the standard library only. It knows folders and the settings that name them; it knows nothing of what is written.
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
MOST_TEXT = 1 << 30  # bytes of a table or a log that is read whole
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a disk says that takes nothing more
LEFTOVER = ".*.tmp"  # pattern of what a killed writer leaves beside its goal


class Unwritable(ValueError):
    """A folder cannot take what is to be written; the message names its setting, the reason and the room needed."""


class Room(NamedTuple):
    """What is going to be written to a folder: the setting that names it, about how many bytes, and what they are for.

    needs: 0 where it is little, or not known. what: as "1,000 images".
    """

    key: str
    folder: Path
    needs: int = 0
    what: str = ""

    @property
    def free(self) -> int:
        """Bytes that the disk of the folder has left for this user."""
        return shutil.disk_usage(nearest_folder(self.folder)).free

    @property
    def lack(self) -> str | None:
        """What is missing, as a sentence; None where the disk has enough."""
        size = shutil.disk_usage(nearest_folder(self.folder)).total  # 0 where a file system does not tell
        return None if self.needs <= self.free or not size else f"{self}."

    def check(self) -> None:
        """Unwritable if the disk has less than is needed."""
        if self.lack:
            raise Unwritable(self.lack)

    def __str__(self) -> str:
        needed = f"{size_of(self.needs)} are needed for {self.what}, " if self.needs else ""
        return f"{self.key}={self.folder}: {needed}{size_of(self.free)} are free"


@contextmanager
def writing(*rooms: Room) -> Iterator[None]:
    """A disk that becomes full, or that is read-only, ends what is done inside with Unwritable: one message with the
    setting, the folder and the room needed. Any other error goes through.

    Args:
        rooms: where something is written inside; an error without a file name is taken for one of the first.
    """
    try:
        yield
    except OSError as error:
        said = told_by_disk(error, *rooms)
        if said is None:
            raise
        raise Unwritable(said) from error


def told_by_disk(error: BaseException | None, *rooms: Room) -> str | None:
    """What to say of an error that a full or read-only disk has caused; None of any other error, and of a file that
    lies in none of the folders."""
    while not isinstance(error, OSError) or error.errno not in UNWRITABLE:
        if (error := error.__cause__ or error.__context__) is None:
            return None
    path = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else None
    for room in rooms:
        if path is None or path == room.folder.absolute() or room.folder.absolute() in path.parents:
            said = f"{room.key}={room.folder}: {error.strerror}"
            if error.errno == errno.EROFS:
                return f"{said}. Give a folder that can be written to."
            if error.errno == errno.EFBIG:
                return f"{said}. What is finished stays: raise the limit (ulimit -f) and give the same command."
            needed = f"{size_of(room.needs)} are needed for {room.what}, " if room.needs else ""
            said += f": {needed}{size_of(room.free)} are free"
            return f"{said}. What is finished stays: make room and give the same command."
    return None


def size_of(number: float) -> str:
    """Bytes as 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next((at for at in (path, *path.absolute().parents) if at.exists()), Path("."))


def cache_folder() -> Path:
    """The folder for what can be made again: $XDG_CACHE_HOME/diffusion or ~/.cache/diffusion."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and os.path.isabs(base) else Path.home() / ".cache") / "diffusion"


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on disk; after an error nothing is left, and
    none of the folders made for it.

    A temporary file in the same folder, fsync, rename, fsync of the folder. Its name is `file.name`. A kill can leave
    the temporary file behind, see `remove_leftovers`.
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
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say whose
        raise
    sync_folder(path.parent)


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """`replacing` for content that is at hand."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: str | os.PathLike, text: str) -> None:
    """Add to a file; after an error, which names it, it is as it was. A link is not followed."""
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
    """The descriptor of a regular file, made if need be. OSError, and nothing is touched, for a link, a pipe and the
    like: whoever has put it there must not choose which file is written."""
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
    """Lock an open file, or one byte of it, against all others that lock it so. The system releases the lock when the
    file is closed, and when the process ends.

    Args:
        wait: until it is free. byte: None: the whole file.
        of_opening: against every other opening of the file, as by threads of this process, and not against other
            processes alone. A forked process that keeps the file open then keeps the lock.

    Raises:
        OSError: it is locked and not to be waited for (EACCES, EAGAIN), or its file system has no locks.
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
    """Hold a lock file for this process. At the end the file is removed, and with it the folders made for it, if they
    are empty.

    A POSIX record lock belongs to the process: forked workers do not keep it when the process is killed. Who holds it
    is written in the file.

    Args:
        path: of the lock file. named: what is locked, as "run_dir=runs/a". cure: what to do if it is in use.
        wait: until another process releases it.

    Raises:
        ValueError: another process holds it, its file system has no locks, or the path is not a regular file.
        OSError: the file cannot be made.
    """
    path = Path(path)
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, named, cure, wait)
        try:
            with contextlib.suppress(OSError):  # on a full disk the lock holds without it
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
    """The descriptor of a lock file, locked."""
    while True:
        there = path.exists()
        try:
            descriptor = _opened(path, os.O_RDWR)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EISDIR):
                raise ValueError(f"{named}: {path} is not a regular file, and cannot be a lock: remove it.") from error
            raise
        try:
            lock(descriptor, wait)
            if is_file_of(descriptor, path):
                return descriptor
            os.close(descriptor)  # of one that its holder has removed meanwhile
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{named} is in use by another process ({holder}). {cure}") from error
            if not there:
                path.unlink(missing_ok=True)
            raise ValueError(
                f"{named}: its file system has no locks ({error.strerror}), without which two processes could work "
                f"in one folder: mount it with them (Lustre: -o flock), or give another folder."
            ) from error


def is_file_of(descriptor: int, path: Path) -> bool:
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders that are empty; the innermost are to come first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def reason(error: BaseException) -> str:
    """An error in a sentence, which is never empty: what the process has run out of; of the system's errors the file
    and what it says; of one without a text its type."""
    if words := shortage(error):
        return words
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error).strip() or f"{type(error).__name__}, without a message."


def shortage(error: BaseException) -> str | None:
    """What the process, or the machine, has run out of, if that is behind an error: the limit, and the cure. Not of a
    full disk, which names its file."""
    seen: BaseException | None = error
    while seen is not None:
        number, text = getattr(seen, "errno", None), str(seen)
        if number == errno.EMFILE or "Too many open files" in text or "items of ancillary data" in text:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return (
                f"Too many open files: a process may have {limit} here (ulimit -n). Raise the limit, as by `ulimit -n "
                f"{max(4096, 2 * limit)}`, or give fewer data.num_workers."
            )
        if number == errno.ENFILE:
            return "Too many open files on this machine (fs.file-max). Close other programs, or raise the limit."
        forking = isinstance(seen, BlockingIOError) and seen is error  # else of a lock, of which its holder speaks
        if forking or "can't start new thread" in text:
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            known = "no limit" if limit == resource.RLIM_INFINITY else str(limit)
            return (
                f"No further process or thread can be started: {known} for this user here (ulimit -u), or less in a "
                "container. Raise the limit, or give fewer data.num_workers and trainer.threads."
            )
        if number == errno.ENOMEM or isinstance(seen, MemoryError):
            return (
                "There is not enough memory. Give a smaller data.batch_size, fewer data.num_workers or data.cache=none."
            )
        if "shared memory" in text and ("No space left" in text or "Bus error" in text or "unable to" in text):
            return "/dev/shm, the memory that processes share, is full. Enlarge it, or give fewer data.num_workers."
        seen = seen.__cause__ or seen.__context__
    return None


def csv_text(rows: Sequence[Mapping[str, Any]], names: Iterable[str] = ()) -> str:
    """Rows as the text of a CSV file with a line of names: these first, then all others in the order they come up."""
    columns = dict.fromkeys([*names, *(name for row in rows for name in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def obstacle(folder: Path) -> str | None:
    """What keeps a folder from being made and written to, in words; None if nothing does."""
    there = nearest_folder(folder)
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody writes to now."""
    for path in folder.glob(LEFTOVER):
        path.unlink(missing_ok=True)


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The content of a regular file. OSError for what is none, as a pipe, which would be waited for, and for one that
    is larger than `most` bytes: who reads files of other people takes neither."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"has more than {size_of(most)}", str(path))
        return file.read(most + 1)


def read_csv(path: str | os.PathLike) -> tuple[list[dict[str, str]], int]:
    """The rows of a CSV file with a line of names, and the number of lines that are no rows: with more or fewer values
    than there are names, or with bytes that are not UTF-8. A last line that a kill has cut off does not count. Rows are
    lines: no value holds a line break."""
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
    """Copy a file that will be written again without its damaged lines to `NAME.damaged`, or `NAME.damaged.2` and so on
    where that is another one."""
    content, number = read_regular(path, MOST_TEXT), 1
    while (copy := path.with_name(f"{path.name}.damaged{'' if number == 1 else f'.{number}'}")).exists():
        if read_regular(copy, MOST_TEXT) == content:
            return
        number += 1
    write_atomically(copy, content)
    print(f"warning: {path} has damaged lines. They are left out; the file as it was is {copy}.", file=sys.stderr)


def _csv_values(line: bytes) -> list[str] | None:
    try:
        (values,) = csv.reader([line.decode().rstrip("\r")], strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError):
        return None
    return values
