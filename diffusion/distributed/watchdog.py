"""The watchdog: when one rank of a run fails, the other ranks end soon too, and report which rank failed and why.

Ranks wait for each other in every step. If one died, raised an error or hangs, the others would wait for hours. So each
rank has threads that report to the store of the run (`torch.distributed.TCPStore`) once per second that the process is
alive, its step, and its progress. Rank 0 decides whether the run has failed:

    a rank raised an error                     the rank reports the error itself
    a rank has sent no heartbeat               it was killed, or its machine failed
    no rank made progress for a long time      a collective hangs; the rank that is furthest behind is named

The verdict is written to the store; every rank prints it and ends. Ranks also learn through the store that one of them
has got a signal. This module knows steps and processes, and nothing about training.
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

BEAT = 1.0  # seconds between two heartbeats
ENDED, CALLED = "ended", "called"  # keys of the store: the verdict, and the number of a signal


class Watchdog:
    """The reporting threads of one rank. On rank 0 they also decide whether the run has failed.

    Args:
        rank: the rank of this process.
        ranks: number of ranks of the run.
        store: a separate connection to the store of the run.
        silence: seconds without a heartbeat after which a rank counts as dead.
        timeout: seconds without progress of any rank after which the run counts as hung; 0 means never.
        last_words: called before this process is ended, to finish what must not be left incomplete.
        ended: returns the exit status, by rank, of the processes that this one has started and that have ended.
        signal_number: returns the number of the signal that this process has got, or None.
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
        signal_number: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.rank, self.ranks, self.silence, self.timeout = rank, ranks, silence, timeout
        self.cause: str | None = None  # the verdict, once there is one
        self.status = 1  # the exit status of the verdict
        self.called: int | None = None  # the signal that a rank has got, if any
        self._store, self._last_words, self._ended = store, last_words, ended
        self._signal_number = signal_number
        self._step, self._progress = 0, 0
        self._beats = 0
        self._leaving = threading.Event()  # the work of this rank is complete: later events are not failures
        self._ends_process = True
        self._known: dict[int, tuple[Any, float]] = {}  # rank -> its last report, and the time of the last change
        self._moved = time.monotonic()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]

    def start(self) -> None:
        """Start the threads."""
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()

    def step(self, step: int) -> None:
        """Report that this rank has finished a step."""
        self._step = step
        self.working()

    def working(self) -> None:
        """Report that this rank makes progress, inside a step or outside."""
        self._progress += 1

    def failed(self, error: BaseException) -> tuple[str, int]:
        """Report to the other ranks that this one has failed.

        Returns:
            The original cause, which may be the failure of another rank, and its exit status.
        """
        self._ends_process = False
        if is_of_a_collective(error):  # may be the consequence of a failure of another rank
            deadline = time.monotonic() + self.silence + 10 * BEAT
            while self.cause is None and time.monotonic() < deadline:
                time.sleep(0.1)
        if self.cause is None:
            cause = f"rank {self.rank} failed at step {self._step}: {type(error).__name__}: {reason(error)}"
            self._judge(cause, exit_status(error))
            time.sleep(3 * BEAT)  # let the others read it, because the store may end with this process
        return self.cause or reason(error), self.status

    def stop(self) -> None:
        """End the threads: the work of this rank is complete."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(10 * BEAT)

    # ---- the threads ----

    def _talk(self) -> None:
        """Report and read, until this rank leaves. A store on a machine that hangs may never answer."""
        turn = time.monotonic()
        while not self._leaving.wait(BEAT):
            turn, before = time.monotonic(), turn
            if turn - before > self.silence / 2:  # this process was suspended, and perhaps the others too
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
                continue  # the store cannot be reached, perhaps only for a moment
        try:
            self._store.set(f"beat/{self.rank}", json.dumps(["over", 0, 0]))
        except (RuntimeError, ValueError, OSError):
            pass  # the others have already left

    def _watch(self) -> None:
        """End this process when there is a verdict, or when the store does not answer."""
        turn = time.monotonic()
        while not self._leaving.wait(BEAT):
            turn, before = time.monotonic(), turn
            if turn - before > self.silence / 2:
                self._answered = turn
            if self.cause is None and time.monotonic() - self._answered > self.silence:
                self.cause = "the store of the run does not answer: rank 0 or its machine has failed"
            if self.cause is not None:
                return self._end()

    def _relay(self) -> None:
        """Send the signal of this rank to the others, and read theirs."""
        if self._signal_number() and self.called is None:
            self._store.set(CALLED, str(self._signal_number()))
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
                return self._judge(f"rank {rank} (last at step {report[1]}) ended with {describe_exit(ended[rank])}")
            if now - since > self.silence:
                silent.append(rank)
        if silent:
            places = ", ".join(f"rank {rank} (last at step {steps[rank]})" for rank in silent)
            self._judge(f"{places} sent no heartbeat for {self.silence:g} s: it was killed, or its machine failed")
        elif steps and self.timeout and now - self._moved > self.timeout:
            behind = [rank for rank in steps if steps[rank] == min(steps.values())]
            where = ", ".join(f"rank {rank} at step {step}" for rank, step in steps.items())
            self._judge(
                f"no rank made progress for trainer.timeout={self.timeout:g} s; furthest behind: rank "
                f"{', '.join(map(str, behind))} ({where})"
            )

    def _judge(self, cause: str, status: int = 1) -> None:
        """Write the verdict to the store. If there is one already, that one is kept."""
        judgement = f"{status} {cause}"
        try:
            judgement = self._store.compare_set(ENDED, "", judgement).decode() or judgement
        except (RuntimeError, ValueError, OSError):
            pass
        self._take(judgement)

    def _take(self, judgement: str) -> None:
        """Take exit status and cause from the text in the store."""
        status, _, cause = judgement.partition(" ")
        self.status, self.cause = int(status), cause

    def _end(self) -> None:
        """End this process. Its main thread may be waiting inside a collective."""
        if not self._ends_process:
            return
        time.sleep(3 * BEAT)  # if the collective fails too, `failed` reports more
        if not self._ends_process or self._leaving.is_set():
            return
        print(f"error: {self.cause}. Rank {self.rank} ends at step {self._step}.", file=sys.stderr, flush=True)
        self._last_words()
        if self.rank == 0:
            time.sleep(3 * BEAT)  # this process holds the store
        os._exit(self.status)


def exit_status(error: BaseException) -> int:
    """The exit status for an error that ended a run: its attribute `exit_status`, or 1."""
    return getattr(error, "exit_status", 1)


def describe_exit(code: int) -> str:
    """Text for the return code of a process, as `subprocess` defines it: "signal 9" or "exit status 1"."""
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error comes from the communication between ranks, so that another rank may have caused it."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "process group", "Broken pipe", "store")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def connect(timeout: float = 5.0) -> "dist.Store":
    """A new connection to the store at MASTER_ADDR:MASTER_PORT, with the prefix "diffusion"."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=timeout)
    )
    return dist.PrefixStore("diffusion", store)


def forget(store: "dist.Store") -> None:
    """Delete the verdict and the signal of an earlier start from a store that outlives it, as torchrun's may.

    Rank 0 calls this before the other ranks have a watchdog.
    """
    for key in (ENDED, CALLED):
        store.delete_key(key)
