"""results.jsonl, with one line per score: reading and checking lines, adding and removing them.

The file may be edited by hand, or damaged. A line that is not a valid result is ignored, with one warning. Adding and
removing results never changes such a line.
"""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from diffusion.files import MOST_TEXT, locked, read_regular, write_atomically
from diffusion.notices import warn

NUMBERS = (
    "value", "reference", "real_value", "real_std", "real_images", "num_images", "num_reference", "num_steps",
    "visits", "nfe", "seed", "step", "parameters", "guidance_scale", "eta", "num_classes", "image_size",
    "reverse_steps", "standard_error",
)  # fmt: skip
TEXTS = (
    "name", "metric", "by", "data", "split", "weights", "sampler", "extractor", "extractor_sha256", "spacing",
    "variance", "convention", "rounding", "commit", "likelihood", "objective", "prediction", "schedule", "neighbours",
)  # fmt: skip
Row = dict[str, Any]


def parsed(line: str) -> Row | None:
    """The result in a line, or None if the line is not a valid result.

    A valid result is a JSON object with name, metric and a finite value, and each known field has the right type.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("name", "metric")):
        return None
    if not _finite(row.get("value")):
        return None
    numbers = (key for key in row if key in NUMBERS or key.endswith("_std"))
    sound = all(row[key] is None or _finite(row[key]) for key in numbers)
    sound = sound and all(isinstance(row.get(key, ""), str | None) for key in TEXTS)
    sound = sound and isinstance(row.get("versions", {}), dict | None)
    sound = sound and isinstance(row.get("per_class", []), list | None)
    sound = sound and all(v is None or _finite(v) for v in row.get("per_class") or ())
    sound = sound and type(row.get("step", 0)) in (int, type(None))
    return row if sound and _plain(row) else None


def _finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _plain(row: Row) -> bool:
    """Whether every value is a finite scalar, or a list or dict of such scalars, so that it can be displayed."""

    def scalar(value: Any) -> bool:
        return value is None or isinstance(value, str | bool) or _finite(value)

    return all(
        scalar(v)
        or (isinstance(v, list) and all(map(scalar, v)))
        or (isinstance(v, dict) and all(map(scalar, v.values())))
        for v in row.values()
    )


def lock_beside(path: Path) -> Path:
    """Path of the lock of a results file outside of a run folder."""
    return path.with_name(f".{path.name}.lock")


def _line(row: Row, path: Path) -> str:
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError:
        wrong = next((k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)), "a number")
        what = f"{wrong}={row[wrong]}" if wrong in row else wrong
        raise ValueError(
            f"No result was added to {path}: {what} of the result {row.get('name')} is not finite."
        ) from None


class Results:
    """The results in a file.

    Args:
        path: path of results.jsonl.
        locked: returns a context that holds the lock of the file.
    """

    @classmethod
    def of_file(cls, path: Path, named: str) -> Self:
        """The results of a file outside of a run folder, with a lock file beside it. named: as in `files.locked`."""
        return cls(path, lambda: locked(lock_beside(path), named, wait=True))

    def __init__(self, path: Path, locked: Callable[[], AbstractContextManager]) -> None:
        self.path, self._locked = path, locked
        self._named: set[int] = set()  # numbers of the invalid lines that a warning has named

    def _lines(self) -> list[str]:
        """The lines of the file, unchanged; bytes that are not UTF-8 are preserved."""
        if not self.path.is_file():
            return []
        text = read_regular(self.path, MOST_TEXT).decode("utf-8", errors="surrogateescape")
        return [line for line in text.split("\n") if line.strip()]

    def rows(self) -> list[Row]:
        """All results. Invalid lines are named in a warning, each once, by the first process."""
        found, invalid = [], []
        for number, line in enumerate(self._lines(), 1):
            row = parsed(line)
            if row is not None:
                found.append(row)
            elif number not in self._named:
                invalid.append(number)
        if invalid:
            self._named |= set(invalid)
            one = f"line {invalid[0]} is not a valid result and is"
            several = f"{len(invalid)} lines, the first of them line {invalid[0]}, are not valid results and are"
            warn(f"{self.path}: {one if len(invalid) == 1 else several} ignored.")
        return found

    def add(self, rows: Iterable[Row]) -> None:
        """Add results. The file is written atomically, so that a kill leaves either all of them or none.

        Raises:
            ValueError: a number is not finite, which JSON does not support. Nothing is added then.
        """
        lines = [_line(row, self.path) for row in rows]
        with self._locked():
            self._write(self._lines() + lines)

    def remove(self, unwanted: Callable[[Row], bool]) -> None:
        """Remove the results for which `unwanted` is true."""
        with self._locked():
            lines = self._lines()
            kept = [line for line in lines if (row := parsed(line)) is None or not unwanted(row)]
            if len(kept) < len(lines):
                self._write(kept)

    def _write(self, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(self.path, text.encode("utf-8", errors="surrogateescape"))
