"""SIGTERM, SIGINT and SIGUSR1, from the first lines of a command to its last.

Outside of training a signal ends the process at once, with 128 + its number. Training holds them: a signal is noted,
the step under way is finished and saved, and then the run ends. Of several ranks, SIGTERM is held also while a run is
checked and built: it may come because another rank has been refused, as this one is about to be. Needs neither torch
nor lightning.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """The handlers of this process; `with Signals() as signals:` puts back what was there before."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal that came
        self._holding: tuple[int, ...] = ()

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None
        if not again:
            self.number = int(number)
        impatient = again and number == signal.SIGINT  # a second Ctrl-C
        if impatient or number not in self._holding:
            raise SystemExit(128 + number)

    @contextmanager
    def held(self, numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
        """Inside, one of these signals is noted and nothing else."""
        before, self._holding = self._holding, tuple(numbers)
        try:
            yield
        finally:
            self._holding = before

    def obey(self) -> None:
        """End the process, if a signal has come while it was held."""
        if self.number is not None:
            raise SystemExit(128 + self.number)


def ignore() -> None:
    """At the very end, when nothing is left to be saved: the exit status stands."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
