"""Samplers of second order along the probability flow, in the variables in which it is plainest.

With x / alpha and r = sigma / alpha the flow is d(x / alpha) / dr = epsilon (Song et al. 2021, DDIM, eq. 14): DDIM at
eta = 0 is its Euler step. Both samplers here are Euler steps with a better slope.
"""

from typing import Literal

from torch import Tensor

from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Past, Sampler
from diffusion.settings import settings

Start = Literal["ddim", "heun"]


class FlowSampler(Sampler):
    """A sampler that moves along a slope of the flow."""

    def ratio(self, t: float) -> Tensor:
        """r = sigma / alpha at t."""
        level = self.schedule(t)
        return level.sigma / level.alpha

    def moved(self, x_t: Tensor, t: float, s: float, slope: Tensor) -> Tensor:
        """x_s, from x_t along this slope, like an epsilon."""
        alpha_t, alpha_s = self.schedule(t).alpha, self.schedule(s).alpha
        return alpha_s * (x_t / alpha_t + (self.ratio(s) - self.ratio(t)) * slope)

    def mean_slope(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, slope: Tensor) -> Tensor:
        """Heun's: the mean of the slope at t and of that where it leads to at s > 0. One call of the denoiser."""
        return (slope + denoise(self.moved(x_t, t, s, slope), s).epsilon) / 2


@settings("sampler")
class AdamsBashforth(FlowSampler):
    """Two steps' memory: the slope is extrapolated from the present epsilon and the one before (Liu et al. 2022, PNDM,
    eq. 12, at second order, for steps of any lengths). One call a step.

    Args:
        schedule: noise levels.
        start: a step without a past, as the first is: "ddim", of first order; "heun", of second order, which takes one
            call more (none more where it goes to s = 0, where there is no epsilon).

    Raises:
        ValueError: start is neither.
    """

    memory = 1

    def __init__(self, schedule: Schedule, start: Start = "ddim") -> None:
        super().__init__(schedule)
        self.start = start

    def calls_of_step(self, t: float, s: float, past: int = 0) -> int:
        return 2 if self.starts_by_heun(s, past) else 1

    def starts_by_heun(self, s: float, past: int) -> bool:
        """Whether a step to s with so many moments of the past is Heun's."""
        return self.start == "heun" and not past and s > 0

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        slope = denoise(x_t, t).epsilon
        if past:
            step, before = self.ratio(s) - self.ratio(t), self.ratio(t) - self.ratio(past[0].t)
            slope = slope + step / (2 * before) * (slope - past[0].prediction.epsilon)
        elif self.starts_by_heun(s, len(past)):
            slope = self.mean_slope(denoise, x_t, t, s, slope)
        return self.moved(x_t, t, s, slope)


class Heun(FlowSampler):
    """No memory, two calls a step: the mean of the slopes at both ends (Karras et al. 2022, alg. 1). The step to s = 0,
    where there is no epsilon, is DDIM's.

    Args:
        schedule: noise levels.
    """

    def calls_of_step(self, t: float, s: float, past: int = 0) -> int:
        return 1 + (s > 0)

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        slope = denoise(x_t, t).epsilon
        return self.moved(x_t, t, s, self.mean_slope(denoise, x_t, t, s, slope) if s > 0 else slope)
