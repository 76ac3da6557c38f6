"""Detection of files that have changed since they were checked.

A file is identified by its signature: device, inode, size, and the times of the last change of its content and of its
inode. As long as the signature is the same as at the last check of the content, the content is not read again. If the
signature differs, the content is compared. So a file that was touched or restored does not count as changed. The
signatures of the files of a data set are in memory that forked processes share. The result of reading a whole file is
also stored on disk, in the user's cache folder, for the next start.

The clock of a file system is coarse: a change shortly after a check may not change the signature. So a file that was
changed less than SETTLED seconds before its check is checked a second time, later.

This module knows files and signatures. It does not know what a file contains.
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
ATTEMPTS = 3  # attempts to check a file that is being written to
KEPT = 90 * 86400  # seconds after which an unused record on disk is removed

Signature = tuple[int, int, int, int, int]
GONE = (FileNotFoundError, NotADirectoryError)


class BadSample(ValueError):
    """A sample cannot be read or decoded. The message names the shard and the sample."""


class DataChanged(BadSample):
    """A shard, or a sample in it, differs from what the index states. The message names it and how to restore it.

    Args:
        message: message for the user.
        whole: True if the shard is missing or replaced; False if only some samples are damaged.
        since: time (seconds since 1970) of the last check at which the content was valid, if changed content may have
            been used since then; None if no changed content was used.
    """

    exit_status = 2  # the same command would fail again until the file is restored

    def __init__(self, message: str, whole: bool = True, since: float | None = None) -> None:
        super().__init__(message)
        self.whole, self.since = whole, since


def signature(found: os.stat_result) -> Signature:
    """The signature of a file: device, inode, size, and two times in nanoseconds."""
    numbers = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return tuple(number % 2**64 for number in numbers)


def shared(dtype: type, *shape: int) -> np.ndarray:
    """An array of zeros in anonymous memory, shared by this process and those forked from it."""
    size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
    return np.frombuffer(mmap.mmap(-1, size), dtype, count=int(np.prod(shape))).reshape(shape)


class Known:
    """The signatures and checks of some files, by their numbers; shared with processes that are forked later.

    Args:
        files: number of files.
    """

    def __init__(self, files: int) -> None:
        self._signatures = shared(np.uint64, files, len(Signature.__args__))
        self._checked_at = shared(np.float64, files)  # seconds since 1970; 0: the content was not checked
        self._unsettled = shared(np.bool_, files)
        # One byte per file, to lock. The system releases the locks of a process that ends.
        self._locks = open(os.memfd_create("locks"), "wb") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()

    def recognises(self, number: int, *found: os.stat_result) -> bool:
        """Whether all these are the noted file, with an unchanged signature."""
        noted = tuple(self._signatures[number].tolist())
        return all(signature(stat) == noted for stat in found)

    def noted(self) -> np.ndarray:
        """The numbers of the files whose signature is known."""
        return np.flatnonzero(self._signatures.any(axis=1))

    def note(self, number: int, found: os.stat_result) -> None:
        """Note the signature of a file, unless one is known."""
        if not self._signatures[number].any():
            self._signatures[number] = signature(found)

    def due(self, number: int) -> bool:
        """Whether a file must be checked a second time, because its signature may have missed a change."""
        return bool(self._unsettled[number]) and time.time() - self._checked_at[number] > SETTLED

    def check(
        self,
        number: int,
        path: Path,
        complaint: Callable[[int], DataChanged | None],
        sha256: str | None = None,
        afresh: bool = False,
    ) -> DataChanged | None:
        """Check the content of a file. Returns an error, or None if it is valid, and then notes its signature.

        Only one process at a time checks a file. The others wait and use its result.

        Args:
            number: number of the file.
            path: path of the file.
            complaint: reads the content from a file descriptor and returns an error or None.
            sha256: the sha256 that `complaint` compares the whole content with; None if it compares something else.
                Then no result is stored on disk.
            afresh: read the content even if the signature has not changed.

        Raises:
            OSError: the file cannot be read; one of GONE if it is missing.
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
                    break  # otherwise it was written to or replaced meanwhile
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
    """The record of a check of a file with this signature: a small file in the user's cache folder."""

    def __init__(self, path: Path, found: os.stat_result, sha256: str) -> None:
        name = json.dumps([os.path.abspath(path), *signature(found), sha256])
        self._folder = cache_folder() / "verified"
        self._file = self._folder / hashlib.sha256(name.encode()).hexdigest()

    def checked_at(self) -> float | None:
        """The time of the check, in seconds since 1970; None if there is no record."""
        try:
            then = float(self._file.read_text())
            os.utime(self._file)
            return then if 0 < then <= time.time() else None
        except (OSError, ValueError):
            return None

    def write(self, now: float) -> None:
        """Write the record. It is not an error if the cache folder cannot be written to."""
        with contextlib.suppress(OSError):
            write_atomically(self._file, repr(now))
            if self._file.name.startswith("00"):  # one record in 256: remove old ones
                for file in self._folder.iterdir():
                    if now - file.stat().st_mtime > KEPT:
                        file.unlink(missing_ok=True)
