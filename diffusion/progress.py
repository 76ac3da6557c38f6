"""Progress of a task on stderr: a bar at a terminal, else a line every 15 seconds. Durations and counts as text."""

import sys
import time
from typing import Any, Self

SECONDS = 15.0  # between two lines, without a terminal


def counted(number: int, one: str, many: str) -> str:
    """A number with the singular or the plural of its noun: "1 image", "12,000 images"."""
    return f"{number:,} {one if number == 1 else many}"


def duration(seconds: float) -> str:
    """A duration in words, like 0 s, 82 ms, 1.25 s, 12 s, 3 min 5 s, 2 h 10 min."""
    if 0 < seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if 0 < seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{:,} h {} min".format(*divmod(round(seconds / 60), 60))


class Progress:
    """A context manager that shows the progress of a task, and at its end how long the task took, unless it failed.

    Args:
        title: name of the task, like "sampling".
        total: number of units of the whole task.
        unit: what is counted, like "images".
        begun: units done before this start; None means the number in the first call of `to`.
        ranks: number of processes with equal shares. The count of this one is multiplied by it.
        shown: False prints nothing, as on all ranks except 0.
        summary: whether to print the summary at the end, without a terminal.
    """

    def __init__(
        self, title: str, total: int, unit: str = "images", begun: int | None = 0, ranks: int = 1, shown: bool = True,
        summary: bool = True,
    ) -> None:  # fmt: skip
        self.title, self.total, self.unit, self.ranks, self.shown, self.summary = (
            title, total, unit, ranks, shown, summary,
        )  # fmt: skip
        self.begun, self.done = begun, 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._began = self._printed = time.monotonic()
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")]
            columns += [TextColumn("left"), TimeRemainingColumn()]
            self._bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task("", total=self.total, completed=self.begun or 0, figures=self.unit)
            self._bar.start()
        return self

    def add(self, number: int = 1, figures: str | None = None) -> None:
        """Report `number` more units as done.

        Args:
            figures: text shown instead of the rate.
        """
        self.to(self.begun + self.done + number, figures)

    def to(self, done: int, figures: str | None = None) -> None:
        """Report `done` units as done in total, including those before this start. `figures` is as in `add`."""
        now = time.monotonic()
        if self.begun is None:
            self.begun, self._began = done, now
        self.done = done - self.begun
        if self._bar is not None:
            shown = f"{self.unit} {figures or self.rate()}".strip()
            self._bar.update(self._task, completed=self._of_all(), figures=shown)
        elif now - self._printed >= SECONDS:
            self._printed = now
            self.line(figures)

    def line(self, figures: str | None = None) -> None:
        """Print a line with the progress, if there is no bar."""
        if not self.shown or self._bar is not None:
            return
        done, spent = self._of_all(), time.monotonic() - self._began
        left = (self.total - done) * spent / max(done - self.begun, 1)
        state = f"{self.title} {done:,}/{self.total:,} {self.unit}".rstrip()
        print(f"{state}  {figures or self.rate()}  {duration(left)} left", file=sys.stderr, flush=True)

    def rate(self) -> str:
        """Units per second of all ranks, like "30.8 images/s"."""
        each = self.done * self.ranks / max(time.monotonic() - self._began, 1e-9)
        return f"{each:,.1f} {self.unit}/s"

    def _of_all(self) -> int:
        return min(self.begun + self.done * self.ranks, self.total)

    def __exit__(self, error: Any, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown and self.summary and error is None:
            spent = time.monotonic() - self._began
            there = max(self.total - self.done, 0) if self.ranks == 1 else 0
            known = f", {there} of them existed" if there else ""
            rate = f" ({self.rate()})" if self.done else ""
            print(f"{self.title}: {self.total} {self.unit} in {spent:.1f} s{rate}{known}", file=sys.stderr)
