"""Arrays of numbered things, such as images, made by many processes and kept in files until they are put together.

    about.json                  what decides the arrays
    images_00000256_256.npz     of the things 256 ... 511, written whole or not at all

After an interruption only what is missing is made, in batches of the present size: the files are known by the numbers
they hold, not by the batches of the process that wrote them. Where files overlap, or hold more than is asked for, the
readers take the part that they need. This module does not know what is in the arrays.

A kind is the pattern of a file's name without its suffix, with a star for the numbers: "images_*".
"""

import contextlib
import json
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from diffusion.distributed.ranks import Ranks, mark_progress
from diffusion.files import locked, replacing, write_atomically
from diffusion.progress import Progress

PATIENCE = 60.0  # seconds until another machine's file is seen here
SIZE = "batch_size"  # the array of each file that holds the batch size it was made with
NAME = re.compile(r"[a-z]+_(\d{8,})_(\d{1,9})(?:_\w+)?\.npz")
Arrays = Mapping[str, NDArray]


class Part(NamedTuple):
    """What one file contributes: `numbers`, which lie in those `of` the whole file."""

    numbers: range
    of: range


def unequal(old: Any, new: Any) -> list[str]:
    """The differences between two contents of about.json, in words; here without detail."""
    return [] if old == new else ["it was made in another way"]


class Pieces:
    """The files of one piece of work. A context: at its end the folder is released, and removed if it holds no file.

    Args:
        folder: for this alone; made when it is needed.
        about: what decides the arrays, as JSON.
        ranks: who makes them.
        total: numbers 0 ... total - 1 are wanted.
        batch_size: how many are made at a time.
        setting: the setting that names the folder, as "out=samples/a". What the folder holds of other work is refused
            then. None: the folder is the program's own; other work in it is begun anew, with a line that says so.
        overwrite: begin anew also where a setting names the folder.
        differences: between two contents of about.json, in words; [] if they decide the same arrays.
        what: other work in the folder, in words after the number of its things.
    """

    def __init__(
        self,
        folder: Path,
        about: Any,
        ranks: Ranks,
        total: int,
        batch_size: int,
        setting: str | None = None,
        overwrite: bool = False,
        differences: Callable[[Any, Any], list[str]] = unequal,
        what: str = "images of another sampling",
    ) -> None:
        self.folder, self.about, self.ranks, self.total, self.batch_size = folder, about, ranks, total, batch_size
        self.setting, self.overwrite, self.differences, self.what = setting, overwrite, differences, what
        self._held = contextlib.ExitStack()
        self._begun = False
        self._cover: dict[str, list[range]] = {}

    # ---- the folder ----

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._begun and not self._files():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._begun = False
        self._held.close()

    def refuse_other(self) -> None:
        """ValueError if the folder holds files of other work that must not be lost. Changes nothing."""
        found = [] if self.setting is None or self.overwrite else self._differences()
        if found:
            raise ValueError(
                f"{self.setting} holds {self._count():,} {self.what}: {'; '.join(found)}. "
                f"Give the same settings, another folder, or overwrite=true."
            )

    def remove(self) -> None:
        """All of it is put together: the files are not needed any more. What a kill leaves of them is no work to go on
        with."""
        self._path("about").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._begun = False
        self._held.close()
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # if it was for this alone

    def _begin(self) -> None:
        """The folder for this process alone, without what belongs to other work."""
        if self._begun:
            return
        self.refuse_other()
        beside = self.folder.with_name(f"{self.folder.name}.lock")
        self._held.enter_context(locked(beside, self.setting or str(self.folder)))
        self.refuse_other()
        found = self._differences()
        if found:
            where = self.setting or self.folder
            print(f"{where}: {self._count():,} {self.what} are removed: {'; '.join(found)}.", flush=True)
        self._begun = True
        if found or not self._files():
            shutil.rmtree(self.folder, ignore_errors=True)
            write_atomically(self._path("about"), json.dumps(self.about, sort_keys=True))

    def _differences(self) -> list[str]:
        """Between the work whose files are here and this one; [] where there are no files."""
        return self.differences(self.recorded(), self.about) if self._files() else []

    def recorded(self) -> Any:
        """What about.json says; None if there is none that can be read."""
        try:
            return json.loads(self._path("about").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def _path(self, name: str) -> Path:
        return self.folder / (f"{name}.json" if name == "about" else f"{name}.npz")

    def _files(self) -> dict[Path, range]:
        found = {path: NAME.fullmatch(path.name) for path in self.folder.glob("*.npz")}
        return {p: range(int(m[1]), int(m[1]) + int(m[2])) for p, m in sorted(found.items()) if m}

    def _count(self) -> int:
        """How many numbers there are files of."""
        return sum(map(len, united(self._files().values())))

    def bytes(self) -> int:
        """That the files take."""
        return sum(path.stat().st_size for path in self._files()) if self.folder.is_dir() else 0

    # ---- what is missing, and making it: every rank calls these, in the same order ----

    def missing(self, kind: str) -> list[range]:
        """The numbers of which there is no sound file, cut into batches. A damaged file is removed.

        Raises:
            ValueError: another process works in the folder, or it holds other work.
            Abandoned: a rank has been told to stop.
        """
        found: Any = None
        with self.ranks.together():
            if self.ranks.main:
                self._begin()
                there = list(self._sound(kind))
                gaps = without([range(self.total)], there)
                cut = [part for gap in gaps for part in batches(gap, self.batch_size)]
                found = cut, sorted(there + cut, key=lambda r: (r.start, -r.stop))
        cut, self._cover[kind] = self.ranks.from_main(found)
        return cut

    def _sound(self, kind: str) -> Iterator[range]:
        for path, numbers in self._files().items():
            if path != self._name(kind, numbers) or numbers.start >= self.total:
                continue
            self.ranks.attend()
            if sound(path, len(numbers)):
                yield numbers
            else:
                print(f"{path} is damaged: its content is made again.", flush=True)
                path.unlink(missing_ok=True)

    def make(self, work: Sequence[range], make: Callable[[range], bool], title: str) -> None:
        """Call make(numbers) for every range, on all ranks, each its share; returns when the last is done.

        Args:
            make: writes them; returns whether they are new, and not only worked out from what was there.

        Raises:
            Abandoned: a rank has been told to stop. What is made stays.
        """

        def made(index: int) -> int:
            self.ranks.attend()
            new = make(work[index])
            mark_progress()
            return len(work[index]) if new else 0

        ranks = self.ranks
        progress = Progress(title, self.total, ranks=ranks.size, shown=ranks.main)
        with ranks.together(), progress:
            for index in ranks.share(len(work)):
                progress.add(made(index))
                ranks.working()

    def write(self, kind: str, numbers: range, arrays: Arrays) -> None:
        """A file of these numbers: arrays whose first dimension they are, or single values."""
        with replacing(self._name(kind, numbers)) as file:
            np.savez(file, **arrays, **{SIZE: np.int64(self.batch_size)})

    def _name(self, kind: str, numbers: range) -> Path:
        return self._path(kind.replace("*", f"{numbers.start:08d}_{len(numbers)}"))

    # ---- reading, on one rank, what `missing` has found and `make` has made ----

    def parts(self, kind: str, within: range | None = None) -> Iterator[Part]:
        """Which files to read for these numbers, and which part of each; all numbers in order, each once."""
        within = within or range(self.total)
        at = within.start
        for of in self._cover[kind]:
            if of.start <= at < of.stop and at < within.stop:
                yield Part(range(at, min(of.stop, within.stop)), of)
                at = of.stop
        assert at >= within.stop, f"{kind}: nothing was made of number {at}"

    def read(self, kind: str, part: Part, names: Iterable[str] | None = None) -> dict[str, NDArray]:
        """The arrays of a part, single values as they are; these names alone, or all but the batch size. Waits for a
        file that was written on another machine a moment ago."""
        path, deadline = self._name(kind, part.of), time.monotonic() + PATIENCE
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        cut = slice(part.numbers.start - part.of.start, part.numbers.stop - part.of.start)
        with np.load(path, allow_pickle=False) as archive:
            wanted = [name for name in archive.files if name != SIZE] if names is None else names
            arrays = {name: archive[name] for name in wanted if name in archive.files}
        return {name: array[cut] if array.ndim else array for name, array in arrays.items()}

    def batch_sizes(self, kind: str, otherwise: int) -> list[int]:
        """All batch sizes that the files in use were made with. `otherwise`: that of files which do not say."""
        said = (self.read(kind, part, [SIZE]).get(SIZE, otherwise) for part in self.parts(kind))
        return sorted({int(size) for size in said})


# ---- ranges ----


def batches(gap: range, size: int) -> list[range]:
    """A range, cut where a work without a gap would be: at the multiples of the batch size."""
    cuts = [gap.start, *range(gap.start - gap.start % size + size, gap.stop, size), gap.stop]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def united(ranges: Iterable[range]) -> list[range]:
    """The numbers in any of the ranges, as ranges that do not touch, rising."""
    found: list[range] = []
    for r in sorted((r for r in ranges if r), key=lambda r: r.start):
        if found and r.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, r.stop))
        else:
            found.append(r)
    return found


def without(ranges: Iterable[range], taken: Iterable[range]) -> list[range]:
    """The numbers in any of the ranges and in none of those taken, as ranges, rising."""
    found, holes = [], united(taken)
    for r in united(ranges):
        at = r.start
        for hole in holes:
            if at < hole.start < r.stop:
                found.append(range(at, hole.start))
            if hole.start < r.stop:
                at = max(at, hole.stop)
        if at < r.stop:
            found.append(range(at, r.stop))
    return found


def sound(path: Path, count: int) -> bool:
    """Whether a file can be read, and its arrays are of so many things."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        with np.load(path, allow_pickle=False) as archive:
            return bool(archive.files) and all(_length(archive, name) in (None, count) for name in archive.files)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False


def _length(archive: Any, name: str) -> int | None:
    """Of an array in an .npz, from its header; None of a single value."""
    with archive.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, kind = read(member)
        if kind.hasobject:
            raise ValueError(f"{name} holds objects")
        return shape[0] if shape else None
