"""SIGTERM, SIGINT and SIGUSR1, from the first lines of a command to its last.

Python runs the handler of a signal in the main thread, between two of its instructions: during a long call into C++ it
waits. So a thread of its own reads the signals from a pipe, which the interpreter fills at once, and answers them:

    nothing is held    the command ends: the main thread unwinds, and if it has not ended in GRACE seconds, the thread
                       ends the process
    held               the signal is noted, what is under way is finished, and whoever holds it looks at `number`
    Ctrl-C again       the thread ends the process at once

An end by the thread is a kill with a line of explanation: files are whole or absent at any moment, locks go with the
process, and no process that this one has started is left. The thread needs the interpreter for a moment, which torch
gives up while it computes. Loading a shared library does not, so an answer during the imports can be late by that.

Importing this module installs nothing. Needs the standard library only, and neither torch nor lightning.
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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE = 1.2  # seconds for the main thread to end the process by itself
STEP = "the training step under way is finished and saved first"
BATCH = "the batch of images under way is finished and saved first"
ECHO = 0.3  # seconds in which a further Ctrl-C is the same one, sent by the terminal and by a launcher
SHOW_CURSOR = "\x1b[?25h"  # which a progress bar has hidden
CLEAR_LINE = "\r\x1b[2K"  # of a progress bar, or of ^C

_there: list["Signals"] = []  # those that handle the signals of this process, the last first in charge


class Signals:
    """The handlers of this process and the thread that answers; `with Signals() as signals:` puts back what was there
    before. In another thread than the main one, where Python allows no handlers, it changes nothing."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal that came
        self._holding: tuple[int, ...] = ()
        self._finishing = ""  # what is done before a held signal is obeyed, in words
        self._unwinding = self._importing = self._over = False
        self._answered = threading.Event()  # the line has been said
        self._owner: int | None = None  # the process whose signals these are

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

    # ---- what a command says ----

    @contextmanager
    def held(
        self, numbers: Sequence[int] = SIGNALS, finishing: str = "what is under way is finished first"
    ) -> Iterator[None]:
        """Inside, one of these signals is noted, and the user told what is done before it is obeyed."""
        before = self._holding, self._finishing
        self._holding, self._finishing = tuple(numbers), finishing
        try:
            yield
        finally:
            self._holding, self._finishing = before

    def obey(self) -> None:
        """End the process, if a signal has come while it was held."""
        if self.number is not None:
            raise SystemExit(128 + self.number)

    def over(self) -> None:
        """The work is done and the exit status stands: from now on only a second Ctrl-C changes anything."""
        self._over = True

    # ---- the main thread ----

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = int(number)
        if number in self._holding or self._over or self._unwinding:
            return
        if _within_an_import(frame):  # C++ would make something else of an exception
            self._importing = True
            return
        self._unwinding = True
        self._answered.wait(GRACE)
        raise SystemExit(128 + number)

    # ---- the thread ----

    def _answer(self) -> None:
        """Read the pipe until it says 0."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        first: float | None = None  # when the first signal came
        deadline: float | None = None  # for the main thread to end the process
        ending = 0  # the signal it is to end by
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
                    self._end(number, "Stopped at once; the same command goes on from what is on disk." if held else "")
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
                deadline = None  # the main thread has come to a part that holds it, and obeys at its end

    def _impatient(self) -> tuple[int, ...]:
        """What a second Ctrl-C comes as. torchrun's processes get the first from their agent, and then SIGTERM."""
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
        """End the process as a kill does, and those that it has started."""
        say(line, end=True)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(128 + number)


# ---- for a whole command ----


def install() -> None:
    """Answer the signals of this process until its end. For the first line of a command that is run as one: imports
    take seconds, and Python answers a Ctrl-C during them with a traceback."""
    Signals().__enter__()
    atexit.register(ignore)  # first in, last out


@contextmanager
def handled() -> Iterator[Signals]:
    """Those that handle the signals of this process; where nobody does, new ones for as long as this lasts."""
    if _there:
        yield _there[-1]
        return
    with Signals() as signals:
        yield signals


def end_if_interrupted() -> None:
    """For where an error is about to be reported: if a signal is ending the command, the error comes of that."""
    for signals in _there:
        if signals._unwinding or signals._importing:
            raise SystemExit(128 + (signals.number or 0))


def ignore() -> None:
    """At the very end, when nothing is left to be saved: the exit status stands."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---- details ----


def say(line: str, end: bool = False) -> None:
    """A line to the terminal or the log, by the first process of a run alone. Past Python's files, whose locks the main
    thread may hold."""
    if speaks():
        terminal = os.isatty(2)
        text = (CLEAR_LINE if terminal and line else "") + (f"{line}\n" if line else "")
        with contextlib.suppress(OSError):
            os.write(2, (text + (SHOW_CURSOR if terminal and end else "")).encode())


def speaks() -> bool:
    """Whether this process is the first of those that a launcher has started, by what that has set; alone it is."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # also within a task of srun: in the order of processes.environment
        names: tuple[str, ...] = ("RANK",)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID",)
    else:
        names = ("LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in names)


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have, but for the sessions of others (as W&B's
    service, which ends by itself). Where there is no /proc: none; they notice that their parent is gone."""
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
    """Once a process, when its signals are handled for the first time."""
    os.register_at_fork(after_in_child=_after_a_fork)


def _after_a_fork() -> None:
    """A forked child has the pipe but not the thread, and is not to write into the first. A Ctrl-C is its parent's to
    answer, as is what that held when it forked."""
    if not _there:
        return
    held = _there[-1]._holding
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT or number in held else signal.SIG_DFL)
    while _there:
        _there.pop()._close()
