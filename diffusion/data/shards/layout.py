"""The division of a global batch: into lanes for the order, into ranks and micro-batches for the work. Integers only.

`data.batch_size` = B is the number of images per optimizer step over all ranks. Slot j is one of the B places of a
global batch; k = step * B + j is a place in the endless stream. With R ranks and A micro-batches per step, a
micro-batch has B / (R A) slots: those of micro-batch a of rank r start at r B/R + a B/(R A). So R and A do not change
the data of a step.
"""

from dataclasses import dataclass

import numpy as np

from diffusion.progress import counted

MOST_LANES = 64


def choose_lanes(num_shards: int, batch_size: int) -> int:
    """The default number of lanes: the largest power of two up to min(shards, 64) that divides B.

    It affects the order of the data. So it depends on the data set and the batch size, but not on the ranks.
    """
    lanes = 1
    while lanes * 2 <= min(num_shards, MOST_LANES) and batch_size % (lanes * 2) == 0:
        lanes *= 2
    return lanes


def check_lanes(lanes: int, batch_size: int) -> None:
    """Raise ValueError unless the number of lanes divides the batch size."""
    if lanes < 1 or batch_size % lanes:
        raise ValueError(
            f"data.lanes={lanes} does not divide data.batch_size={batch_size}. Each lane must contribute the same "
            f"number of images to every batch. Leave data.lanes out, or give one of {_divisors(batch_size)}."
        )


def check_batch(batch_size: int, ranks: int, accumulate: int = 1) -> None:
    """Raise ValueError unless a global batch can be divided into `ranks` x `accumulate` equal micro-batches."""
    if batch_size < 1:
        raise ValueError(f"data.batch_size={batch_size} must be at least 1: it is the images per optimizer step.")
    if accumulate < 1:
        raise ValueError(f"trainer.accumulate={accumulate} must be at least 1: it is the micro-batches per step.")
    parts = ranks * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        nearest = " or ".join(f"data.batch_size={size}" for size in (below, below + parts) if size)
        raise ValueError(
            f"data.batch_size={batch_size} is not divisible by {counted(ranks, 'rank', 'ranks')} (trainer.devices x "
            f"trainer.num_nodes) x trainer.accumulate={accumulate}. Give {nearest}."
        )


@dataclass(frozen=True)
class Layout:
    """The slots of rank `rank` of `ranks`, with `accumulate` micro-batches per step.

    Raises:
        ValueError: the batch size is not divisible by ranks x accumulate.
    """

    batch_size: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.ranks
        check_batch(self.batch_size, self.ranks, self.accumulate)

    @property
    def micro_batch_size(self) -> int:
        """Images per micro-batch of one rank."""
        return self.batch_size // (self.ranks * self.accumulate)

    def slots(self, step: int) -> np.ndarray:
        """The places in the endless stream of the part of this rank in global batch `step`: int64 (B / R,)."""
        size = self.batch_size // self.ranks
        first = step * self.batch_size + self.rank * size
        return np.arange(first, first + size, dtype=np.int64)

    def places(self, micro_step: int) -> np.ndarray:
        """The places in the endless stream of micro-batch `micro_step` of this rank: int64 (micro_batch_size,)."""
        step, micro_batch = divmod(micro_step, self.accumulate)
        first = step * self.batch_size + (self.rank * self.accumulate + micro_batch) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size, dtype=np.int64)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, MOST_LANES) + 1) if n % d == 0]
