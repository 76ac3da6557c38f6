"""How far a denoiser is from the best there is: E|D(x_t) - x_0|^2 at each time, and how much of it nobody avoids.

    E|D - x_0|^2  =  E|D* - x_0|^2  +  E|D - D*|^2,    D*(x_t) = E[x_0 | x_t]
                     irreducible       excess

Where the score is known so is D*, and both parts are. Of images only the left side is known, and bounds of the rest:

    at least   what a change of D to a D + b x_t + c would gain, fitted to one half of the images and tried on the
               other: D* cannot be bettered, on new images, by any function of x_t.
    at most    the left side less the loss of the best denoiser of a set of images that has these in it, the posterior
               mean among them: on its own set no loss is lower, so its expectation is at most the irreducible one

The second is near the truth where the noise is wider than the gaps between images, the more of them the better, and 0,
saying nothing, below. Norms are over all numbers of a point. Knows denoisers as callables.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lab.gaussian import step_of
from diffusion.lab.initialisation import Bounds, Spectrum
from diffusion.noise import Stream, keys, normal, uniform_int
from diffusion.process.kernels import noised
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import Denoiser, Level, Prediction, Schedule
from diffusion.process.toy import Gaussian, Mixture
from diffusion.samplers.base import Sampler

ENOUGH = 4  # images for each number in one, for a covariance
POINTS_OF_A_QUARTER = 50_000  # for 5 % of a hundredth


class Split(NamedTuple):
    """E|D - x_0|^2 at a time, of a denoiser and a distribution that are both known."""

    irreducible: float
    excess: float


class Known(NamedTuple):
    """Images that the best denoiser may know: (N, ...) and their labels (N,) or None; and the spectrum of the data."""

    images: Tensor
    labels: Tensor | None
    spectrum: Spectrum


class Held(NamedTuple):
    """The same at a time, of images: means over them.

    loss: E|D - x_0|^2, and its standard error. floor: that of the posterior mean among the known images. gain: what
    the affine change gains, less two of its standard errors, at least 0. linear: the loss of the best denoiser that is
    linear, in closed form from the spectrum, which of few images says too little of it; then nan.
    """

    loss: float
    standard_error: float
    floor: float
    gain: float
    linear: float

    @property
    def excess(self) -> Bounds:
        """What of the loss could be trained away, at least and at most."""
        most = max(self.loss - self.floor, 0.0)
        return Bounds(min(self.gain, most), most)


def quarter_of(num_timesteps: int, t: float) -> int:
    """0 for the cleanest quarter of the times to 3 for the noisiest, as a loss is logged by."""
    return min(int(4 * max(t - 1, 0) // num_timesteps), 3)


def quarters(num_timesteps: int, t: Sequence[float], values: Sequence[float]) -> list[float]:
    """Means over the four quarters of the times, of values at some of them; nan for a quarter without any."""
    found: list[list[float]] = [[], [], [], []]
    for time, value in zip(t, values, strict=True):
        found[quarter_of(num_timesteps, time)].append(value)
    return [sum(part) / len(part) if part else float("nan") for part in found]


def some_times(num_timesteps: int, number: int) -> list[int]:
    """As many of 1..T as asked for, at most all, the middles of equal stretches: a mean over them is one over all."""
    number = min(number, num_timesteps)
    return [int((k + 0.5) * num_timesteps / number) + 1 for k in range(number)]


def of_known(
    denoise: Denoiser, toy: Mixture, schedule: Schedule, t: float, points: Tensor, seed: int, chunk: int = 8192
) -> Split:
    """At time t, by Monte Carlo over points of the data, (N, d): the excess has no noise of the targets in it."""
    exact, irreducible, excess = toy.denoiser(schedule), 0.0, 0.0
    for part in torch.arange(len(points)).split(chunk):
        x0 = points[part]
        x_t = noised(schedule, x0, t, _noise(part, seed, t, x0))
        best = exact(x_t, t).x0
        irreducible += float((best - x0).square().sum())
        excess += float((denoise(x_t, t).x0 - best).square().sum())
    return Split(irreducible / len(points), excess / len(points))


@torch.no_grad()
def loss_by_quarter(
    denoise: Denoiser, toy: Mixture, schedule: Schedule, kind: str, points: Tensor, seed: int
) -> list[Split]:
    """Of a network's denoiser, in units of the loss that predicts `kind`, (prediction - target)^2 a number: by quarter
    of t, at random times of it, what is irreducible and the excess.

    Args:
        denoise: of images of one pixel, (N, d, 1, 1), float32, as networks trained on points are.
        points: of the data, (N, d).
    """
    top, convert, found, numbers = schedule.num_timesteps, PREDICTIONS[kind].from_pair, [], torch.arange(len(points))
    x0 = points.float()[..., None, None]
    for quarter in range(4):
        low, high = (-(-(quarter + k) * top // 4) for k in (0, 1))
        t = 1 + low + uniform_int(keys(numbers, seed, Stream.TIME, quarter), high - low)
        epsilon = normal(keys(numbers, seed, Stream.NOISE, quarter), x0.shape[1:])
        x_t = noised(schedule, x0, t, epsilon)
        best, said = toy.denoiser(schedule)(x_t[..., 0, 0], t), denoise(x_t, t)
        ideal = convert(schedule, x_t, t, best.x0[..., None, None], best.epsilon[..., None, None])
        target = convert(schedule, x_t, t, x0, epsilon)
        output = convert(schedule, x_t, t, said.x0, said.epsilon)
        squares = [((one - ideal) ** 2).flatten(1).mean(1).double().mean() for one in (target, output)]
        found.append(Split(*map(float, squares)))
    return found


@torch.no_grad()
def of_images(
    denoise: Denoiser,
    schedule: Schedule,
    t: float,
    x0: Tensor,
    labels: Tensor | None,
    known: Known,
    seed: int,
    batch_size: int = 256,
) -> Held:
    """At time t, of images that the denoiser has not seen, (N, C, H, W) on its device; N at least 4.

    Args:
        labels: (N,), bound to the denoiser image by image; the posterior mean is then that of the image's class.
        known: a set that these images are a part of, on the same device.
    """
    parts, rows = [], torch.arange(len(x0), device=x0.device)
    for part in rows.split(batch_size):
        x_t = noised(schedule, x0[part], t, _noise(part, seed, t, x0[part]))
        given = () if labels is None else (labels[part],)
        parts.append((x_t, denoise(x_t, t, *given).x0))
    x_t, guess = (torch.cat(column).double().flatten(1) for column in zip(*parts, strict=True))
    clean = x0.double().flatten(1)
    losses = (clean - guess).square().sum(1)
    own = posterior_mean(x_t, known.images.double().flatten(1), schedule(t), labels, known.labels)
    gains = affine_gains(clean, guess, x_t)
    return Held(
        loss=float(losses.mean()),
        standard_error=float(losses.std() / len(losses) ** 0.5),
        floor=float((clean - own).square().sum(1).mean()),
        gain=max(0.0, float(gains.mean() - 2 * gains.std() / len(gains) ** 0.5)),
        linear=linear_loss(known.spectrum, schedule(t)) if len(known.images) >= ENOUGH * x0[0].numel() else math.nan,
    )


def posterior_mean(
    x_t: Tensor, points: Tensor, level: Level, labels: Tensor | None = None, classes: Tensor | None = None
) -> Tensor:
    """E[x_0 | x_t] for data that are just these points, (N, D) float64, at x_t (B, D); among those whose class (N,) is
    the label (B,), where labels are given."""
    alpha, sigma = (float(value) for value in level)
    squares = x_t.square().sum(1)[:, None] + alpha**2 * points.square().sum(1) - 2 * alpha * x_t @ points.mT
    logits = -squares / (2 * sigma**2)
    if labels is not None and classes is not None:
        logits = logits.masked_fill(labels[:, None] != classes, -torch.inf)
    return logits.softmax(1) @ points


def affine_gains(clean: Tensor, guess: Tensor, x_t: Tensor) -> Tensor:
    """Of each image (N,): its squared error by the guess, less that by a guess + b x_t + c, with a, b and c from the
    half of the images that it is not in."""
    residual, gains = clean - guess, torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    features = torch.stack([guess, x_t, torch.ones_like(guess)], dim=-1)
    even = torch.arange(len(clean), device=clean.device) % 2 == 0
    for held in (even, ~even):
        fit, wanted = features[~held].reshape(-1, 3), residual[~held].reshape(-1)
        scale = fit.square().mean(0).sqrt().clamp(min=1e-12)
        square = (fit / scale).mT @ (fit / scale)
        weights = torch.linalg.pinv(square, hermitian=True) @ ((fit / scale).mT @ wanted) / scale
        changed = residual[held] - features[held] @ weights
        gains[held] = residual[held].square().sum(1) - changed.square().sum(1)
    return gains


def linear_loss(found: Spectrum, level: Level) -> float:
    """E|x_0 - L x_t - l|^2 of the best linear denoiser: sum_i v_i sigma^2 / (alpha^2 v_i + sigma^2)."""
    alpha, sigma = level
    return float((found.variances * sigma**2 / (alpha**2 * found.variances + sigma**2)).sum())


# ---- what an error at some times does to the end of a walk ----


def carried_to_the_end(
    sampler: Sampler,
    schedule: Schedule,
    times: Sequence[float],
    errors: Sequence[float],
    variance: float,
    together: bool = True,
) -> float:
    """How far errors of x_0, one a step, move the end of a walk.

    A step turns an error of x_0 into one of x_s, and later steps carry that on as they would for Gaussian data of this
    variance: both factors are read off the sampler, also of the steps before that it reads. An estimate: data in far
    modes have flows that part. A variance that is learned counts as the small one.

    Args:
        errors: root mean square of the error of x_0 at each of the times but the last.
        variance: of each number of the data.
        together: all of them pull the same way, and add up; else each its own, and their squares do.
    """
    moved = moved_by_errors(sampler, schedule, times, variance).abs() * torch.tensor(errors, dtype=torch.float64)
    return float(moved.sum() if together else moved.norm())


def moved_by_errors(sampler: Sampler, schedule: Schedule, times: Sequence[float], variance: float) -> Tensor:
    """How far an error of 1 in x_0 in each step of a walk, in all calls of the denoiser that it makes, moves the end on
    Gaussian data of this variance: (len(times) - 1,), float64."""
    gaussian = Gaussian([0.0], std=variance**0.5).denoiser(schedule)

    def pulled(off: Callable[[float], bool]) -> Denoiser:
        """The exact denoiser, off by 1 at some times."""

        def denoise(x_t: Tensor, t: float, labels: Tensor | None = None) -> Prediction:
            (alpha, sigma), (x0, epsilon, _) = schedule(t), gaussian(x_t, t)
            error = float(off(t))
            return Prediction(x0 + error, epsilon - error * alpha / sigma, torch.zeros_like(x_t))

        return denoise

    moved = torch.zeros(1, len(times) - 1, dtype=torch.float64)  # x at t, and at the times before that are remembered
    for k, ((t, s), before) in enumerate(zip(pairwise(times), sampler.pasts(times), strict=True)):
        exact = step_of(sampler, pulled(lambda _: False), t, s, 1, before)
        arrived = exact.matrix @ moved[: 1 + len(before)]
        own = pulled(lambda time, read=frozenset(before): time not in read)
        read = [pulled(partial(operator.eq, u)) for u in before]
        for back, off in enumerate((own, *read)):  # the step's own error, and those of the steps that it reads
            arrived[0, k - back] += float(step_of(sampler, off, t, s, 1, before).offset - exact.offset)
        moved = torch.cat([arrived, moved])[: 1 + sampler.memory]
    return moved[0]


def _noise(numbers: Tensor, seed: int, t: float, x: Tensor) -> Tensor:
    """Of these images at a time; times apart by more than 2^-20 have noise of their own."""
    return normal(keys(numbers.to(x.device), seed, Stream.NOISE, round(t * 2**20)), x.shape[1:], x.dtype)
