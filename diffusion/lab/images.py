"""The errors of a trained model of images, as far as they can be known without the exact score.

    initialisation   bounds from the mean and covariance of the data; its effect: where walks from noised images and
                     from pure noise end, on the same noise
    discretisation   where walks of more and more steps end, on the same noise; what is left beyond the finest by the
                     order at which the distances fall
    training         bounds of the excess loss at each time, carried to the end of the walk as they would be on Gaussian
                     data (`training_error`): an estimate

All as root mean square over pixels of the difference it makes to an image, in units of [-1, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.lab.errors import starts
from diffusion.lab.initialisation import Bounds, Spectrum, of_points
from diffusion.lab.refinement import Order, SharedNoise, order_of_gaps, refine, rms
from diffusion.lab.training_error import Held, Known, carried_to_the_end, of_images, quarter_of
from diffusion.process.grids import refined, steps_of
from diffusion.process.schedule import Denoiser, Schedule
from diffusion.samplers.base import Sampler

LEVELS = (1, 2, 4, 8)  # steps in each step of the walk, of the walks that it is held against


class Initialisation(NamedTuple):
    """W2(Law(X_t), prior) at the first time t of the walk, and how far it moves the end; a pixel."""

    t: float
    distance: Bounds
    effect: float


class Discretisation(NamedTuple):
    """Distances from the finest walk, by number of steps; the order at which they fall, if they do; and what that makes
    of the walk in question, the finest one's own error included; a pixel."""

    num_steps: list[int]
    gaps: list[float]
    order: Order | None
    effect: float


class Training(NamedTuple):
    """Errors of the denoiser at some times, and how far they move the end of the walk, at least and at most; a "
    "pixel."""

    t: list[float]
    held: list[Held]
    effect: Bounds
    by_quarter: list[float]  # the most that errors in each quarter of the times do, cleanest first


class Candidate(NamedTuple):
    """Another setting of the sampler, the steps and the network calls it takes, and how far its images are from those
    of the finest walk from T."""

    words: str
    num_steps: int
    calls: int
    distance: float


def initialisation(
    sampler: Sampler, denoise: Denoiser, times: Sequence[float], x0: Tensor, found: Spectrum, seed: int
) -> Initialisation:
    """x0 (N, C, H, W): images of the data, on the denoiser's device. found: spectrum of the data."""
    schedule, numbers = sampler.schedule, torch.arange(len(x0))
    begun, scale = starts(schedule, times[0], x0, seed), x0[0].numel() ** 0.5
    noise = SharedNoise(schedule, times, seed, numbers)
    ends = [sampler.sample(denoise, x, times, noise) for x in begun]
    bounds = of_points(found, schedule, times[0])
    effect = rms(ends[0] - ends[1]) / scale
    return Initialisation(times[0], Bounds(bounds.low / scale, bounds.high / scale), effect)


def discretisation(
    sampler: Sampler, denoise: Denoiser, times: Sequence[float], x: Tensor, seed: int, levels: Sequence[int] = LEVELS
) -> Discretisation:
    """x (N, C, H, W): pure noise at the first of the times."""
    grids, scale = [refined(list(times), parts) for parts in levels], x[0].numel() ** 0.5
    found = refine(sampler, denoise, x, grids, seed, torch.arange(len(x)))
    gaps = [gap / scale for gap in found.gaps()]
    order = order_of_gaps(found.num_steps, gaps)
    return Discretisation(found.num_steps, gaps, order, order.at(found.num_steps[0]) if order else gaps[0])


def training(
    sampler: Sampler,
    measured: Denoiser,
    times: Sequence[float],
    at: Sequence[float],
    x0: Tensor,
    labels: Tensor | None,
    known: Known,
    seed: int,
    batch_size: int,
) -> Training:
    """Errors at the times `at`, and by interpolation in lambda at those of the walk. Their effect is at least that of
    the least excess whose errors pull each their own way, and at most that of the most excess pulling together.

    Args:
        measured: the denoiser without guidance. labels: (N,), of the images x0, or None.
        known: a larger set of images, these among them.
    """
    schedule, dim = sampler.schedule, x0[0].numel()
    held = [of_images(measured, schedule, t, x0, labels, known, seed, batch_size) for t in at]
    walked, variance = [t for t in times if t > 0], known.spectrum.total / dim
    least, most = (interpolated(schedule, at, [(h.excess[k] / dim) ** 0.5 for h in held], walked) for k in (0, 1))

    def effect(errors: Sequence[float], together: bool) -> float:
        return carried_to_the_end(sampler, schedule, times, errors, variance, together)

    quarter = [quarter_of(schedule.num_timesteps, t) for t in walked]
    only = [[e if q == k else 0.0 for e, q in zip(most, quarter, strict=True)] for k in range(4)]
    bounds = Bounds(effect(least, together=False), effect(most, together=True))
    return Training(list(at), held, bounds, [effect(errors, together=True) for errors in only])


def interpolated(
    schedule: Schedule, at: Sequence[float], values: Sequence[float], wanted: Sequence[float]
) -> list[float]:
    """Values known at some times, at others: linear in lambda, and beyond the ends those of the ends."""
    known = sorted((float(schedule.log_ratio(t)), value) for t, value in zip(at, values, strict=True))
    where = [float(schedule.log_ratio(t)) for t in wanted]
    return np.interp(where, [a for a, _ in known], [b for _, b in known]).tolist()


Setting = tuple[str, Sampler, Sequence[float]]


def all_times(settings: Sequence[Setting], parts: int = LEVELS[-1]) -> list[float]:
    """Falling: those of all settings and, of the first, each step in so many parts."""
    known = {float(t) for _, _, times in settings for t in times} | set(refined(list(settings[0][2]), parts))
    return sorted(known, reverse=True)


def candidates(
    settings: Sequence[Setting],
    denoise: Denoiser,
    z: Tensor,
    seed: int,
    parts: int = LEVELS[-1],
) -> list[Candidate]:
    """How far the ends of walks by several settings are from one walk that visits all of their times and, of the first
    setting, each step in so many parts. All begin in the same noise z (N, C, H, W), at the width of their first time.

    Args:
        settings: (words, sampler, times); the samplers differ in nothing, or are drawn from alike.
    """
    first, scale = settings[0], z[0].numel() ** 0.5
    schedule, fine = first[1].schedule, all_times(settings, parts)
    noise = SharedNoise(schedule, fine, seed, torch.arange(len(z)))

    def end(sampler: Sampler, times: Sequence[float]) -> Tensor:
        x = float(schedule.std(times[0])) * z
        return sampler.sample(denoise, x, times, noise)

    exact, found = end(first[1], fine), []
    for words, by, times in settings:
        distance = rms(end(by, times) - exact) / scale
        found.append(Candidate(words, steps_of(times), by.calls(times), distance))
    return found


def calls_of_all(sampler: Sampler, times: Sequence[float], settings: Sequence[Setting]) -> int:
    """Network calls of the walks of `initialisation`, `discretisation` and `candidates` together."""
    tried = sum(by.calls(grid) for _, by, grid in settings) + settings[0][1].calls(all_times(settings))
    return 2 * sampler.calls(times) + sum(sampler.calls(refined(list(times), parts)) for parts in LEVELS) + tried
