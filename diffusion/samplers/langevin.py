"""Langevin dynamics: sampling from a law whose score is known, by moves along the score and noise.

    x + h score + sqrt(2 h) z,    score = -epsilon / sigma_t

A step that stays, s = t, is one such update of the law at time t. A step down, s < t, is the update, and then x is
relabelled as being at s: x alpha_s / alpha_t, which is x itself under VE. How often a level is visited is said by the
times, `process.grids`. With h as a share of sigma_t^2 an update is the same under VP and VE:

    x_t - share sigma_t epsilon + sqrt(2 share) sigma_t z

Written in other papers with h / 2 and sqrt(h); see `annealed`.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, RandomNormal, Schedule, like
from diffusion.samplers.base import Past, Sampler
from diffusion.settings import Positive, settings

NODES = ((0.06943184420297371, 0.17392742256872693), (0.33000947820757187, 0.32607257743127307))
"""Gauss and Legendre's rule of four nodes on [0, 1]: the lower two with their weights; the others mirror them."""


class LangevinDynamics(Sampler):
    """Langevin updates whose length is for the subclass to say.

    Raises:
        ValueError: a step goes up, s > t.
    """

    @abstractmethod
    def share(self, t: float, epsilon: Tensor, z: Tensor) -> float | Tensor:
        """h / sigma_t^2: a number, or one per image, (B,). epsilon predicted, z the update's noise, both (B, ...)."""

    def update(self, denoise: Denoiser, x_t: Tensor, t: float, randn: RandomNormal) -> Tensor:
        """One update that stays at t."""
        sigma = self.schedule(t).sigma
        epsilon, z = denoise(x_t, t).epsilon, randn(x_t)
        share = like(torch.as_tensor(self.share(t, epsilon, z), dtype=torch.float64), x_t)
        return x_t - share * sigma * epsilon + (2 * share).sqrt() * sigma * z

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        if s > t:
            raise ValueError(f"times t={t}, s={s}: Langevin dynamics stays or goes down, s <= t.")
        return self.relabelled(self.update(denoise, x_t, t, randn), t, s)

    def relabelled(self, x: Tensor, t: float, s: float) -> Tensor:
        """x at t as x at s, with the same x / alpha."""
        return x if s == t else x * (self.schedule(s).alpha / self.schedule(t).alpha)


@settings("sampler")
class Langevin(LangevinDynamics):
    """Unadjusted Langevin dynamics with one and the same h at all times.

    On N(m, v) it settles at the variance v / (1 - h / (2 v)) instead of v, and runs away from h = 2 v on.

    Args:
        schedule: noise levels.
        step_size: h, in units of x^2.

    Raises:
        ValueError: step_size is not positive.
    """

    def __init__(self, schedule: Schedule, step_size: Positive) -> None:
        super().__init__(schedule)
        self.step_size = step_size

    def share(self, t: float, epsilon: Tensor, z: Tensor) -> float:
        return self.step_size / float(self.schedule(t).sigma) ** 2


class MetropolisLangevin(Langevin):
    """Langevin dynamics whose updates are taken or refused (Metropolis and Hastings), so that h does not show in the
    law that it settles at: MALA (Roberts & Tweedie 1996). An image whose update is refused stays where it is.

    The log of the ratio of densities, where no density is known, is the integral of the score along the straight line
    to the proposal, by Gauss and Legendre's rule of four nodes: exact for scores that are of degree 7 along it. It is
    that ratio for a score that is a gradient, which a network's is nearly.

    Args:
        schedule: noise levels.
        step_size: h, in units of x^2. Of D independent numbers of variance v most is made by 1.36 v D^(-1/3), at which
            57 % of the proposals are taken (Roberts & Rosenthal 1998).
        log_density: log q(x) at time t, (B,), up to a constant; None: by the score, four calls of the denoiser more.

    Raises:
        ValueError: step_size is not positive.
    """

    def __init__(
        self, schedule: Schedule, step_size: Positive, log_density: Callable[[Tensor, float], Tensor] | None = None
    ) -> None:
        super().__init__(schedule, step_size)
        self.log_density = log_density
        self.calls_per_step = 2 if log_density is not None else 2 + 2 * len(NODES)

    def update(self, denoise: Denoiser, x_t: Tensor, t: float, randn: RandomNormal) -> Tensor:
        h, sigma = self.step_size, self.schedule(t).sigma

        def score(x: Tensor) -> Tensor:
            return -denoise(x, t).epsilon / sigma

        here, z = score(x_t), randn(x_t)
        proposal = x_t + h * here + math.sqrt(2 * h) * z
        there = score(proposal)
        back = (x_t - proposal - h * there) / math.sqrt(2 * h)  # the noise that would lead back
        log_ratio = self._gain(score, x_t, proposal, t) + (_sum(z**2) - _sum(back**2)) / 2
        log_uniform = torch.special.log_ndtr(randn(x_t.new_empty(len(x_t))))
        taken = (log_uniform < log_ratio).reshape(-1, *[1] * (x_t.ndim - 1))
        return torch.where(taken, proposal, x_t)

    def _gain(self, score: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, t: float) -> Tensor:
        """log q(y) - log q(x) at time t, (B,)."""
        if self.log_density is not None:
            return self.log_density(y, t) - self.log_density(x, t)
        line = torch.zeros_like(x)
        for node, weight in NODES:
            line += weight * (score(torch.lerp(x, y, node)) + score(torch.lerp(x, y, 1 - node)))
        return _sum(line * (y - x))


def _sum(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.reshape(len(values), -1).sum(1)
