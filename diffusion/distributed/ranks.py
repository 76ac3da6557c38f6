"""One process among the ranks of a command: its share of the work, and communication with the other ranks.

Training, sampling and evaluation may be spread over ranks. The result of a piece of work depends on the numbers of its
images only, not on the rank. This module lets ranks wait for each other, send results to rank 0, learn of a signal that
another rank has got, and end together when one fails. It does not know what the work is.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffusion.distributed.watchdog import Watchdog, exit_status

NEVER = timedelta(days=30)  # timeout of collectives; the watchdog ends processes that hang


class Abandoned(Exception):
    """The work was interrupted, because this rank or another one has got a signal to stop."""


class Ranks:
    """Rank `rank` of `size`.

    With more than one rank, torch's process group must be initialised, and all ranks must construct this together.

    Args:
        signal_number: returns the number of the signal that this process has got, or None.
        dog: the watchdog of this rank, which is started here; None for a single process.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        signal_number: Callable[[], int | None] = lambda: None,
        dog: Watchdog | None = None,
    ) -> None:
        self.rank, self.size, self._signal_number, self._dog = rank, size, signal_number, dog
        self._group = dist.new_group(backend="gloo", timeout=NEVER) if size > 1 else None
        if dog is not None:
            dog.start()

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers of the pieces of work of this rank, out of `count`."""
        return range(self.rank, count, self.size)

    # ---- collectives: every rank must call the same ones in the same order ----

    def largest(self, number: int = 0) -> int:
        """The largest of the numbers of all ranks. Waits for all ranks."""
        if self._group is None:
            return number
        word = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(word, dist.ReduceOp.MAX, self._group)
        return int(word)

    def collected(self, thing: Any) -> list[Any]:
        """The objects of all ranks, in the order of the ranks, on rank 0; [] on the others."""
        if self._group is None:
            return [thing]
        found = [None] * self.size if self.main else None
        dist.gather_object(thing, found, group=self._group, group_dst=0)
        return found or []

    def from_main(self, thing: Any) -> Any:
        """The object of rank 0, on all ranks."""
        if self._group is None:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    # ---- signals and failures ----

    def attend(self) -> None:
        """Report progress; call it often during long work.

        Raises:
            Abandoned: this rank or another one has got a signal.
        """
        self.working()
        if self._signal_number() or (self._dog is not None and self._dog.called):
            raise Abandoned

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context for work that all ranks share: all leave it together. If one raises Abandoned, all do."""
        abandoned = 0
        try:
            yield
        except Abandoned:
            abandoned = 1
        if self.largest(abandoned):
            raise Abandoned

    def signal(self) -> int:
        """The number of a signal that one of the ranks has got, or 0. Waits for all ranks."""
        return self.largest(self._signal_number() or 0)

    def step(self, step: int) -> None:
        """Report that this rank has finished a training step."""
        if self._dog is not None:
            self._dog.step(step)

    def working(self) -> None:
        """Report that this rank makes progress."""
        if self._dog is not None:
            self._dog.working()

    def failed(self, error: Exception) -> tuple[str | None, int]:
        """Report to the other ranks that this one has failed.

        Returns:
            The original cause, which may be the failure of another rank, or None for a single process; and the exit
            status, the same on all ranks.
        """
        return (None, exit_status(error)) if self._dog is None else self._dog.failed(error)

    def leave_together(self, seconds: float = 120.0) -> None:
        """Leave the group after all ranks have called this, or after `seconds` if one does not."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):  # a rank has ended
                dist.monitored_barrier(self._group, timedelta(seconds=seconds))
        self.leave()

    def leave(self) -> None:
        """Leave the group without waiting for other ranks."""
        if self._dog is not None:
            self._dog.stop()
            self._dog = None


def mark_progress() -> None:
    """Report to the batch script of a SLURM job that this start has saved something: remove the file of slurm/job.sh.

    Call it whenever something has been saved. Only processes on the node of the batch script can reach that file; rank
    0 is one of them.
    """
    mark = os.environ.get("DIFFUSION_NOT_YET")
    if mark:
        Path(mark).unlink(missing_ok=True)
