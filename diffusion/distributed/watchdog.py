"""When one rank of a run fails, the others end too, soon, and say which and why.

Ranks wait for each other in every step: one that died, raised or hangs would leave the rest waiting for hours. So each
has threads that report to the run's store (`torch.distributed.TCPStore`) once a second that its process lives, where
it stands and whether it gets on; rank 0's judges:

    a rank raised                              it says so itself
    a rank has given no sign of life           it was killed, or its machine is gone
    no rank has got on for a long time         a collective hangs; the rank that is furthest behind is named

A judgement is written into the store, every rank prints it and ends its process. By the same way they hear that one of
them has got a signal. This module knows steps and processes, and nothing of what is trained.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from diffusion.files import reason

BEAT = 1.0  # seconds between two signs of life
ENDED, CALLED = "ended", "called"  # keys of the store


class Watchdog:
    """The reporting threads of one rank, and on rank 0 the judge.

    Args:
        rank, ranks: of this process, of the run.
        store: a connection of its own to the run's store.
        silence: seconds without a sign of life after which a rank counts as dead.
        timeout: seconds in which no rank gets on after which the run counts as hung; 0 waits for ever.
        last_words: called before this process is ended, for what must not be left half done.
        ended: exit status, by rank, of the processes that this one has started and that are over.
        told: the number of the signal that this process has got, or None.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        store: "dist.Store",
        silence: float = 20.0,
        timeout: float = 1800.0,
        last_words: Callable[[], None] = lambda: None,
        ended: Callable[[], dict[int, int]] = dict,
        told: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.rank, self.ranks, self.silence, self.timeout = rank, ranks, silence, timeout
        self.cause: str | None = None  # the judgement, once there is one
        self.status = 1  # the exit status that goes with it
        self.called: int | None = None  # the signal that a rank has got, once one has
        self._store, self._last_words, self._ended, self._told = store, last_words, ended, told
        self._step, self._progress = 0, 0
        self._beats = 0
        self._leaving = threading.Event()  # training is over here: whatever happens now is nobody's failure
        self._ends_process = True
        self._known: dict[int, tuple[Any, float]] = {}  # rank -> its last report, and when that last changed
        self._moved = time.monotonic()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]

    def start(self) -> None:
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()

    def step(self, step: int) -> None:
        """This rank has finished a step."""
        self._step = step
        self.working()

    def working(self) -> None:
        """This rank gets on, inside a step or outside of one."""
        self._progress += 1

    def failed(self, error: BaseException) -> tuple[str, int]:
        """This rank cannot go on: tell the others. The cause of it all, which may be another rank's, and the exit
        status for it."""
        self._ends_process = False
        if is_of_a_collective(error):  # another rank's end shows here first
            deadline = time.monotonic() + self.silence + 10 * BEAT
            while self.cause is None and time.monotonic() < deadline:
                time.sleep(0.1)
        if self.cause is None:
            cause = f"rank {self.rank} failed at step {self._step}: {type(error).__name__}: {reason(error)}"
            self._judge(cause, exit_status(error))
            time.sleep(3 * BEAT)  # the others have seen it before the store may go with this process
        return self.cause or reason(error), self.status

    def stop(self) -> None:
        """Training is over on this rank."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(10 * BEAT)

    # ---- the threads ----

    def _talk(self) -> None:
        """Report and listen, until this rank leaves. A store on a machine that hangs may never answer."""
        turn = time.monotonic()
        while not self._leaving.wait(BEAT):
            turn, before = time.monotonic(), turn
            if turn - before > self.silence / 2:  # so long was this process stopped, and perhaps all of them
                self._known, self._moved = {}, turn
            try:
                self._report()
                if self._store.check([ENDED]):
                    self._take(self._store.get(ENDED).decode())
                elif self.rank == 0:
                    self._look_at_the_others()
                self._relay()
                self._answered = time.monotonic()
            except (RuntimeError, ValueError, OSError):
                continue  # out of reach, perhaps for a moment
        try:
            self._store.set(f"beat/{self.rank}", json.dumps(["over", 0, 0]))
        except (RuntimeError, ValueError, OSError):
            pass  # the others have left before

    def _watch(self) -> None:
        """End this process when there is a judgement, or when nobody answers any more."""
        turn = time.monotonic()
        while not self._leaving.wait(BEAT):
            turn, before = time.monotonic(), turn
            if turn - before > self.silence / 2:
                self._answered = turn
            if self.cause is None and time.monotonic() - self._answered > self.silence:
                self.cause = "the store of the run does not answer: rank 0, or its machine, is gone"
            if self.cause is not None:
                return self._end()

    def _relay(self) -> None:
        """Tell the others of a signal, and hear of theirs."""
        if self._told() and self.called is None:
            self._store.set(CALLED, str(self._told()))
        if self._store.check([CALLED]):
            self.called = int(self._store.get(CALLED))

    def _report(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", json.dumps([self._beats, self._step, self._progress]))

    def _look_at_the_others(self) -> None:
        now, silent, steps, ended = time.monotonic(), [], {}, self._ended()
        for rank in range(self.ranks):
            key = f"beat/{rank}"
            report = json.loads(self._store.get(key)) if self._store.check([key]) else [0, 0, 0]
            last, since = self._known.get(rank, (None, now))
            if report != last:
                if last is None or report[2] != last[2]:
                    self._moved = now
                self._known[rank] = last, since = report, now
            if report[0] == "over":
                continue
            steps[rank] = report[1]
            if rank in ended:
                return self._judge(f"rank {rank} (last at step {report[1]}) has ended with {how(ended[rank])}")
            if now - since > self.silence:
                silent.append(rank)
        if silent:
            places = ", ".join(f"rank {rank} (last at step {steps[rank]})" for rank in silent)
            self._judge(f"{places} has given no sign of life for {self.silence:g} s: killed, or its machine is gone")
        elif steps and self.timeout and now - self._moved > self.timeout:
            behind = [rank for rank in steps if steps[rank] == min(steps.values())]
            where = ", ".join(f"rank {rank} at step {step}" for rank, step in steps.items())
            self._judge(
                f"no rank has got on for trainer.timeout={self.timeout:g} s; furthest behind: rank "
                f"{', '.join(map(str, behind))} ({where})"
            )

    def _judge(self, cause: str, status: int = 1) -> None:
        """The first judgement stands."""
        judgement = f"{status} {cause}"
        try:
            judgement = self._store.compare_set(ENDED, "", judgement).decode() or judgement
        except (RuntimeError, ValueError, OSError):
            pass
        self._take(judgement)

    def _take(self, judgement: str) -> None:
        """Exit status and cause, as they are in the store."""
        status, _, cause = judgement.partition(" ")
        self.status, self.cause = int(status), cause

    def _end(self) -> None:
        """End this process, whose own thread may be waiting inside a collective."""
        if not self._ends_process:
            return
        time.sleep(3 * BEAT)  # if the collective has failed as well, `failed` says it better
        if not self._ends_process or self._leaving.is_set():
            return
        print(f"error: {self.cause}. Rank {self.rank} ends at step {self._step}.", file=sys.stderr, flush=True)
        self._last_words()
        if self.rank == 0:
            time.sleep(3 * BEAT)  # the store lives here
        os._exit(self.status)


def exit_status(error: BaseException) -> int:
    """The exit status of a run that an error has ended: 1, unless its class says otherwise."""
    return getattr(error, "exit_status", 1)


def how(code: int) -> str:
    """The way a process has ended, by its exit status as `subprocess` has it."""
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error came out of the communication between ranks, and so perhaps from another rank's end."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "process group", "Broken pipe", "store")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def connect(timeout: float = 5.0) -> "dist.Store":
    """A connection of one's own to the store at MASTER_ADDR:MASTER_PORT, under a prefix of our own."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=timeout)
    )
    return dist.PrefixStore("diffusion", store)


def forget(store: "dist.Store") -> None:
    """What an earlier start of the run has left in a store that outlives it, as torchrun's may. By rank 0, before the
    others have a watchdog."""
    for key in (ENDED, CALLED):
        store.delete_key(key)
