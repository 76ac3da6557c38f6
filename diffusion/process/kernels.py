"""The Gaussian kernels between two times s < t of x_t = alpha_t x_0 + sigma_t epsilon.

    q(x_t | x_0),    q(x_t | x_s),    q(x_s | x_t, x_0)

All three are given by the levels alone, for any pair of times and any schedule; with t - s = 1 and a VP schedule they
are the kernels of Ho et al. 2020, eqs. 2, 4, 6 and 7. So is the width of the reverse step p(x_s | x_t), whose mean is
that of the third at a predicted x_0. Coefficients are float64. No network is known here.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion.errors import Refusal
from diffusion.process.schedule import Level, Schedule, like

Variance = Literal["small", "large", "learned"]


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(x_t * `x_t` + x_0 * `x0`, std^2): two coefficients and a standard deviation, float64."""

    x_t: Tensor
    x0: Tensor
    std: Tensor


def noised(schedule: Schedule, x0: Tensor, t: float | Tensor, epsilon: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t epsilon (Ho et al. 2020, eq. 4). x0, epsilon (B, ...), t a float or (B,)."""
    alpha, sigma = schedule(t)
    return like(alpha, x0) * x0 + like(sigma, x0) * epsilon


def transition(schedule: Schedule, t: float | Tensor, s: float | Tensor) -> Level:
    """q(x_t | x_s) = N(alpha x_s, sigma^2), s <= t: alpha = alpha_t / alpha_s, sigma^2 = sigma_t^2 - alpha^2 sigma_s^2.

    With t - s = 1 under VP, alpha^2 = 1 - beta_t and sigma^2 = beta_t.

    Raises:
        ValueError: s > t, both numbers.
    """
    (alpha_t, sigma_t), (alpha_s, _) = schedule(t), schedule(s)
    return Level(alpha_t / alpha_s, sigma_t * (1 - _kept(schedule, t, s) ** 2).sqrt())


def posterior(schedule: Schedule, t: float | Tensor, s: float | Tensor) -> Posterior:
    """q(x_s | x_t, x_0), s <= t, t > 0 (Ho et al. 2020, eqs. 6 and 7, for any stride and schedule).

    With r = (alpha_t / sigma_t) / (alpha_s / sigma_s), the share of the old noise direction that survives,

        x_s = alpha_s x_0 + sigma_s (r epsilon + sqrt(1 - r^2) z),    epsilon = (x_t - alpha_t x_0) / sigma_t

    At s = 0 it is x_0 itself: coefficients 0 and 1, no noise.

    Raises:
        ValueError: s > t, both numbers.
    """
    (_, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    r = _kept(schedule, t, s)
    return Posterior(r * sigma_s / sigma_t, alpha_s * (1 - r**2), sigma_s * (1 - r**2).sqrt())


def reverse_std(
    schedule: Schedule, t: float | Tensor, s: float | Tensor, variance: str = "small", share: Tensor | None = None
) -> Tensor:
    """Standard deviation of the reverse step p(x_s | x_t), s < t: float64 of t's shape, or like `share`.

    At s = 0 the posterior has no width, where the discretised decoder of x_0 needs one. There the posterior's of the
    step from 2 to 1 stands in: for "small", for "large", and as the lower end of "learned" (code of Ho et al. 2020 and
    of Nichol & Dhariwal 2021, for their VP schedules; on the dense ladders of VE it is a good deal too narrow).

    Args:
        variance: "small": the posterior's (beta tilde; optimal for data at one point). "large": the forward kernel's
            from s to t (beta_t under VP, 1 - alpha_bar_t / alpha_bar_s over a stride; optimal for white-noise data).
            "learned": between the two, linearly in their logarithms (Nichol & Dhariwal 2021, eq. 15).
        share: v of that equation for each pixel, as `Prediction.variance`: 0 is small, 1 large. Read by "learned" only.
    """
    clean = s <= 0
    if isinstance(clean, Tensor):
        above, below = torch.where(clean, 2, t), torch.where(clean, 1, s)
    else:
        above, below = (2, 1) if clean else (t, s)
    small = posterior(schedule, above, below).std
    if variance == "small":
        return small
    large = transition(schedule, t, s).sigma
    if variance == "large":
        return torch.where(clean, small, large) if isinstance(clean, Tensor) else small if clean else large
    return (share * like(large.log(), share) + (1 - share) * like(small.log(), share)).exp()


def needs_learned_variance(key: str) -> Refusal:
    """What is raised where a setting asks for a learned variance of a network that predicts none."""
    return Refusal(
        f"{key}=learned: this network predicts no variance; give small or large, or train with objective=hybrid."
    )


def renoised(schedule: Schedule, x_s: Tensor, s: float | Tensor, t: float | Tensor, epsilon: Tensor) -> Tensor:
    """x_t drawn from q(x_t | x_s), upward: the marginal law at t if x_s has that at s. Shapes as `noised`."""
    alpha, sigma = transition(schedule, t, s)
    return like(alpha, x_s) * x_s + like(sigma, x_s) * epsilon


def _kept(schedule: Schedule, t: float | Tensor, s: float | Tensor) -> Tensor:
    """r above, in [0, 1]: square root of the ratio of the signal-to-noise ratios at t and s."""
    if not isinstance(t, Tensor) and not isinstance(s, Tensor) and s > t:
        raise ValueError(f"times t={t}, s={s}: the kernel between them needs s <= t.")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    return (alpha_t * sigma_s) / (alpha_s * sigma_t)
