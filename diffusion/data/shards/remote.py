"""Data sets that lie elsewhere: whole files, fetched, checked, and kept in a folder of bounded size.

    data.root=https://host/church    s3://bucket/church    gs://bucket/church    "pipe:ssh host cat /sets/church/{}"

http(s) is read here, with time limits of ours and going on where a broken connection stopped; the others go through
webdataset's `gopen`: `gsutil` for gs, `aws` for s3, a shell for pipe, where {} stands for the file's name. A file of
known size and sha256 is used only when it has both. This module knows files, not what is in them; it needs torch for
nothing, and webdataset for what is not http.
"""

import contextlib
import hashlib
import http.client
import io
import os
import random
import re
import select
import shlex
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from diffusion.files import UNWRITABLE, Room, is_file_of, lock, writing
from diffusion.settings import Above, Count, Positive, settings

SCHEMES = ("http://", "https://", "s3://", "gs://", "pipe:")
CHUNK = 1 << 18
MOST_UNKNOWN = 1 << 28  # bytes of a file whose size is not known, as index.json
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between two attempts; doubled each time
REFUSALS = (400, 401, 403, 404, 405, 410)  # HTTP answers that the same question gets again


class Unreachable(ValueError):
    """A remote file cannot be had; the message says which, why, and after how many attempts."""


class SourceChanged(Unreachable):
    """The file on the other side is not the one that index.json describes."""

    exit_status = 2  # of a command: starting it again does not help before that file is restored


class Refused(OSError):
    """The other side has answered, and will not answer otherwise."""


class Differs(OSError):
    """What came has another size or sha256 than it must have."""


def is_remote(root: str | os.PathLike) -> bool:
    """Whether `data.root` is one of SCHEMES and not a folder."""
    return isinstance(root, str) and root.startswith(SCHEMES)


def address(root: str, name: str) -> str:
    """Where a file of a remote set is. The name, which comes from the set's index, is quoted for URL or shell.

    Raises:
        ValueError: a pipe without {}.
    """
    if root.startswith("pipe:"):
        if "{}" not in root:
            raise ValueError(f"data.root={root} has no {{}}, which stands for the file that the command writes out.")
        return root.replace("{}", shlex.quote(name))
    return f"{root.rstrip('/')}/{urllib.parse.quote(name)}"


@settings("data.remote")
@dataclass(frozen=True)
class Access:
    """How patiently remote files are read.

    Args:
        attempts: attempts to get on with a file, in a row without one byte more, before it counts as unreachable.
        timeout: seconds without a byte after which an attempt ends.
    """

    attempts: Count = 6
    timeout: Annotated[float, Above(0, ": it counts seconds")] = 30.0

    def fetch(self, url: str, file: BinaryIO, size: int | None = None, sha256: str | None = None) -> None:
        """Fill `file` (open for reading and writing; what it holds already is taken for the beginning) from `url`.

        Raises:
            Unreachable: no attempt got on with it.
            SourceChanged: what came has not the size or the sha256, and again when all of it was fetched once more.
        """
        failures, longest, others = 0, file.seek(0, os.SEEK_END), 0
        while True:
            try:
                if size is None or file.seek(0, os.SEEK_END) != size:
                    self._once(url, file, size)
                return _check(file, size, sha256)
            except Refused as error:
                raise Unreachable(f"{url} cannot be read: {error}.") from error
            except Differs as error:
                others += 1
                if others > 1:
                    raise SourceChanged(
                        f"{url} cannot be read: {error}, and again when it was fetched once more: the file there is "
                        f"not the one of the data set. Restore it there, then start the same command."
                    ) from error
                longest = 0
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in UNWRITABLE:
                    raise  # this machine's disk, not the connection
                reached = file.seek(0, os.SEEK_END)
                failures = 1 if reached > longest else failures + 1
                longest = max(longest, reached)
                if failures >= self.attempts:
                    raise Unreachable(
                        f"{url} cannot be read: {_words(error)} ({failures} attempts in a row got no further). "
                        f"Is the server there? data.remote.attempts and data.remote.timeout say how long to wait."
                    ) from error
            pause = min(FIRST_PAUSE * 2 ** max(failures - 1, 0), LONGEST_PAUSE)
            time.sleep(pause * random.Random(f"{os.getpid()} {url} {failures}").uniform(0.5, 1.0))

    def read(self, url: str) -> bytes:
        """A small file as bytes. Raises Unreachable."""
        content = io.BytesIO()
        self.fetch(url, content)
        return content.getvalue()

    def _once(self, url: str, file: BinaryIO, size: int | None) -> None:
        if url.startswith(("http://", "https://")):
            _read_http(url, file, self.timeout, MOST_UNKNOWN if size is None else size)
        else:
            file.seek(0)
            file.truncate()
            for chunk in _read_gopen(url, self.timeout):
                file.write(chunk)
                if size is not None and file.tell() > size:
                    raise Differs(f"more than the {size} bytes came that index.json states")
        file.flush()


PATIENT = Access()


def _check(file: BinaryIO, size: int | None, sha256: str | None) -> None:
    """OSError unless the file has the size and the digest; Differs, and the file is emptied, if it cannot get them by
    going on."""
    met = file.seek(0, os.SEEK_END)
    if size is not None and met < size:
        raise OSError(f"the connection ended after {met} of {size} bytes")
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 and met == size else None
    if met != size and size is not None or digest != sha256 and sha256:
        file.seek(0)
        file.truncate()
        raise Differs(f"{met} bytes came with another size or sha256 than index.json states")


def _read_http(url: str, file: BinaryIO, timeout: float, most: int) -> None:
    """Append what is missing of the file; from the beginning where the server knows no ranges. Differs, and the file is
    emptied, if more than `most` bytes come."""
    have = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                file.seek(0)
                file.truncate()
                have = 0
            expected = answer.headers.get("Content-Length")
            came = 0
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                came += len(chunk)
                if have + came > most:
                    file.seek(0)
                    file.truncate()
                    raise Differs(f"more than {most} bytes came")
            if expected is not None and came < int(expected):
                raise OSError(f"the connection ended after {have + came} of {have + int(expected)} bytes")
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # what we have is no beginning of it
            file.seek(0)
            file.truncate()
        elif error.code in REFUSALS:
            raise Refused(f"the server answers {error.code} {error.reason}") from error
        raise


def _read_gopen(url: str, timeout: float) -> Iterator[bytes]:
    """What a command writes out, in chunks; OSError when it fails or is silent for too long."""
    from webdataset import gopen  # which imports torch

    if url.startswith("s3://"):
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    stream = gopen(url, "rb", 0)
    try:
        while True:
            if not select.select([stream.stream], [], [], timeout)[0]:
                stream.proc.kill()
                raise OSError(f"the command wrote nothing for {timeout:g} s")
            chunk = stream.stream.read(CHUNK)
            if not chunk:
                break
            yield chunk
        if status := stream.proc.wait(timeout):
            raise OSError(f"the command ended with status {status}")
    finally:
        if stream.proc.poll() is None:
            stream.proc.kill()
        stream.ignore_errors = True
        stream.close()


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason or error or type(error).__name__)


@settings("data.remote")
@dataclass(frozen=True)
class Remote(Access):
    """How a remote set is had: as `Access`, and where its shards are kept.

    Args:
        folder: on this machine, for all runs. gigabytes: that the shards may take there.
    """

    folder: str = "~/.cache/diffusion"
    gigabytes: Positive = 50.0


OWN = re.compile(r"[0-9a-f]{64}(?:\.([0-9]+)\.part)?")  # a finished file, or one under way with its full size


class FileCache:
    """Files by their sha256 in one folder, together never larger than a limit, shared by all processes of a machine.

    Only files named as OWN are counted and removed: the folder may hold other things, as the caches of other parts of
    this package do.

    A file is fetched by one process while the others that want it wait; one that is there is whole, unless somebody has
    changed it. Room is made by removing what was used longest ago; a reader that finds its file gone fetches it again.
    A download that was killed is gone on with. When a file was last used is the time of a file beside it, so that its
    own times say when it was changed.

    Args:
        folder: made when absent.
        limit: bytes that all its files may have together, those under way included.
        access: how patiently to fetch.
    """

    def __init__(self, folder: str | os.PathLike, limit: int, access: Access) -> None:
        self.folder, self.limit, self.access = Path(folder).expanduser(), limit, access

    def path(self, url: str, size: int, sha256: str) -> Path:
        """Where the file is on this machine, fetched unless it was there.

        Raises:
            Unreachable: it cannot be had.
            ValueError: there is no room for it, by the limit or on the disk.
        """
        goal, part = self.folder / sha256, self.folder / f"{sha256}.{size}.part"
        with writing(Room("data.remote.folder", self.folder, size, f"{url}")):
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                if goal.exists():
                    self.use(goal)
                    return goal
                with open(part, "a+b") as file:
                    lock(file, of_opening=True)
                    if not is_file_of(file.fileno(), part) or goal.exists():
                        continue  # somebody else has finished or given up meanwhile
                    self._make_room(part)
                    self.access.fetch(url, file, size, sha256)
                    os.replace(part, goal)

    def use(self, path: Path) -> None:
        """Say that a file of the cache is used now, where that can be said."""
        with contextlib.suppress(OSError):  # a folder that is only read
            _mark(path).touch()

    def discard(self, sha256: str) -> None:
        """Remove a file: what is there under its name is not what it should be."""
        _remove(self.folder / sha256)

    def _make_room(self, mine: Path) -> None:
        """Remove the longest unused until all files, with those under way at their full sizes, fit the limit."""
        with open(self.folder / ".lock", "a") as common:
            lock(common, of_opening=True)
            files = [(path, size) for path in self.folder.iterdir() if (size := _full_size(path))]
            total = sum(size for _, size in files)
            for _, path, size in sorted((_used(path), path, size) for path, size in files if path != mine):
                if total <= self.limit:
                    return
                if _remove(path):
                    total -= size
            if total > self.limit:
                mine.unlink(missing_ok=True)
                raise ValueError(
                    f"data.remote.gigabytes={self.limit / 1e9:g} is too small for the files that are needed at the "
                    f"same time, {total / 1e9:.3g} GB in {self.folder}: give more, or fewer data.lanes."
                )


def _full_size(path: Path) -> int:
    """Bytes of a finished file, the full size of one under way; 0 if it is not a file of the cache, or just gone."""
    own = OWN.fullmatch(path.name)
    try:
        found = path.lstat() if own else None
    except FileNotFoundError:
        return 0
    if own is None or found is None or not stat.S_ISREG(found.st_mode):
        return 0
    return int(own[1]) if own[1] else found.st_size


def _mark(path: Path) -> Path:
    """The file whose time says when a file of the cache was last used."""
    return path.with_name(f".{path.name}.used")


def _used(path: Path) -> float:
    times = [0.0]
    for file in (path, _mark(path)):  # the first: when it came
        with contextlib.suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)


def _remove(path: Path) -> bool:
    """Remove a file, one under way only when nobody is at it; whether it is gone."""
    try:
        if path.suffix == ".part":
            with open(path, "r+b") as file:
                lock(file, wait=False, of_opening=True)
                path.unlink()
        else:
            path.unlink()
            _mark(path).unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


class Prefetcher:
    """Fetches in the background what will be wanted soon. A failure is left to whoever needs the file.

    Args:
        cache: where to.
        threads: files fetched at a time.
    """

    def __init__(self, cache: FileCache, threads: int = 2) -> None:
        self.cache = FileCache(cache.folder, cache.limit, Access(1, cache.access.timeout))
        self.threads = threads
        self._wanted: list[tuple[str, int, str]] = []
        self._change = threading.Condition()
        self._running: list[threading.Thread] = []
        self._process = 0

    def want(self, files: Sequence[tuple[str, int, str]]) -> None:
        """(url, size, sha256) of the files to have, the first needed first; replaces what was wanted before."""
        with self._change:
            self._wanted = list(files)
            self._change.notify_all()
            if self._process != os.getpid():  # threads do not outlive a fork
                self._process = os.getpid()
                self._running = [threading.Thread(target=self._work, daemon=True) for _ in range(self.threads)]
                for thread in self._running:
                    thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._wanted:
                    self._change.wait()
                url, size, sha256 = self._wanted.pop(0)
            try:
                self.cache.path(url, size, sha256)
            except (ValueError, OSError):
                pass  # the reader will meet it and say so
