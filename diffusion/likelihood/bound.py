"""The variational bound of a denoiser on images, term by term, in bits per dimension (Ho et al. 2020, eqs. 5 and 13).

    -log2 p(x_0) / D  <=  L_T + sum over t = 2..T of L_{t-1} + L_0

One call of the network for each t, on q(x_t | x_0). The same terms are a progressive code (sec. 4.3): who has received
x_t has read the terms above t, its rate, and can answer with the predicted x_0, at a distortion. Image by image and
batch by batch: what is returned for an image depends on (seed, its number) alone, to rounding, and any parts add up.

Even the exact denoiser does not reach the entropy of its data, as a reverse step is a Gaussian of fixed width: with T =
1000 some 0.1 to 0.8 bits per dimension remain (0.18 with the large variance and 0.41 with the small one for numbers
spread over 4 levels, under vp_linear). Knows no network and no file; clipping x_0, as the paper does here, is the
denoiser's (`diffusion.denoiser.Clipped`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.images import LEVELS_PER_UNIT, from_uint8
from diffusion.noise import Stream, keys, normal
from diffusion.process.bound import prior_term, term
from diffusion.process.kernels import needs_learned_variance, noised
from diffusion.process.schedule import Denoiser, Prediction, Schedule

COLUMNS = ("t", "bits", "epsilon_mse", "x0_mse", "rate", "rmse_255")


class Terms(NamedTuple):
    """The bound of B images: NumPy arrays to be stored as they are; means over dimensions, float64.

    numbers (B,) int64. prior (B,): L_T, bits. bits (B, T): L_{t-1} in column t - 1. epsilon_mse, x0_mse (B, T): mean
    squared errors of the prediction at t.
    """

    numbers: NDArray[np.int64]
    prior: NDArray[np.float64]
    bits: NDArray[np.float64]
    epsilon_mse: NDArray[np.float64]
    x0_mse: NDArray[np.float64]


class Bound(NamedTuple):
    """The bound over a set of images, bits per dimension.

    standard_error is that of bits_per_dim over the images, None of one image. L_0 is what a lossless code spends on
    top of `rate`, everything above it; rmse_255 the error that it mends, on the scale of 0..255. curve has COLUMNS by
    rising t: the rate of a receiver of x_t, and the rmse_255 of its predicted x_0.
    """

    num_images: int
    bits_per_dim: float
    standard_error: float | None
    L_T: float
    L_0: float
    rate: float
    rmse_255: float
    curve: dict[str, NDArray]


def at(
    denoise: Denoiser, schedule: Schedule, x0: Tensor, epsilon: Tensor, t: int, variance: str = "small"
) -> tuple[Prediction, Tensor, Tensor, Tensor]:
    """What the denoiser says of x_t, and for each image L_{t-1} in bits and the squared errors of epsilon and x_0.

    Args:
        x0, epsilon: (B, ...); x0 on uint8 levels.
        variance: of the reverse step, as `process.kernels.reverse_std` has it.

    Raises:
        ValueError: variance is "learned" and the denoiser predicts none.
    """
    said = denoise(noised(schedule, x0, t, epsilon), t)
    if variance == "learned" and said.variance is None:
        raise needs_learned_variance("likelihood.variance")
    error = said.x0.double() - x0.double()
    share = None if said.variance is None else said.variance.double()
    bits = term(schedule, t, x0.double(), error, variance, share)
    return said, _mean(bits), _mean((said.epsilon.double() - epsilon.double()) ** 2), _mean(error**2)


@torch.no_grad()
def bound_terms(
    denoise: Denoiser, schedule: Schedule, images: Tensor, numbers: Tensor, seed: int, variance: str = "small"
) -> Terms:
    """All terms of some images, from T calls of the denoiser.

    Args:
        denoise: with labels bound, and x_0 clipped as wanted.
        schedule: its noise levels.
        images: uint8 (B, C, H, W), on the denoiser's device.
        numbers: int64 (B,); the noise of an image at t is a function of (seed, its number, t).
        variance: "small", "large" or "learned".
    """
    x0 = from_uint8(images)
    found = torch.zeros(3, schedule.num_timesteps, len(x0), dtype=torch.float64, device=x0.device)
    for t in range(1, schedule.num_timesteps + 1):
        _, *measured = at(denoise, schedule, x0, _noise(numbers, seed, t, x0), t, variance)
        found[:, t - 1] = torch.stack(measured)
    bits, epsilon_mse, x0_mse = found.transpose(1, 2).cpu().numpy()
    prior = _mean(prior_term(schedule, x0.double()))
    return Terms(numbers.cpu().numpy(), prior.cpu().numpy(), bits, epsilon_mse, x0_mse)


@torch.no_grad()
def predicted_at(
    denoise: Denoiser, schedule: Schedule, images: Tensor, numbers: Tensor, seed: int, times: Sequence[int]
) -> Tensor:
    """What a receiver of x_t answers with, at each of these times: x_0, (B, len(times), C, H, W) in [-1, 1] where the
    denoiser clips. The x_t are those of `bound_terms`."""
    x0 = from_uint8(images)
    seen = [at(denoise, schedule, x0, _noise(numbers, seed, t, x0), t)[0].x0 for t in times]
    return torch.stack(seen, dim=1)


def summarise(parts: Sequence[Terms]) -> Bound:
    """One set of images from its parts, in any order and of any sizes; each image once."""
    joined = Terms(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(joined.numbers, kind="stable")
    _, prior, bits, epsilon_mse, x0_mse = joined = Terms(*(array[order] for array in joined))
    assert (np.diff(joined.numbers) > 0).all(), "an image is in two parts"
    total = prior + bits.sum(1)
    mean_bits = bits.mean(0)
    above = np.append(np.cumsum(mean_bits[::-1])[::-1][1:], 0.0)
    curve = {
        "t": np.arange(1, bits.shape[1] + 1),
        "bits": mean_bits,
        "epsilon_mse": epsilon_mse.mean(0),
        "x0_mse": x0_mse.mean(0),
        "rate": prior.mean() + above,
        "rmse_255": LEVELS_PER_UNIT * np.sqrt(x0_mse).mean(0),  # of an image, as the paper writes it; then the mean
    }
    num = len(total)
    return Bound(
        num_images=num,
        bits_per_dim=float(total.mean()),
        standard_error=float(total.std(ddof=1) / num**0.5) if num > 1 else None,
        L_T=float(prior.mean()),
        L_0=float(mean_bits[0]),
        rate=float(curve["rate"][0]),
        rmse_255=float(curve["rmse_255"][0]),
        curve=curve,
    )


def _noise(numbers: Tensor, seed: int, t: int, x0: Tensor) -> Tensor:
    return normal(keys(numbers.to(x0.device), seed, Stream.BOUND, t), x0.shape[1:], x0.dtype)


def _mean(values: Tensor) -> Tensor:
    """Over all dimensions of an image: (B, ...) -> (B,)."""
    return values.reshape(len(values), -1).mean(1)
