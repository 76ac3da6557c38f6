"""The change of variables between schedules that share lambda: the same noised data, seen at another scale.

    x_t = alpha_t x_0 + sigma_t epsilon,    y_t = x_t / alpha_t = x_0 + r_t epsilon,    r_t = sigma_t / alpha_t

y is x in the variables of VE, whatever the schedule of x; x0 and epsilon are the same in both. So a denoiser of one is
a denoiser of the other, and a sampler that is a function of x0, epsilon and lambda takes the same steps in both. Knows
no network and no sampler.
"""

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Level, Prediction, Schedule, like


class Exploding(Schedule):
    """The VE schedule with the noise-to-signal ratios of another at all times: alpha = 1, sigma = r_t.

    Args:
        schedule: the other.
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
    """x_t under `of` -> the same noised data under `to`, (B, ...): x alpha_to / alpha_of. The two share lambda."""
    return like(to(t).alpha / of(t).alpha, x) * x


def carried_denoiser(denoise: Denoiser, of: Schedule, to: Schedule) -> Denoiser:
    """A denoiser under `of` as one under `to`. The two share lambda."""

    def denoise_there(x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        return denoise(carried(x_t, t, to, of), t, labels)

    return denoise_there
