"""Samplers of second order along the probability flow, in the variables in which it is plainest.

With x / alpha and r = sigma / alpha the flow is d(x / alpha) / dr = epsilon (Song et al. 2021, DDIM, eq. 14): DDIM at
eta = 0 is its Euler step. Both samplers here are Euler steps with a better slope.
"""

from collections.abc import Sequence

from torch import Tensor

from diffusion.process.schedule import Denoiser, RandomNormal
from diffusion.samplers.base import Past, Sampler


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


class AdamsBashforth(FlowSampler):
    """Two steps' memory: the slope is extrapolated from the present epsilon and the one before (Liu et al. 2022, PNDM,
    eq. 12, at second order, for steps of any lengths). One call a step; the first step is DDIM's.

    Args:
        schedule: noise levels.
    """

    memory = 1

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        slope = denoise(x_t, t).epsilon
        if past:
            step, before = self.ratio(s) - self.ratio(t), self.ratio(t) - self.ratio(past[0].t)
            slope = slope + step / (2 * before) * (slope - past[0].prediction.epsilon)
        return self.moved(x_t, t, s, slope)


class Heun(FlowSampler):
    """No memory, two calls a step: the mean of the slopes at both ends (Karras et al. 2022, alg. 1). The step to s = 0,
    where there is no epsilon, is DDIM's.

    Args:
        schedule: noise levels.
    """

    calls_per_step = 2

    def calls(self, times: Sequence[float]) -> int:
        return super().calls(times) - (times[-1] == 0)

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        slope = denoise(x_t, t).epsilon
        if s == 0:
            return self.moved(x_t, t, s, slope)
        return self.moved(x_t, t, s, (slope + denoise(self.moved(x_t, t, s, slope), s).epsilon) / 2)
