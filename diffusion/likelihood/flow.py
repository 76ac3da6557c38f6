"""log p(x) of a denoiser by its probability flow, with the instantaneous change of variables along an ODE.

Under any schedule, y = x_t / alpha_t and r = sigma_t / alpha_t satisfy dy/dr = epsilon (Song et al. 2021, DDIM, eq.
14). This is the flow of Song et al. 2021, score SDE, eq. 13, in the variables of VE. With u = asinh(r) and z = y /
cosh(u), the equation that is solved is

    dz/du = epsilon(x_t, t) - tanh(u) z,    x_t = std_t z

z is x_t scaled to unit variance for data of unit variance, which is the input of networks under VP and VE. u behaves
like r near the data and like its logarithm, -lambda, near the noise. In u no term is large or divided by a small
number, at either end; in t both occur. The density follows from the divergence (Chen et al. 2018; sec. 4.3 and app. D.2
of the score SDE paper), in which the part of tanh(u) is known:

    log p(z_start) = log N(z_T; 0, I) + integral of tr(d epsilon / d x) std_t du - D log(cosh u_T / cosh u_start)

The trace is exact, or Hutchinson's unbiased estimate v^T J v with probes fixed along the path (FFJORD, Grathwohl et al.
2019). The images of a batch share the steps of the solver. So the other images of the batch change the result of an
image, within the tolerance. This module knows no network and no file.
"""

import math
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.images import LEVELS_PER_UNIT, from_uint8
from diffusion.noise import Stream, keys, normal, uniforms
from diffusion.process.schedule import Denoiser, Schedule
from diffusion.settings import Between, settings

START = 0.1  # time at which the flow starts; sigma is 1e-3 there under vp_linear, as in the code of Song et al.
TOLERANCE = 1e-5  # absolute and relative tolerance of the solver, as in that code
PROBES = ("rademacher", "gaussian")
Tolerance = Annotated[float, Between(0, 1, ends="()")]


class Flowed(NamedTuple):
    """The result of the flow from its start to time T.

    log_density (B, K) is log p(x) in nats by each of K probes, float64; K is 1 for the exact trace. z (B, ...) is the
    end of the flow, standard normal for an exact model. nfe is the number of evaluations of the denoiser.
    """

    log_density: Tensor
    z: Tensor
    nfe: int


class FlowTerms(NamedTuple):
    """The results of B images, as NumPy arrays.

    numbers (B,), int64, are the numbers of the images. bits (B, K) are bits per dimension by each probe. nfe (B,),
    int64, are evaluations of the denoiser.
    """

    numbers: NDArray[np.int64]
    bits: NDArray[np.float64]
    nfe: NDArray[np.int64]


class FlowSummary(NamedTuple):
    """Bits per dimension over a set of images.

    standard_error is over the images; None for one image. probe_error is the part of it that comes from the probes;
    None for one probe. nfe is evaluations of the denoiser per image.
    """

    num_images: int
    bits_per_dim: float
    standard_error: float | None
    probe_error: float | None
    nfe: float


def check_start(start: float, schedule: Schedule) -> None:
    """Raise ValueError if the flow cannot start at this time of the schedule."""
    if not 0 < start < schedule.num_timesteps:
        raise ValueError(f"likelihood.start={start} is outside (0, schedule.num_timesteps={schedule.num_timesteps}).")


@settings("likelihood")
def log_likelihood(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    probes: Tensor | None = None,
    start: float = START,
    tolerance: Tolerance = TOLERANCE,
) -> Flowed:
    """Compute log p(x) by the flow from time `start` to T, where x is at time `start`.

    Args:
        denoise: the denoiser, with labels bound. It must not clip, because clipping is not differentiable.
        schedule: noise levels of the denoiser.
        x: (B, ...), in the dtype and on the device of the denoiser.
        probes: (K, B, ...), of mean 0 and covariance I. None: the exact trace, at one backward pass per dimension.
        start: in (0, T). The density is that of data with noise of standard deviation sigma_start.
        tolerance: absolute and relative tolerance of the Dormand-Prince pair, for z and for the integral of the trace.

    Raises:
        ValueError: start or tolerance is out of its range, or the solver fails.
    """
    check_start(start, schedule)
    top = schedule.num_timesteps
    dims, low, high = x[0].numel(), _asinh_ratio(schedule, start), _asinh_ratio(schedule, top)
    columns = 1 if probes is None else len(probes)

    def slope(u: float, state: NDArray) -> NDArray:
        z = torch.from_numpy(state[: x.numel()]).to(x).reshape(x.shape)
        t = min(schedule.time_of(-math.log(math.sinh(u))), top)
        std = float(schedule.std(t))
        epsilon, traces = _trace(denoise, std * z, t, probes)
        moving = (epsilon - math.tanh(u) * z).double().flatten()
        return torch.cat([moving, std * traces.flatten()]).cpu().numpy()

    begun = torch.cat([(x.double() / schedule.std(start)).flatten(), x.new_zeros(columns * len(x)).double()])
    solved = solve_ivp(
        slope, (low, high), begun.cpu().numpy(), method="RK45", t_eval=[high], rtol=tolerance, atol=tolerance
    )
    if not solved.success:
        raise ValueError(
            f"likelihood.tolerance={tolerance}: the solver failed ({solved.message}). Give a larger tolerance."
        )
    end = torch.from_numpy(solved.y[:, -1])
    z, traced = end[: x.numel()].reshape(len(x), -1), end[x.numel() :].reshape(columns, len(x)).T
    log_prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
    scaled = math.log(math.cosh(high) / math.cosh(low)) + math.log(schedule.std(start))
    return Flowed(log_prior[:, None] + traced - dims * scaled, z.reshape(x.shape), solved.nfev)


def flow_bits(
    denoise: Denoiser,
    schedule: Schedule,
    images: Tensor,
    numbers: Tensor,
    seed: int,
    num_probes: int = 1,
    probe: str = "rademacher",
    start: float = START,
    tolerance: float = TOLERANCE,
) -> FlowTerms:
    """Bits per dimension of uint8 images (B, C, H, W), with uniform dequantisation.

    The result is -log2 of the density, plus log2 of the 127.5 levels per unit of x. In expectation it is an upper bound
    on -log2 of the probability of the levels, by Jensen's inequality (Theis et al. 2016). The probes and the
    dequantisation noise are functions of (seed, number).

    Args:
        num_probes: probes of Hutchinson's estimate, each one backward pass per evaluation; 0 means the exact trace.
        probe: "rademacher" or "gaussian".
    """
    x = dequantised(images, numbers, seed)
    drawn = probes(numbers, seed, num_probes, probe, x) if num_probes else None
    flowed = log_likelihood(denoise, schedule, x, drawn, start, tolerance)
    bits = math.log2(LEVELS_PER_UNIT) - flowed.log_density / (x[0].numel() * math.log(2))
    return FlowTerms(numbers.cpu().numpy(), bits.numpy(), np.full(len(x), flowed.nfe, dtype=np.int64))


def dequantised(images: Tensor, numbers: Tensor, seed: int) -> Tensor:
    """Convert uint8 (B, ...) to float32, each pixel uniform in the bin of its level.

    All bins together are [-1 - 1/255, 1 + 1/255].
    """
    place = uniforms(keys(numbers.to(images.device), seed, Stream.DEQUANTISE), images.shape[1:])
    return from_uint8(images) + (place - 0.5) / LEVELS_PER_UNIT


def probes(numbers: Tensor, seed: int, count: int, kind: str, x: Tensor) -> Tensor:
    """Probes (count, B, ...) like x, a function of (seed, number of the image, number of the probe).

    Raises:
        ValueError: count is below 1, or kind is not in PROBES.
    """
    if count < 1:
        raise ValueError(f"likelihood.probes={count} must be at least 1.")
    if kind not in PROBES:
        raise ValueError(f"likelihood.probe={kind} must be one of {', '.join(PROBES)}.")
    where = numbers.to(x.device)
    drawn = torch.stack([normal(keys(where, seed, Stream.PROBE, k), x.shape[1:], x.dtype) for k in range(count)])
    return drawn if kind == "gaussian" else torch.where(drawn < 0, -1.0, 1.0).to(x)


def summarise_flow(parts: list[FlowTerms]) -> FlowSummary:
    """Join the parts of a set of images into one summary. The parts may have any order and size; each image once."""
    numbers, bits, nfe = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(numbers, kind="stable")
    assert (np.diff(numbers[order]) > 0).all(), "an image is in two parts"
    by_image, (num, columns) = bits[order].mean(1), bits.shape
    of_probes = bits[order].var(axis=1, ddof=1).mean() / columns if columns > 1 else None
    return FlowSummary(
        num_images=num,
        bits_per_dim=float(by_image.mean()),
        standard_error=float(by_image.std(ddof=1) / num**0.5) if num > 1 else None,
        probe_error=None if of_probes is None else float((of_probes / num) ** 0.5),
        nfe=float(nfe.mean()),
    )


def _asinh_ratio(schedule: Schedule, t: float) -> float:
    """u = asinh(sigma / alpha) at time t."""
    alpha, sigma = schedule(t)
    return math.asinh(sigma / alpha)


def _trace(denoise: Denoiser, x: Tensor, t: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """epsilon like x, and float64 (K, B): v^T (d epsilon / d x) v for each probe, or the exact trace in one row."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        epsilon = denoise(x, t).epsilon
        if probes is None:
            traces = x.new_zeros(1, len(x), dtype=torch.float64)
            for d, column in enumerate(epsilon.reshape(len(x), -1).T):
                (row,) = torch.autograd.grad(column.sum(), x, retain_graph=True)
                traces[0] += row.reshape(len(x), -1)[:, d]
        else:
            pulled = [v * torch.autograd.grad(epsilon, x, v, retain_graph=True)[0] for v in probes]
            traces = torch.stack([product.double().reshape(len(x), -1).sum(1) for product in pulled])
    return epsilon.detach(), traces
