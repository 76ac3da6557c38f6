"""Change of variables between schedules of the same lambda_t: the same noised data at another scale.

    x_t = alpha_t x_0 + sigma_t epsilon,    y_t = x_t / alpha_t = x_0 + r_t epsilon,    r_t = sigma_t / alpha_t

y is x in the variables of VE, for any schedule of x. x0 and epsilon are the same in both. So a denoiser of one is also
a denoiser of the other, and a sampler that is a function of x0, epsilon and lambda takes the same steps in both. This
module knows no network and no sampler.
"""

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Level, Prediction, Schedule, like


class Exploding(Schedule):
    """The VE schedule with the noise-to-signal ratio r_t of another schedule at all times: alpha = 1, sigma = r_t.

    Args:
        schedule: the other schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule.num_timesteps)
        self._of = schedule

    def _level(self, t: Tensor) -> Level:
        alpha, sigma = self._of(t)
        return Level(torch.ones_like(alpha), sigma / alpha)

    def _time(self, log_ratio: Tensor) -> Tensor:
        return self._of.time_of(log_ratio)


def carried(x: Tensor, t: float | Tensor, of: Schedule, to: Schedule) -> Tensor:
    """Convert x_t, (B, ...), from the schedule `of` to the schedule `to`: x alpha_to / alpha_of.

    Both schedules must have the same lambda_t.
    """
    return like(to(t).alpha / of(t).alpha, x) * x


def carried_denoiser(denoise: Denoiser, of: Schedule, to: Schedule) -> Denoiser:
    """Convert a denoiser of the schedule `of` to one of the schedule `to`. Both must have the same lambda_t."""

    def denoise_there(x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        return denoise(carried(x_t, t, to, of), t, labels)

    return denoise_there
