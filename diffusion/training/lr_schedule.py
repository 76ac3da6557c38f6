"""The course of the learning rate: what share of `optimizer.lr` each optimizer step uses.

    rate of step n = lr * min((n + 1) / warmup_steps, 1) * course(n),    n = 0, 1, 2, ...

A course is a function of the step alone, so a resumed run goes on where it was.
"""

import math
from abc import ABC, abstractmethod

from diffusion.settings import Count, Number, Share, settings


class LearningRate(ABC):
    """Share of the learning rate by the number of the step, after a linear rise.

    Args:
        warmup_steps: of the rise; 0: none.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """The share that optimizer step `step` uses, counted from 0."""
        return min((step + 1) / max(self.warmup_steps, 1), 1.0) * self.course(step)

    @abstractmethod
    def course(self, step: int) -> float:
        """The share without the rise."""


@settings("lr_schedule")
class Constant(LearningRate):
    """The whole learning rate after the rise (Ho et al. 2020, app. B).

    Args:
        warmup_steps: of the rise; 0: none.
    """

    def __init__(self, warmup_steps: Number = 0) -> None:
        super().__init__(warmup_steps)

    def course(self, step: int) -> float:
        return 1.0


@settings("lr_schedule")
class Cosine(LearningRate):
    """Half a cosine from the whole rate at the end of the rise to a share of it at `num_steps` (Loshchilov & Hutter
    2017, SGDR, eq. 5, one period); that share from there on.

    Args:
        warmup_steps: of the rise; 0: none. num_steps: of the whole course, the rise included.
        final: share at its end.

    Raises:
        ValueError: the course is not longer than the rise.
    """

    def __init__(self, warmup_steps: Number = 0, num_steps: Count | None = None, final: Share = 0.0) -> None:
        super().__init__(warmup_steps)
        if num_steps is None or num_steps <= warmup_steps:
            raise ValueError(
                f"lr_schedule.num_steps={num_steps} must be above lr_schedule.warmup_steps={warmup_steps}."
            )
        self.num_steps, self.final = num_steps, final

    def course(self, step: int) -> float:
        done = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2


@settings("lr_schedule")
class InverseSqrt(LearningRate):
    """1 / sqrt(n + 1) after the rise, joined to it (Vaswani et al. 2017, sec. 5.3; Karras et al. 2024, EDM2, eq. 67).

    Args:
        warmup_steps: of the rise; 0: none. reference_steps: up to which the rate is whole; None: warmup_steps.
    """

    def __init__(self, warmup_steps: Number = 0, reference_steps: Count | None = None) -> None:
        super().__init__(warmup_steps)
        self.reference_steps = max(reference_steps or warmup_steps, 1)

    def course(self, step: int) -> float:
        return min(math.sqrt(self.reference_steps / (step + 1)), 1.0)
