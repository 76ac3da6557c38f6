"""The Gaussian kernels between two times s < t of x_t = alpha_t x_0 + sigma_t epsilon.

    q(x_t | x_0),    q(x_t | x_s),    q(x_s | x_t, x_0)

All three are determined by the levels, for any pair of times and any schedule. With t - s = 1 and a VP schedule they
are the kernels of Ho et al. 2020, eqs. 4, 2, 6 and 7. The reverse step p(x_s | x_t) has the mean of the third kernel at
a predicted x_0; its standard deviation (`reverse_std`) is determined by the levels too. Coefficients are float64. This
module knows no network.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion.errors import Refusal
from diffusion.process.schedule import Level, Schedule, like

Variance = Literal["small", "large", "learned"]


class Posterior(NamedTuple):
    """The kernel N(x_t * `x_t` + x_0 * `x0`, std^2) of x_s: two coefficients and a standard deviation, float64."""

    x_t: Tensor
    x0: Tensor
    std: Tensor


def noised(schedule: Schedule, x0: Tensor, t: float | Tensor, epsilon: Tensor) -> Tensor:
    """Noise x0 to time t: alpha_t x_0 + sigma_t epsilon (Ho et al. 2020, eq. 4).

    Args:
        x0, epsilon: (B, ...). t: a float or (B,).
    """
    alpha, sigma = schedule(t)
    return like(alpha, x0) * x0 + like(sigma, x0) * epsilon


def transition(schedule: Schedule, t: float | Tensor, s: float | Tensor) -> Level:
    """The alpha and sigma of q(x_t | x_s) = N(alpha x_s, sigma^2), s <= t.

    alpha = alpha_t / alpha_s and sigma^2 = sigma_t^2 - alpha^2 sigma_s^2. With t - s = 1 under VP, alpha^2 = 1 - beta_t
    and sigma^2 = beta_t.

    Raises:
        ValueError: s > t. Checked only if both are numbers, not tensors.
    """
    (alpha_t, sigma_t), (alpha_s, _) = schedule(t), schedule(s)
    return Level(alpha_t / alpha_s, sigma_t * (1 - _kept(schedule, t, s) ** 2).sqrt())


def posterior(schedule: Schedule, t: float | Tensor, s: float | Tensor) -> Posterior:
    """The kernel q(x_s | x_t, x_0) for s <= t, t > 0 (Ho et al. 2020, eqs. 6 and 7, for any stride and schedule).

    With r = (alpha_t / sigma_t) / (alpha_s / sigma_s), the share of epsilon that x_s keeps,

        x_s = alpha_s x_0 + sigma_s (r epsilon + sqrt(1 - r^2) z),    epsilon = (x_t - alpha_t x_0) / sigma_t

    At s = 0, x_s is x_0 itself: the coefficients are 0 and 1, without noise.

    Raises:
        ValueError: s > t. Checked only if both are numbers, not tensors.
    """
    (_, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    r = _kept(schedule, t, s)
    return Posterior(r * sigma_s / sigma_t, alpha_s * (1 - r**2), sigma_s * (1 - r**2).sqrt())


def reverse_std(
    schedule: Schedule, t: float | Tensor, s: float | Tensor, variance: str = "small", share: Tensor | None = None
) -> Tensor:
    """Standard deviation of the reverse step p(x_s | x_t), s < t: float64 of the shape of t, or like `share`.

    At s = 0 the posterior has standard deviation 0, but the discretised decoder of x_0 needs a positive one. There the
    posterior of the step from 2 to 1 is used: for "small", for "large", and as the lower end of "learned" (code of Ho
    et al. 2020 and of Nichol & Dhariwal 2021, for their VP schedules; for dense VE ladders this is much too narrow).

    Args:
        variance: "small" is the variance of the posterior (beta tilde), optimal for data at one point. "large" is that
            of the forward kernel from s to t (beta_t under VP, 1 - alpha_bar_t / alpha_bar_s over a stride), optimal
            for white-noise data. "learned" interpolates linearly between their logarithms (Nichol & Dhariwal 2021,
            eq. 15).
        share: v of that equation for each pixel, as `Prediction.variance`: 0 is small, 1 is large. Used by "learned"
            only.
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
    """The error for a setting that needs a learned variance, if the network does not predict one. key: the setting."""
    return Refusal(
        f"{key}=learned: this network does not predict a variance. Give {key}=small or {key}=large, or train with "
        "objective=hybrid."
    )


def renoised(schedule: Schedule, x_s: Tensor, s: float | Tensor, t: float | Tensor, epsilon: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_s), s <= t. If x_s has the marginal distribution at s, x_t has that at t.

    Args:
        x_s, epsilon: (B, ...). s, t: floats or (B,).
    """
    alpha, sigma = transition(schedule, t, s)
    return like(alpha, x_s) * x_s + like(sigma, x_s) * epsilon


def _kept(schedule: Schedule, t: float | Tensor, s: float | Tensor) -> Tensor:
    """The r of `posterior`, in [0, 1]: square root of the ratio of the signal-to-noise ratios at t and s."""
    if not isinstance(t, Tensor) and not isinstance(s, Tensor) and s > t:
        raise ValueError(f"times t={t}, s={s}: s must not be above t.")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    return (alpha_t * sigma_s) / (alpha_s * sigma_t)
