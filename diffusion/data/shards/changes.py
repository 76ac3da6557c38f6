"""Notice that a file is no longer the one that was found to be sound.

A file is recognised by its signature: device, inode, size and the times of the last change of its content and of its
inode. While the signature is the one that the file had when its content was checked, the content is not read again;
when it is another, the content decides, so a file that was touched or copied back is not changed. What is known of the
files of a data set is in memory that forked processes share. What was found by reading a whole file is also kept on
disk, in the user's cache folder, for the next start.

A clock of a file system is coarse: what is written shortly after a check may leave the signature as it was. So a file
that had changed less than SETTLED seconds before its check is checked a second time, later.

This module knows files and signatures; it does not know what is in a file.
"""

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffusion.files import cache_folder, lock, unlock, write_atomically

SETTLED = 2.0  # seconds
ATTEMPTS = 3  # checks of a file that is written to while it is read
KEPT = 90 * 86400  # seconds: a record on disk that nobody has used for so long is removed

Signature = tuple[int, int, int, int, int]
GONE = (FileNotFoundError, NotADirectoryError)


class BadSample(ValueError):
    """A sample cannot be read or decoded; the message names the shard and the sample."""


class DataChanged(BadSample):
    """A shard, or a sample of it, is not what the index says; the message names it, and how to restore it.

    Args:
        message: for the user.
        whole: whether the shard is gone or replaced, and not some of its samples damaged.
        since: time (seconds since 1970) up to which the content is known to have been sound, if the file may have been
            read as if it were sound after that; None if nothing of it was used.
    """

    exit_status = 2  # of a command: starting it again does not help before the file is restored

    def __init__(self, message: str, whole: bool = True, since: float | None = None) -> None:
        super().__init__(message)
        self.whole, self.since = whole, since


def signature(found: os.stat_result) -> Signature:
    """What a file is recognised by."""
    numbers = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return tuple(number % 2**64 for number in numbers)


def shared(dtype: type, *shape: int) -> np.ndarray:
    """Zeros in anonymous memory, the same for this process and those that are forked from it."""
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    return np.frombuffer(mmap.mmap(-1, size), dtype, count=int(np.prod(shape))).reshape(shape)


class Known:
    """What is known of some files, by their numbers; shared with the processes that are forked later.

    Args:
        files: how many.
    """

    def __init__(self, files: int) -> None:
        self._signatures = shared(np.uint64, files, len(Signature.__args__))
        self._checked_at = shared(np.float64, files)  # seconds since 1970; 0 where no content was checked
        self._unsettled = shared(np.bool_, files)
        # A byte to lock for each file. The system releases the locks of a process that ends.
        self._locks = open(os.memfd_create("locks"), "wb") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()

    def recognises(self, number: int, *found: os.stat_result) -> bool:
        """Whether this is the file that was noted, unchanged."""
        noted = tuple(self._signatures[number].tolist())
        return all(signature(stat) == noted for stat in found)

    def noted(self) -> np.ndarray:
        """The numbers of the files of which a signature is known."""
        return np.flatnonzero(self._signatures.any(axis=1))

    def note(self, number: int, found: os.stat_result) -> None:
        """Take a file as it is found, if nothing is known of it yet."""
        if not self._signatures[number].any():
            self._signatures[number] = signature(found)

    def due(self, number: int) -> bool:
        """Whether a file must be checked a second time, as its clock may not have shown a change."""
        return bool(self._unsettled[number]) and time.time() - self._checked_at[number] > SETTLED

    def check(
        self,
        number: int,
        path: Path,
        complaint: Callable[[int], DataChanged | None],
        sha256: str | None = None,
        afresh: bool = False,
    ) -> DataChanged | None:
        """What is wrong with the content of a file; None if nothing is, and then its signature is noted. One process
        at a time checks a file; for those that wait for it, what it has noted is enough.

        Args:
            number: of the file.
            path: of the file.
            complaint: reads the content from a file descriptor and says what is wrong with it.
            sha256: what `complaint` compares all of the content with; None if it compares something else, and then
                nothing is kept on disk.
            afresh: read the content even if the signature is the one that was noted.

        Raises:
            OSError: the file cannot be read; one of GONE if it is gone.
        """
        with self._alone(number):
            for _ in range(ATTEMPTS):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    found, began = os.fstat(descriptor), time.time()
                    same = self.recognises(number, found)
                    again = afresh or self.due(number)
                    if same and self._checked_at[number] and not again:
                        return None
                    record = _Record(path, found, sha256) if sha256 else None
                    before = record.checked_at() if record and not again else None
                    wrong = complaint(descriptor) if before is None else None
                    now = os.fstat(descriptor), os.stat(path)
                finally:
                    os.close(descriptor)
                if all(signature(stat) == signature(found) for stat in now):
                    break  # else it was written to or replaced meanwhile
            else:
                return wrong or DataChanged(f"{path} is being written to.")
            if wrong is not None:
                if same and sha256:
                    wrong.since = float(self._checked_at[number]) or None
                return wrong
            settled = again or before is not None or began - max(found.st_mtime, found.st_ctime) > SETTLED
            self._signatures[number], self._unsettled[number] = signature(found), not settled
            self._checked_at[number] = before or began
            if record and settled and before is None:
                record.write(began)
            return None

    @contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        lock(self._locks, byte=number)
        try:
            yield
        finally:
            unlock(self._locks, number)


class _Record:
    """That the content of a file with this signature was checked, as a small file in the user's cache folder."""

    def __init__(self, path: Path, found: os.stat_result, sha256: str) -> None:
        name = json.dumps([os.path.abspath(path), *signature(found), sha256])
        self._folder = cache_folder() / "verified"
        self._file = self._folder / hashlib.sha256(name.encode()).hexdigest()

    def checked_at(self) -> float | None:
        """When it was checked, in seconds since 1970; None if it was not."""
        try:
            then = float(self._file.read_text())
            os.utime(self._file)
            return then if 0 < then <= time.time() else None
        except (OSError, ValueError):
            return None

    def write(self, now: float) -> None:
        """Keep it. A cache folder that cannot be written to is no error."""
        with contextlib.suppress(OSError):
            write_atomically(self._file, repr(now))
            if self._file.name.startswith("00"):  # now and then
                for file in self._folder.iterdir():
                    if now - file.stat().st_mtime > KEPT:
                        file.unlink(missing_ok=True)
