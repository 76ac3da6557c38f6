"""Data in the plane while noise comes and goes: what is drawn of it, as arrays.

All of it is in u = x_t / std_t, what a network is fed: data and noise then fill one frame at all times and on all
schedules. Knows mixtures, schedules and samplers as callables; it draws nothing.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.lab.modes import class_weights, judged
from diffusion.noise import ImageNoise
from diffusion.process.schedule import Denoiser, Level, Schedule
from diffusion.process.toy import Mixture
from diffusion.samplers.base import Sampler

HALF = 2.2  # of the frame's side, in u


class Field(NamedTuple):
    """The law of u at a time on a square grid over [-half, half]^2, as pictures have it: row i from the bottom.

    density (n, n). arrows: places (m^2, 2) and scores there (m^2, 2), the gradient of the log density in u.
    """

    density: NDArray[np.float64]
    places: NDArray[np.float64]
    scores: NDArray[np.float64]


def field(toy: Mixture, schedule: Schedule, t: float, points: int = 160, arrows: int = 13, half: float = HALF) -> Field:
    level, std = schedule(t), float(schedule.std(t))
    line = torch.linspace(-half, half, points, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    density = toy.log_density(std * torch.stack([x, y], dim=-1).reshape(-1, 2), level).exp() * std**2
    coarse = torch.linspace(-half, half, arrows + 2, dtype=torch.float64)[1:-1]
    places = torch.cartesian_prod(coarse, coarse)
    scores = std * toy.score(std * places, level)
    return Field(density.reshape(points, points).numpy(), places.numpy(), scores.numpy())


def peaks(density: NDArray[np.float64], rise: float = 0.1, least: float = 1e-3) -> int:
    """Peaks of a density on a grid that stand out: from each, the way to any higher one leads down by at least `rise`
    in the logarithm. What is below a share of the highest place is no way and no peak. By flooding from above."""
    columns, height = density.shape[1] + 2, np.pad(np.log(np.maximum(density, 1e-300)), 1, constant_values=-np.inf)
    height, top = height.ravel(), {}
    floor, owner = height.max() + math.log(least), {}

    def root(place: int) -> int:
        while owner[place] != place:
            owner[place] = place = owner[owner[place]]
        return place

    found = 0
    for place in np.argsort(-height, kind="stable").tolist():
        if height[place] < floor:
            break
        owner[place], top[place] = place, height[place]
        around = (-columns - 1, -columns, -columns + 1, -1, 1, columns - 1, columns, columns + 1)
        for other in {root(place + step) for step in around if place + step in owner}:
            high, low = sorted((root(place), other), key=lambda r: -top[r])
            if high != low:
                found += top[low] - height[place] >= rise
                owner[low] = high
    apart = [place for place in owner if owner[place] == place and top[place] - floor >= rise]
    return int(found) + len(apart)


def peaks_at(toy: Mixture, schedule: Schedule, t: float, points: int = 81) -> int:
    """Peaks of the law of u at a time, as a grid of so many points a side sees it: blurred by one of its cells."""
    (alpha, sigma), std = schedule(t), schedule.std(t)
    line = torch.linspace(-HALF, HALF, points, dtype=torch.float64)
    blurred = Level(alpha, (sigma**2 + (std * 2 * HALF / (points - 1)) ** 2).sqrt())
    density = toy.log_density(std * torch.cartesian_prod(line, line), blurred).exp()
    return peaks(density.reshape(points, points).numpy())


def marginal(toy: Mixture, schedule: Schedule, times: Sequence[float], points: int = 220) -> NDArray[np.float64]:
    """Density of the first coordinate of u at each of these times, (points, times): a picture of space and time."""
    line, columns = torch.linspace(-HALF, HALF, points, dtype=torch.float64)[:, None], []
    for t in times:
        std = float(schedule.std(t))
        weights, means, covariances = toy.components(schedule(t))
        mean, variance = means[:, 0] / std, covariances[:, 0, 0].clamp(min=1e-12) / std**2
        bells = (-0.5 * (line - mean) ** 2 / variance).exp() / (2 * math.pi * variance).sqrt()
        columns.append(bells @ weights)
    return torch.stack(columns, dim=1).numpy()


def class_bits(toy: Mixture, schedule: Schedule, t: float, x0: Tensor, seed: int) -> float:
    """What x_t tells of the class of x_0, in bits: I = H(class) - E H(class | x_t), over points of the data (N, d)."""
    alpha, sigma = (float(value) for value in schedule(t))
    noise = ImageNoise(seed, torch.arange(len(x0)))
    known = toy.responsibilities(alpha * x0 + sigma * noise(x0), schedule(t))
    return float(entropy(class_weights(toy)[None]).mean() - entropy(known).mean())


def entropy(probabilities: Tensor) -> Tensor:
    """Over the last axis, bits."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1) / math.log(2)


class Paths(NamedTuple):
    """Walks in u: times (S + 1,), places (S + 1, B, 2), class of each at its end (B,), and at each time the share of
    walks whose most probable class is already that."""

    times: list[float]
    places: NDArray[np.float64]
    classes: NDArray[np.int64]
    decided: list[float]


def noising(toy: Mixture, schedule: Schedule, times: Sequence[float], x0: Tensor, seed: int) -> Paths:
    """x_t = alpha_t x_0 + sigma_t epsilon at rising times, each point with one epsilon: `decided` from its own "
    "class."""
    noise = ImageNoise(seed, torch.arange(len(x0)))(x0)
    classes, places, decided = judged(toy, x0), [], []
    for t in times:
        alpha, sigma = (float(value) for value in schedule(t))
        x_t = alpha * x0 + sigma * noise
        places.append(x_t / float(schedule.std(t)))
        decided.append(same_class(toy, schedule, t, x_t, classes))
    return Paths(list(times), torch.stack(places).numpy(), classes.numpy(), decided)


@torch.no_grad()
def denoising(
    toy: Mixture, sampler: Sampler, denoise: Denoiser, times: Sequence[float], number: int, seed: int
) -> Paths:
    """The walks of a sampler from pure noise, along these falling times."""
    schedule, noise = sampler.schedule, ImageNoise(seed, torch.arange(number))
    x = float(schedule.std(times[0])) * noise(torch.zeros(number, 2, dtype=torch.float64))
    walked = [x, *(visit.x for visit in sampler.walk(denoise, x, times, noise))]
    classes = judged(toy, walked[-1])
    places = [x / float(schedule.std(t)) for x, t in zip(walked, times, strict=True)]
    decided = [same_class(toy, schedule, t, x, classes) for x, t in zip(walked, times, strict=True)]
    return Paths(list(times), torch.stack(places).numpy(), classes.numpy(), decided)


def same_class(toy: Mixture, schedule: Schedule, t: float, x_t: Tensor, classes: Tensor) -> float:
    """Share of noised points whose most probable class is the given one."""
    return float((toy.responsibilities(x_t, schedule(t)).argmax(-1) == classes).double().mean())
