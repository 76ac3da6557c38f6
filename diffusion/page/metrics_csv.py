"""The columns of metrics.csv, and long curves made short enough to draw."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from diffusion.files import STEP, read_csv
from diffusion.progress import counted

MAX_POINTS = 240  # of a curve; a longer one becomes means over stretches, with a band from the lowest to the highest


class Metrics:
    """metrics.csv: by column, the steps at which it has a finite value, and the values.

    steps: of all rows, rising. notes: what is to be said of rows that cannot be drawn.
    """

    def __init__(self, steps: list[int], columns: dict[str, tuple[list[int], list[float]]], notes: list[str]) -> None:
        self.steps, self.columns, self.notes = steps, columns, notes

    @classmethod
    def read(cls, path: Path) -> "Metrics":
        steps: list[int] = []
        columns: dict[str, tuple[list[int], list[float]]] = {}
        broken = 0
        rows, unread = read_csv(path) if path.is_file() else ([], 0)
        for row in rows:
            step = row.pop("step", "")
            if not STEP.fullmatch(step):
                unread += 1
                continue
            steps.append(int(step))
            values = {k: number(v) for k, v in row.items() if v}
            broken += any(not math.isfinite(v) for v in values.values())
            for name, value in values.items():
                if math.isfinite(value):
                    at, found = columns.setdefault(name, ([], []))
                    at.append(int(step))
                    found.append(value)
        notes = []
        if unread:
            notes.append(f"Not drawn: {counted(unread, 'damaged line', 'damaged lines')} of metrics.csv.")
        if len(steps) > MAX_POINTS:
            each = round(len(steps) / MAX_POINTS, 1)
            notes.append(f"Lines are means of about {each:g} rows each, bands their lowest and highest.")
        if broken:
            rows = counted(broken, "row", "rows")
            notes.append(f"Not drawn: values that are no finite numbers, in {rows} of metrics.csv.")
        return cls(steps, columns, notes)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values); two empty lists for a column that is not there."""
        return self.columns.get(name, ([], []))


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Curve(NamedTuple):
    """What is drawn of a column: at each x a mean, and the lowest and highest value it stands for."""

    x: list[float]
    low: list[float]
    mean: list[float]
    high: list[float]


def thinned(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> Curve:
    """The curve itself up to `limit` points; of a longer one `limit` stretches of (nearly) as many points each."""
    parts = min(limit, len(x))
    cuts = [i * len(x) // parts for i in range(parts + 1)]
    stretches = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return Curve(
        [fmean(x[s]) for s in stretches],
        [min(y[s]) for s in stretches],
        [fmean(y[s]) for s in stretches],
        [max(y[s]) for s in stretches],
    )
