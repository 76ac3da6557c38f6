"""The distribution of noise levels in training, and the weight of each level in the loss.

    t = levels.draw(keys),    loss = levels.weight_at(t, objective) * objective(...)

Both depend only on the keys and the time of an image. The papers draw t uniformly from 1 ... T. Continuous-time models
draw lambda = log(alpha / sigma), and t is then any real time in [1, T].
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from diffusion.noise import uniform, uniform_int
from diffusion.objective import Objective
from diffusion.process.schedule import Schedule
from diffusion.settings import Positive, settings

Weight = Literal["one", "min_snr"]


class Levels(ABC):
    """A distribution of noise levels on a schedule, and their weights.

    Args:
        schedule: noise levels.
        weight: "one" keeps the weight of the objective. "min_snr" gives the squared error of x0 the weight
            min(SNR, gamma) (Hang et al. 2023, eq. 8), for any prediction and any weight of the objective.
        gamma: upper limit of the weight; the paper uses 5.
    """

    whole = True  # whether the times are integers

    def __init__(self, schedule: Schedule, weight: str, gamma: float) -> None:
        self.schedule, self.weight, self.gamma = schedule, weight, gamma

    @abstractmethod
    def draw(self, keys: Tensor) -> Tensor:
        """Draw a time in [1, T] for each key, (B,), on the device of the keys."""

    def weight_at(self, t: Tensor, objective: Objective) -> Tensor | None:
        """The factor on the loss of the objective at these times: float64 (B,), or None if it is 1 everywhere.

        Raises:
            ValueError: weight is "min_snr", and the loss of the objective is not a weighted squared error.
        """
        if self.weight == "one":
            return None
        own = objective.x0_weight(t)
        if own is None:
            raise ValueError(
                f"levels.weight={self.weight} cannot be used with this objective "
                f"({type(objective).__name__}): its loss is not a weighted squared error. Give levels.weight=one, or "
                f"another objective, for example objective=epsilon."
            )
        alpha, sigma = self.schedule(t)
        return ((alpha / sigma) ** 2).clamp(max=self.gamma) / own


@settings("levels")
class Uniform(Levels):
    """t uniform on the integers 1 ... T (Ho et al. 2020, alg. 1).

    Args:
        schedule, weight, gamma: as in `Levels`.
    """

    def __init__(self, schedule: Schedule, weight: Weight = "one", gamma: Positive = 5.0) -> None:
        super().__init__(schedule, weight, gamma)

    def draw(self, keys: Tensor) -> Tensor:
        return 1 + uniform_int(keys, self.schedule.num_timesteps)


@settings("levels")
class LogNormal(Levels):
    """lambda = log(alpha / sigma) from N(mean, std^2), truncated to the range of the schedule.

    Karras et al. 2022, table 1: for alpha = 1, log sigma has mean -1.2 and standard deviation 1.2.

    Args:
        schedule, weight, gamma: as in `Levels`.
        mean, std: mean and standard deviation of lambda.

    Raises:
        ValueError: no lambda of the schedule is within about ten std of the mean.
    """

    whole = False

    def __init__(
        self,
        schedule: Schedule,
        weight: Weight = "one",
        gamma: Positive = 5.0,
        mean: float = 1.2,
        std: Positive = 1.2,
    ) -> None:
        super().__init__(schedule, weight, gamma)
        self.mean, self.std = mean, std
        ends = [float(schedule.log_ratio(t)) for t in (schedule.num_timesteps, 1)]
        self._low, self._high = (0.5 * math.erfc((mean - end) / (std * math.sqrt(2))) for end in ends)
        if not self._high - self._low > 1e-20:
            raise ValueError(
                f"levels.mean={mean}, levels.std={std} draws no noise level of this schedule, whose lambda is in "
                f"[{ends[0]:.3g}, {ends[1]:.3g}]. Give levels.mean inside this range, or a larger levels.std."
            )

    def draw(self, keys: Tensor) -> Tensor:
        share = uniform(keys).double() + 2.0**-25
        inside = (self._low + share * (self._high - self._low)).clamp(1e-300, 1 - 2.0**-53)
        found = self.schedule.time_of(self.mean + self.std * torch.special.ndtri(inside))
        return found.clamp(1, self.schedule.num_timesteps)
