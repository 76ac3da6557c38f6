"""Handling of SIGTERM, SIGINT and SIGUSR1, from the first line of a command to its last.

Python runs a signal handler in the main thread, between two bytecode instructions. During a long call into C++ the
handler has to wait. So a separate thread reads the signals from a pipe, to which the interpreter writes at once:

    not held           the command ends: the main thread raises SystemExit. If the process has not ended after GRACE
                       seconds, the thread ends it
    held               the signal is recorded in `number`; the code that holds it finishes its current work and then
                       reads `number`
    Ctrl-C again       the thread ends the process at once

When the thread ends the process, it prints a line and kills. Files are complete or absent at any moment, locks end with
the process, and the processes that this one has started are killed too. The thread needs the interpreter lock for a
moment. torch releases it while it computes; loading a shared library does not, so that the response during imports can
be late.

Importing this module does not install handlers. It needs the standard library only.
"""

import atexit
import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from diffusion.notices import speaks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 1.2  # seconds for the main thread to end the process itself
STEP = "finishing and saving the current training step"
BATCH = "finishing and saving the current batch of images"
STOPPED_AT_ONCE = "Stopped at once. Run the same command to continue from what is on disk."
ECHO = 0.3  # seconds in which a second Ctrl-C counts as the same one, sent by the terminal and by a launcher
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides the cursor
CLEAR_LINE = "\r\x1b[2K"  # removes a progress bar or ^C

_there: list["Signals"] = []  # the handlers of this process; the last one is in charge


class Signals:
    """The signal handlers of this process, and the thread that responds.

    `with Signals() as signals:` restores the previous handlers at the end. Outside the main thread, where Python does
    not allow handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # number of the first signal
        self._holding: tuple[int, ...] = ()
        self._finishing = ""  # text: what the command does before it obeys a held signal
        self._unwinding = self._importing = self._over = False
        self._answered = threading.Event()  # set when the line is printed
        self._owner: int | None = None  # id of the process whose signals are handled

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._owner = os.getpid()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._answer, name="signals", daemon=True)
        self._thread.start()
        self._before_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        _prepare_for_forks()
        _there.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._owner != os.getpid():
            return
        _there.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._before_fd)
        os.write(self._writing, b"\0")
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for descriptor in (self._reading, self._writing):
            os.close(descriptor)
        self._owner = None

    # ---- for commands ----

    @contextmanager
    def held(self, numbers: Sequence[int] = SIGNALS, finishing: str = "finishing the current work") -> Iterator[None]:
        """Context in which these signals are recorded, not obeyed.

        finishing: what the command does before it obeys; printed when a signal comes.
        """
        before = self._holding, self._finishing
        self._holding, self._finishing = tuple(numbers), finishing
        try:
            yield
        finally:
            self._holding, self._finishing = before

    def obey(self) -> None:
        """End the process if a signal came while it was held."""
        if self.number is not None:
            raise SystemExit(128 + self.number)

    def over(self) -> None:
        """Declare the work complete and the exit status final. From now on only a second Ctrl-C has an effect."""
        self._over = True

    # ---- the main thread ----

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = int(number)
        if number in self._holding or self._over or self._unwinding:
            return
        if _within_an_import(frame):  # C++ code would turn the exception into another error
            self._importing = True
            return
        self._unwinding = True
        self._answered.wait(GRACE)
        raise SystemExit(128 + number)

    # ---- the thread ----

    def _answer(self) -> None:
        """Read the pipe until a 0 arrives."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        first: float | None = None  # when the first signal came
        deadline: float | None = None  # for the main thread to end the process
        ending = 0  # the signal for which it ends
        while True:
            numbers = os.read(self._reading, 64) if poll.poll(None if deadline is None else 20) else b""
            now = time.monotonic()
            for number in numbers:
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                held = number in self._holding or self._over
                if first is not None and number in self._impatient() and now - first > ECHO:
                    self._end(number, STOPPED_AT_ONCE if held else "")
                if self.number is None:
                    self.number = number
                if first is None:
                    say(self._answer_to(number, held))
                    self._answered.set()
                first = now if first is None else first
                if not held and deadline is None:
                    deadline, ending = now + GRACE, number
            if deadline is not None and (self._importing or now > deadline):
                if ending not in self._holding:
                    self._end(ending)
                deadline = None  # the main thread now holds the signal, and obeys at the end of that part

    def _impatient(self) -> tuple[int, ...]:
        """The signals as which a second Ctrl-C arrives. After the first, processes of torchrun get SIGTERM."""
        handed_on = "TORCHELASTIC_RUN_ID" in os.environ and self.number == signal.SIGINT
        return (signal.SIGINT, signal.SIGTERM) if handed_on else (signal.SIGINT,)

    def _answer_to(self, number: int, held: bool) -> str:
        if not held:
            return "Interrupted." if number == signal.SIGINT else f"Stopped by signal {number}."
        doing = "the command is ending" if self._over else self._finishing
        if number == signal.SIGINT:
            return f"Ctrl-C: {doing}. Press Ctrl-C again to stop at once."
        return f"Signal {number}: {doing}." + (" Press Ctrl-C to stop at once." if os.isatty(2) else "")

    def _end(self, number: int, line: str = "") -> None:
        """End the process at once, and the processes that it has started."""
        say(line, end=True)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(128 + number)


# ---- for a whole command ----


def install() -> None:
    """Handle the signals of this process until its end.

    Commands call this in their first line, because imports take seconds, and a Ctrl-C during them would print a
    traceback.
    """
    Signals().__enter__()
    atexit.register(ignore)  # registered first, so it runs last


@contextmanager
def handled() -> Iterator[Signals]:
    """The handlers of this process. If there are none, new ones for the duration of the context."""
    if _there:
        yield _there[-1]
        return
    with Signals() as signals:
        yield signals


def end_if_interrupted() -> None:
    """Raise SystemExit if a signal is ending the command.

    Call it before reporting an error, which may be a consequence of the signal.
    """
    for signals in _there:
        if signals._unwinding or signals._importing:
            raise SystemExit(128 + (signals.number or 0))


def ignore() -> None:
    """Ignore signals at the very end, when nothing is left to save, so that the exit status does not change."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---- details ----


def say(line: str, end: bool = False) -> None:
    """Print a line to stderr, on the first process only.

    It bypasses Python's file objects, because the main thread may hold their locks.
    """
    if speaks():
        terminal = os.isatty(2)
        text = (CLEAR_LINE if terminal and line else "") + (f"{line}\n" if line else "")
        with contextlib.suppress(OSError):
            os.write(2, (text + (SHOW_CURSOR if terminal and end else "")).encode())


def descendants(pid: int) -> list[int]:
    """The ids of the processes that this one has started, directly or indirectly, in the same session.

    W&B's service has a session of its own and ends by itself. Without /proc the list is empty; such processes end when
    they notice that their parent has ended.
    """
    parents: dict[int, int] = {}
    try:
        session = os.getsid(pid)
    except ProcessLookupError:
        return []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()  # state, parent, group, session, ...
            if int(fields[3]) == session:
                parents[int(path.parent.name)] = int(fields[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def _within_an_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@functools.cache
def _prepare_for_forks() -> None:
    """Register the handler for forks, once per process."""
    os.register_at_fork(after_in_child=_after_a_fork)


def _after_a_fork() -> None:
    """Reset the handlers in a forked child.

    The child has the pipe but not the thread, and must not write to the pipe. It ignores Ctrl-C and the signals that
    its parent held, because the parent handles them.
    """
    if not _there:
        return
    held = _there[-1]._holding
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT or number in held else signal.SIG_DFL)
    while _there:
        _there.pop()._close()
