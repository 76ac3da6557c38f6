"""Learning rate schedules: the factor on `optimizer.lr` at each optimizer step.

    rate of step n = lr * min((n + 1) / warmup_steps, 1) * course(n),    n = 0, 1, 2, ...

A schedule is a function of the step only, so that a resumed run continues with the same rates.
"""

import math
from abc import ABC, abstractmethod

from diffusion.settings import Count, Number, Share, settings


class LearningRate(ABC):
    """Base class of learning rate schedules, with linear warmup.

    Args:
        warmup_steps: number of warmup steps; 0 means no warmup.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        """The factor on the learning rate at optimizer step `step`, counted from 0."""
        return min((step + 1) / max(self.warmup_steps, 1), 1.0) * self.course(step)

    @abstractmethod
    def course(self, step: int) -> float:
        """The factor without the warmup."""


@settings("lr_schedule")
class Constant(LearningRate):
    """Constant learning rate after the warmup (Ho et al. 2020, app. B).

    Args:
        warmup_steps: number of warmup steps; 0 means no warmup.
    """

    def __init__(self, warmup_steps: Number = 0) -> None:
        super().__init__(warmup_steps)

    def course(self, step: int) -> float:
        return 1.0


@settings("lr_schedule")
class Cosine(LearningRate):
    """Cosine decay from the full rate after the warmup to `final` times that rate at `num_steps`.

    It stays there afterwards. Loshchilov & Hutter 2017, SGDR, eq. 5, one period.

    Args:
        warmup_steps: number of warmup steps; 0 means no warmup.
        num_steps: step at which the decay ends, counted from the start of the warmup.
        final: factor at the end, in [0, 1].

    Raises:
        ValueError: num_steps is not above warmup_steps.
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
    """Inverse square root decay: min(sqrt(reference_steps / (n + 1)), 1), after the warmup.

    Vaswani et al. 2017, sec. 5.3; Karras et al. 2024, EDM2, eq. 67.

    Args:
        warmup_steps: number of warmup steps; 0 means no warmup.
        reference_steps: number of steps at the full rate, before the decay; None means warmup_steps.
    """

    def __init__(self, warmup_steps: Number = 0, reference_steps: Count | None = None) -> None:
        super().__init__(warmup_steps)
        self.reference_steps = max(reference_steps or warmup_steps, 1)

    def course(self, step: int) -> float:
        return min(math.sqrt(self.reference_steps / (step + 1)), 1.0)
