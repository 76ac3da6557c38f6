"""One process among those that do a thing together: which share is its own, and how they meet.

A run, a sampling or an evaluation may be spread over ranks. What one of them does depends on numbers of images alone;
here they wait for each other, hand results to rank 0, hear of a signal that another has got, and end together when one
fails. Knows nothing of what is done.
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

NEVER = timedelta(days=30)  # collectives wait; the watchdog ends them


class Abandoned(Exception):
    """Work that is not gone on with, because this rank or another has been told to stop."""


class Ranks:
    """Rank `rank` of `size`. With more than one, torch's process group must be there, and all make this at once.

    Args:
        told: the number of the signal that this process has got, or None.
        dog: the watchdog of this rank, which is started here; None where it is alone.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, told: Callable[[], int | None] = lambda: None, dog: Watchdog | None = None
    ) -> None:
        self.rank, self.size, self._told, self._dog = rank, size, told, dog
        self._group = dist.new_group(backend="gloo", timeout=NEVER) if size > 1 else None
        if dog is not None:
            dog.start()

    @property
    def main(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's."""
        return range(self.rank, count, self.size)

    # ---- meeting: every rank calls the same of these, in the same order ----

    def largest(self, number: int = 0) -> int:
        """Wait for all ranks; the largest number given."""
        if self._group is None:
            return number
        word = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(word, dist.ReduceOp.MAX, self._group)
        return int(word)

    def collected(self, thing: Any) -> list[Any]:
        """Those of all ranks on rank 0, in the order of the ranks; nothing on others."""
        if self._group is None:
            return [thing]
        found = [None] * self.size if self.main else None
        dist.gather_object(thing, found, group=self._group, group_dst=0)
        return found or []

    def from_main(self, thing: Any) -> Any:
        """What rank 0 gave."""
        if self._group is None:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    # ---- signals and failures ----

    def attend(self) -> None:
        """To be called often in long work: this rank gets on. Abandoned if it or another has been told to stop."""
        self.working()
        if self._told() or (self._dog is not None and self._dog.called):
            raise Abandoned

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that every rank has a share in: all leave it together, and if one abandons it, all do."""
        abandoned = 0
        try:
            yield
        except Abandoned:
            abandoned = 1
        if self.largest(abandoned):
            raise Abandoned

    def signal(self) -> int:
        """Wait for all ranks; the number of a signal that one of them has got, or 0."""
        return self.largest(self._told() or 0)

    def step(self, step: int) -> None:
        """This rank has finished a step of training."""
        if self._dog is not None:
            self._dog.step(step)

    def working(self) -> None:
        """This rank gets on."""
        if self._dog is not None:
            self._dog.working()

    def failed(self, error: Exception) -> tuple[str | None, int]:
        """This rank cannot go on: tell the others. The cause of it all, None where there are no others; and the exit
        status for it, the same on all ranks."""
        return (None, exit_status(error)) if self._dog is None else self._dog.failed(error)

    def part(self, seconds: float = 120.0) -> None:
        """The end: wait until every rank has come here, or until one has not for so long."""
        if self._group is not None:
            with contextlib.suppress(RuntimeError):  # one of them is gone
                dist.monitored_barrier(self._group, timedelta(seconds=seconds))
        self.leave()

    def leave(self) -> None:
        """The end, without waiting for anybody."""
        if self._dog is not None:
            self._dog.stop()
            self._dog = None


def got_on() -> None:
    """Tell the batch script of a SLURM job that this start has made progress which the next one finds: removes the file
    that slurm/job.sh looks for. To be called when something has been saved. Only a process on the node of the batch
    script reaches that file, as rank 0 does."""
    mark = os.environ.get("DIFFUSION_NOT_YET")
    if mark:
        Path(mark).unlink(missing_ok=True)
