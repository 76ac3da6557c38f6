"""How a global batch is cut up: lanes for the order, ranks and micro-batches for the work. Integers only.

`data.batch_size` = B counts the images of one optimizer step over all ranks. Slot j of a global batch is one of its B
places; place k = step * B + j is one of the endless stream. R ranks with A micro-batches each take B / (R A) slots at
a time: micro-batch a of rank r has the slots from r B/R + a B/(R A) on, so neither number changes what is trained on.
"""

from dataclasses import dataclass

import numpy as np

MOST_LANES = 64


def choose_lanes(num_shards: int, batch_size: int) -> int:
    """The number of lanes of a run that sets none: the largest power of two up to min(shards, 64) that divides B.

    It is part of the order of the data, so it follows from the data set and the batch, never from the ranks.
    """
    lanes = 1
    while lanes * 2 <= min(num_shards, MOST_LANES) and batch_size % (lanes * 2) == 0:
        lanes *= 2
    return lanes


def check_lanes(lanes: int, batch_size: int) -> None:
    """Raise ValueError unless the lanes divide the batch."""
    if lanes < 1 or batch_size % lanes:
        raise ValueError(
            f"data.lanes={lanes} does not divide data.batch_size={batch_size}: each lane gives as many images to "
            f"every batch. Leave data.lanes unset, or take one of {_divisors(batch_size)}."
        )


def check_batch(batch_size: int, ranks: int, accumulate: int = 1) -> None:
    """Raise ValueError unless a global batch divides into `ranks` x `accumulate` equal micro-batches."""
    if batch_size < 1:
        raise ValueError(f"data.batch_size={batch_size} is not positive: it counts the images of one optimizer step.")
    if accumulate < 1:
        raise ValueError(f"trainer.accumulate={accumulate} is not positive: it counts the micro-batches of a step.")
    parts = ranks * accumulate
    if batch_size % parts:
        below = batch_size // parts * parts
        nearest = " or ".join(str(size) for size in (below, below + parts) if size)
        raise ValueError(
            f"data.batch_size={batch_size} does not divide by {ranks} ranks (trainer.devices x trainer.num_nodes) x "
            f"trainer.accumulate={accumulate}: the nearest batch sizes that do are {nearest}."
        )


@dataclass(frozen=True)
class Layout:
    """The slots that one rank takes: `rank` of `ranks`, each step in `accumulate` micro-batches.

    Raises:
        ValueError: the global batch does not divide by ranks x accumulate.
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
        """Images of one micro-batch of one rank."""
        return self.batch_size // (self.ranks * self.accumulate)

    def slots(self, step: int) -> np.ndarray:
        """Places in the endless stream of this rank's part of global batch number `step`: int64 (B / R,)."""
        size = self.batch_size // self.ranks
        first = step * self.batch_size + self.rank * size
        return np.arange(first, first + size, dtype=np.int64)

    def places(self, micro_step: int) -> np.ndarray:
        """Places in the endless stream of this rank's micro-batch number `micro_step`: int64 (micro_batch_size,)."""
        step, micro_batch = divmod(micro_step, self.accumulate)
        first = step * self.batch_size + (self.rank * self.accumulate + micro_batch) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size, dtype=np.int64)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, MOST_LANES) + 1) if n % d == 0]
