"""Exchange of numbers between the ranks of a run at every step, without waiting.

The numbers use a gloo group of their own, in parallel with the gradients. They are sent after one step and read after
the next, when they have arrived. So all ranks act on the same numbers at the same step.
"""

import torch
import torch.distributed as dist


class Agreement:
    """Computes the maximum of numbers over all ranks, one step late; without delay for a single rank.

    Args:
        ranks: number of ranks. With more than one, the process group must be initialised.
    """

    def __init__(self, ranks: int) -> None:
        self._group = dist.new_group(backend="gloo") if ranks > 1 else None
        self.later = ranks > 1  # whether `exchange` returns the numbers of the step before
        self._sent: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *numbers: int) -> list[int]:
        """Send the numbers of this step, none negative. Returns the maxima of the step before, which are 0 at first."""
        if self._group is None:
            return list(numbers)
        received = self.settle() or [0] * len(numbers)
        word = torch.tensor(numbers, dtype=torch.int64)
        self._sent = word, dist.all_reduce(word, dist.ReduceOp.MAX, self._group, async_op=True)
        return received

    def settle(self) -> list[int] | None:
        """The maxima of the numbers sent last, now; None if there are none. All ranks must call this together."""
        if self._sent is None:
            return None
        (word, work), self._sent = self._sent, None
        work.wait()
        return word.tolist()
