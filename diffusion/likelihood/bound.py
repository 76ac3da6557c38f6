"""The variational bound of a denoiser on images and its terms, in bits per dimension (Ho et al. 2020, eqs. 5 and 13).

    -log2 p(x_0) / D  <=  L_T + sum over t = 2..T of L_{t-1} + L_0

The network is called once for each t, at a sample of q(x_t | x_0). The terms are also the rates of a progressive code
(sec. 4.3). A receiver of x_t has read the terms above t (the rate) and can decode the predicted x_0 (with a
distortion). The result of an image depends only on (seed, its number), up to rounding, so that images can be measured
in any batches.

Even the exact denoiser does not reach the entropy of its data, because a reverse step is a Gaussian of fixed variance.
With T = 1000 the bound is 0.1 to 0.8 bits per dimension above it (0.18 with the large variance and 0.41 with the small
one for numbers spread over 4 levels, under vp_linear). This module knows no network and no file. To clip x_0, as the
paper does here, wrap the denoiser in `diffusion.denoiser.Clipped`.
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
    """The terms of the bound of B images, as NumPy arrays: means over dimensions, float64.

    numbers (B,), int64, are the numbers of the images. prior (B,) is L_T in bits. bits (B, T) are the terms L_0, L_1
    ... L_{T-1}. epsilon_mse and x0_mse (B, T) are the mean squared errors of the prediction at t = 1..T.
    """

    numbers: NDArray[np.int64]
    prior: NDArray[np.float64]
    bits: NDArray[np.float64]
    epsilon_mse: NDArray[np.float64]
    x0_mse: NDArray[np.float64]


class BoundSummary(NamedTuple):
    """The bound over a set of images, in bits per dimension.

    standard_error is that of bits_per_dim over the images; None for one image. rate is the sum of all terms except L_0;
    a lossless code adds L_0. rmse_255 is the error at that rate, on the scale 0..255. curve has COLUMNS in the order of
    rising t: rate is what a receiver of x_t has read, rmse_255 is the error of its predicted x_0.
    """

    num_images: int
    bits_per_dim: float
    standard_error: float | None
    L_T: float
    L_0: float
    rate: float
    rmse_255: float
    curve: dict[str, NDArray]


def measure_at(
    denoise: Denoiser, schedule: Schedule, x0: Tensor, epsilon: Tensor, t: int, variance: str = "small"
) -> tuple[Prediction, Tensor, Tensor, Tensor]:
    """The prediction at x_t, and for each image L_{t-1} in bits and the mean squared errors of epsilon and x_0, (B,).

    Args:
        x0, epsilon: (B, ...); x0 on uint8 levels.
        variance: variance of the reverse step, as in `process.kernels.reverse_std`.

    Raises:
        ValueError: variance is "learned" and the denoiser predicts none.
    """
    predicted = denoise(noised(schedule, x0, t, epsilon), t)
    if variance == "learned" and predicted.variance is None:
        raise needs_learned_variance("likelihood.variance")
    error = predicted.x0.double() - x0.double()
    share = None if predicted.variance is None else predicted.variance.double()
    bits = term(schedule, t, x0.double(), error, variance, share)
    return predicted, _mean(bits), _mean((predicted.epsilon.double() - epsilon.double()) ** 2), _mean(error**2)


@torch.no_grad()
def bound_terms(
    denoise: Denoiser, schedule: Schedule, images: Tensor, numbers: Tensor, seed: int, variance: str = "small"
) -> Terms:
    """Compute all terms of the bound of a batch of images, with T calls of the denoiser.

    Args:
        denoise: the denoiser, with labels bound and x_0 clipped if wanted.
        schedule: noise levels of the denoiser.
        images: uint8 (B, C, H, W), on the device of the denoiser.
        numbers: int64 (B,); the noise of an image at t is a function of (seed, its number, t).
        variance: "small", "large" or "learned".
    """
    x0 = from_uint8(images)
    found = torch.zeros(3, schedule.num_timesteps, len(x0), dtype=torch.float64, device=x0.device)
    for t in range(1, schedule.num_timesteps + 1):
        _, *measured = measure_at(denoise, schedule, x0, _noise(numbers, seed, t, x0), t, variance)
        found[:, t - 1] = torch.stack(measured)
    bits, epsilon_mse, x0_mse = found.transpose(1, 2).cpu().numpy()
    prior = _mean(prior_term(schedule, x0.double()))
    return Terms(numbers.cpu().numpy(), prior.cpu().numpy(), bits, epsilon_mse, x0_mse)


@torch.no_grad()
def predicted_at(
    denoise: Denoiser, schedule: Schedule, images: Tensor, numbers: Tensor, seed: int, times: Sequence[int]
) -> Tensor:
    """The predicted x_0 of a receiver of x_t, at each of these times: (B, len(times), C, H, W).

    It is in [-1, 1] if the denoiser clips. The x_t are the same as in `bound_terms`.
    """
    x0 = from_uint8(images)
    predicted = [measure_at(denoise, schedule, x0, _noise(numbers, seed, t, x0), t)[0].x0 for t in times]
    return torch.stack(predicted, dim=1)


def summarise(parts: Sequence[Terms]) -> BoundSummary:
    """Join the parts of a set of images into one summary. The parts may have any order and size; each image once."""
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
        "rmse_255": LEVELS_PER_UNIT * np.sqrt(x0_mse).mean(0),  # root per image, as in the paper; then the mean
    }
    num = len(total)
    return BoundSummary(
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
    """Mean over all dimensions of an image: (B, ...) -> (B,)."""
    return values.reshape(len(values), -1).mean(1)
