"""The Gaussian kernels between two times s < t of x_t = alpha_t x_0 + sigma_t epsilon.

    q(x_t | x_0),    q(x_t | x_s),    q(x_s | x_t, x_0)

All three are given by the levels alone, for any pair of times and any schedule; with t - s = 1 and a VP schedule they
are the kernels of Ho et al. 2020, eqs. 2, 4, 6 and 7. Coefficients are float64. No network is known here.
"""

from typing import NamedTuple

from torch import Tensor

from diffusion.process.schedule import Level, Schedule, like


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
