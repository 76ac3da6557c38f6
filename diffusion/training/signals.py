"""SIGTERM, SIGINT and SIGUSR1, from the first lines of a command to its last.

Outside of training a signal ends the process at once, with 128 + its number. Training holds them: a signal is noted,
the step under way is finished and saved, and then the run ends. Needs neither torch nor lightning.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """The handlers of this process; `with Signals() as signals:` puts back what was there before."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal that came
        self._holding = False

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
        if not self._holding or (again and number == signal.SIGINT):  # a second Ctrl-C is not to be waited for
            raise SystemExit(128 + number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal is noted and nothing else."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False


def ignore() -> None:
    """At the very end, when nothing is left to be saved: the exit status stands."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
