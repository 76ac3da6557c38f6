"""Arrays that many processes make, a file each, in a folder of their own: gone on with after an interruption.

    about.json     what decides the arrays; with another content the folder is begun anew
    NAME.npz       one piece of work, written whole or not at all; one that has been damaged since is made again

Knows nothing of what is in them.
"""

import contextlib
import errno
import fcntl
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.files import replacing, write_atomically
from diffusion.training.ranks import Ranks, got_on
from diffusion.training.sampling import watched

PATIENCE = 60.0  # seconds until another machine's file is seen here
Arrays = Mapping[str, NDArray]


class Pieces:
    """The pieces of one piece of work.

    Args:
        folder: for this alone; made when it is needed.
        about: what decides the content of the pieces, as JSON.
        ranks: who makes them.
    """

    def __init__(self, folder: Path, about: Any, ranks: Ranks) -> None:
        self.folder, self.ranks, self._about = folder, ranks, json.dumps(about, sort_keys=True)
        self._lock: IO[str] | None = None

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def there(self, name: str) -> bool:
        """Whether it is there, undamaged."""
        try:
            with zipfile.ZipFile(self.path(name)) as archive:
                return archive.testzip() is None
        except (OSError, zipfile.BadZipFile):
            return False

    def write(self, name: str, arrays: Arrays) -> None:
        with replacing(self.path(name)) as file:
            np.savez(file, **arrays)

    def read(self, name: str) -> dict[str, NDArray]:
        """A piece that is there, or was written on another machine a moment ago."""
        deadline = time.monotonic() + PATIENCE
        while not self.path(name).is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        with np.load(self.path(name), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def make(self, sizes: Sequence[int], make: Callable[[int], bool], title: str) -> None:
        """Call make(i) for every i, on all ranks, each its share; every rank calls this, and it returns when the last
        is done.

        Args:
            sizes: images of each piece. make: returns whether there was anything to make.

        Raises:
            Abandoned: a rank has been told to stop. What is made stays.
            ValueError: another process is at it.
        """
        if self.ranks.main:
            self._begin()
        self.ranks.largest()

        def made(number: int) -> int:
            self.ranks.attend()
            if not make(number):
                return 0
            got_on()
            return sizes[number]

        with self.ranks.together():
            for _ in watched(title, sum(sizes), map(made, self.ranks.share(len(sizes))), self.ranks):
                self.ranks.working()

    def _begin(self) -> None:
        """The folder, for this process alone, without what belongs to something else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = open(self.folder.with_name(f"{self.folder.name}.lock"), "w")
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, gone with it
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(f"{self.folder}: its file system has no locks ({error.strerror}).") from error
                raise ValueError(f"{self.folder} is being worked on by another process: wait for it.") from error
        about = self.folder / "about.json"
        if not (about.is_file() and about.read_text() == self._about):
            shutil.rmtree(self.folder, ignore_errors=True)
            write_atomically(about, self._about)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self.folder.with_name(f"{self.folder.name}.lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # if it was for this alone
