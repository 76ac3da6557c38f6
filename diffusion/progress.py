"""How far a piece of work is, on stderr: a bar at a terminal, else a line now and then; and durations in words."""

import sys
import time
from typing import Any, Self

SECONDS = 15.0  # between two lines where there is no terminal


def duration(seconds: float) -> str:
    """0 s, 82 ms, 1.25 s, 12 s, 3 min 5 s, 2 h 10 min."""
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
    """Progress of work that is counted. A context: its end says how long the work took, unless it failed.

    Args:
        title: of the work, as "sampling". unit: what is counted, as "images".
        total: number of all units. begun: units done before; None: as many as the first `to` says.
        ranks: processes with equal shares, of which this is one: its count stands for all.
        shown: False: say nothing, as on all ranks but the first.
        summary: whether the end is said, where there is no terminal.
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
        """So many more units are done.

        Args:
            figures: shown in place of the rate.
        """
        self.to(self.begun + self.done + number, figures)

    def to(self, done: int, figures: str | None = None) -> None:
        """So many units are done in all, those before this start included. Arguments as `add`."""
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
        """Print where the work is, where there is no bar."""
        if not self.shown or self._bar is not None:
            return
        done, spent = self._of_all(), time.monotonic() - self._began
        left = (self.total - done) * spent / max(done - self.begun, 1)
        counted = f"{self.title} {done:,}/{self.total:,} {self.unit}".rstrip()
        print(f"{counted}  {figures or self.rate()}  {duration(left)} left", file=sys.stderr, flush=True)

    def rate(self) -> str:
        """Units of all ranks per second, as "30.8 images/s"."""
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
            known = f", {there} of them were there" if there else ""
            rate = f" ({self.rate()})" if self.done else ""
            print(f"{self.title}: {self.total} {self.unit} in {spent:.1f} s{rate}{known}", file=sys.stderr)
