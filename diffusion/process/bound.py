"""The terms of the variational bound on -log2 p(x_0), in bits per dimension (Ho et al. 2020, eq. 5).

    L_T + sum over t = T..2 of L_{t-1} + L_0

    L_T      KL(q(x_T | x_0) || p(x_T)), which does not depend on the network
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    L_0      -log2 p(x_0 | x_1): the mass of a Gaussian on the bin of a uint8 level

The mean of p(x_{t-1} | x_t) is the mean of q at a predicted x_0, so that the error of x_0 determines it. Objectives
compute one term at a random time, likelihoods compute all terms. This module knows no network.
"""

import math

import torch
from torch import Tensor

from diffusion.process.kernels import posterior, reverse_std
from diffusion.process.schedule import Schedule, like

HALF_BIN = 1 / 255  # uint8 levels lie 2/255 apart in [-1, 1]
OUTERMOST = 0.999  # |x0| above this is the first or the last level
BIT = math.log(2)


def gaussian_kl(gap: Tensor, q_std: Tensor, p_std: Tensor) -> Tensor:
    """KL(N(m, q_std^2) || N(m + gap, p_std^2)) of each element, in nats.

    With log r = log(q_std^2 / p_std^2): (r - 1 - log r + gap^2 / p_std^2) / 2, computed without cancellation near r =
    1.
    """
    log_ratio = 2 * (q_std.log() - p_std.log())
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (gap / p_std) ** 2)


def decoder_nll(x0: Tensor, error: Tensor, std: Tensor) -> Tensor:
    """-log of the mass of N(x0 + error, std^2) on the bin of x0, in nats (Ho et al. 2020, eq. 13); shape of x0.

    The outermost bins extend to infinity, so that the masses of all 256 levels sum to 1. The mass is computed from log
    Phi in the lower tail, which is finite for any error. So the gradient is finite for any error too.

    Args:
        x0: on the levels k / 127.5 - 1, k = 0..255.
        error: the mean minus x0.
        std: standard deviation of the Gaussian; broadcasts against x0.
    """
    far = error.abs()
    upper = torch.special.log_ndtr((HALF_BIN - far) / std)
    lower = torch.special.log_ndtr((-HALF_BIN - far) / std)
    inner = upper + (-torch.expm1((lower - upper).clamp(max=-torch.finfo(x0.dtype).eps))).log()
    outer = torch.special.log_ndtr((HALF_BIN + x0.sign() * error) / std)
    return -torch.where(x0.abs() > OUTERMOST, outer, inner)


def term(
    schedule: Schedule,
    t: float | Tensor,
    x0: Tensor,
    error: Tensor,
    variance: str = "small",
    share: Tensor | None = None,
) -> Tensor:
    """L_{t-1} of noisy images, in bits, for each element: the decoder term at t = 1, a KL divergence above.

    Args:
        schedule: noise levels, at least two.
        t: an integer in 1..T, or (B,) integers.
        x0: (B, ...), on uint8 levels if t is 1.
        error: predicted x0 minus x0, like x0.
        variance, share: the variance of the reverse step, as in `process.kernels.reverse_std`.

    Returns:
        (B, ...), like x0.
    """
    s = (t - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0)
    p_std = like(reverse_std(schedule, t, s, variance, share), error)
    if not isinstance(t, Tensor) and t <= 1:
        return decoder_nll(x0, error, p_std) / BIT
    q_std = like(reverse_std(schedule, t, s, "small"), error)
    divergence = gaussian_kl(like(posterior(schedule, t, s).x0, error) * error, q_std, p_std)
    if not isinstance(t, Tensor):
        return divergence / BIT
    first = like(t, error) <= 1
    nll = decoder_nll(x0, torch.where(first, error, 0), p_std)  # errors at high noise would make it NaN
    return torch.where(first, nll, divergence) / BIT


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """L_T in bits, for each element of x0."""
    alpha, sigma = schedule(schedule.num_timesteps)
    prior_std = torch.tensor(schedule.prior_std, dtype=torch.float64)
    return gaussian_kl(like(alpha, x0) * x0, sigma, prior_std) / BIT
