"""Files that are there whole or not at all, and their digests. Needs the standard library only."""

import contextlib
import csv
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on disk; after an error nothing is left.

    A temporary file in the same folder, fsync, rename, fsync of the folder. Its name is `file.name`. A kill can leave
    the temporary file behind, see `remove_leftovers`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say whose
        raise
    sync_folder(path.parent)


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """`replacing` for content that is at hand."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def append(path: str | os.PathLike, text: str) -> None:
    """Add to a file; after an error, which names it, it is as it was."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
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


def reason(error: Exception) -> str:
    """An error in a sentence; of the system's, the file and what it says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


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
    there = next((at for at in (folder, *folder.parents) if at.exists()), Path("."))
    if not there.is_dir():
        return f"{there} is a file"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def cache_folder() -> Path:
    """The user's folder for what can be made again: $XDG_CACHE_HOME/diffusion or ~/.cache/diffusion. It need not exist,
    and it may be that it cannot be written to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion"


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder that nobody writes to now."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_csv(path: str | os.PathLike) -> tuple[list[dict[str, str]], int]:
    """The rows of a CSV file with a line of names, and the number of lines that are no rows: with more or fewer values
    than there are names, or with bytes that are not UTF-8. A last line that a kill has cut off does not count. Rows are
    lines: no value holds a line break."""
    with open(path, "rb") as file:
        names, *lines = file.read().split(b"\n")
    found, unread, columns = [], 0, _csv_values(names)
    for number, line in enumerate(lines, 1):
        values = _csv_values(line)
        if columns and values and len(values) == len(columns):
            found.append(dict(zip(columns, values, strict=True)))
        elif line.strip() and number < len(lines):
            unread += 1
    return found, unread


def keep_damaged(path: Path) -> None:
    """Copy a file that will be written again without its damaged lines to `NAME.damaged`, unless that is there."""
    copy = path.with_name(f"{path.name}.damaged")
    if not copy.exists():
        write_atomically(copy, path.read_bytes())
        print(f"warning: {path} has damaged lines. They are left out; the file as it was is {copy}.", file=sys.stderr)


def _csv_values(line: bytes) -> list[str] | None:
    try:
        (values,) = csv.reader([line.decode().rstrip("\r")], strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError):
        return None
    return values
