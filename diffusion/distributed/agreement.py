"""What the ranks of a run tell each other at every step, without waiting for one another.

The numbers go over a gloo group of their own, beside the gradients: they are sent after one step and read after the
next, when they have long arrived, so all ranks act on the same numbers at the same step.
"""

import torch
import torch.distributed as dist


class Agreement:
    """The largest of each number over all ranks, one step late; at once where there is a single rank.

    Args:
        ranks: of the run. With more than one the process group must be there.
    """

    def __init__(self, ranks: int) -> None:
        self._group = dist.new_group(backend="gloo") if ranks > 1 else None
        self.later = ranks > 1  # whether what comes back is of the step before
        self._sent: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *numbers: int) -> list[int]:
        """Give this step's numbers (not negative) and get those of the step before, all zero at first."""
        if self._group is None:
            return list(numbers)
        met = self.settle() or [0] * len(numbers)
        word = torch.tensor(numbers, dtype=torch.int64)
        self._sent = word, dist.all_reduce(word, dist.ReduceOp.MAX, self._group, async_op=True)
        return met

    def settle(self) -> list[int] | None:
        """What was given last, now: of all ranks, or of none."""
        if self._sent is None:
            return None
        (word, work), self._sent = self._sent, None
        work.wait()
        return word.tolist()
