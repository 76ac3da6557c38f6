"""The number of noise levels, their ratio and the step size: the techniques of NCSNv2 (Song & Ermon 2020).

Each is a function of the size of the data and of the values chosen before it:

    1  sigma_max   the largest distance between two points of the data                    largest_distance
    2  ratio       gamma of the geometric ladder, so that neighbouring shells overlap     ratio_of_overlap, overlap
    4  step_size   epsilon / sigma_1^2, so that T updates settle at the next level        step_size, settled

Technique 3, score = output / sigma, is the prediction `scaled_score`. Technique 5 is the average of the weights.
Lengths are in the units of the data. The paper's images lie in [0, 1] and ours in [-1, 1], so that its sigmas are
doubled here. Ratios and step sizes have no unit and do not change. This module knows no schedule, no network and no
sampler.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr
from torch import Tensor

STATED_OVERLAP = 0.5  # the rule of technique 2 in the paper
PUBLISHED_OVERLAP = 0.567  # the overlap of the paper's five published ladders


class Ladder(NamedTuple):
    """Settings of a run, and the values of `overlap` and `settled` that follow from them.

    sigma_min, sigma_max and num_timesteps are for `schedule=ve_geometric`; step_size and visits (`sampler.visits`,
    updates per level) are for annealed Langevin dynamics.
    """

    sigma_min: float
    sigma_max: float
    num_timesteps: int
    ratio: float
    overlap: float
    step_size: float
    visits: int
    settled: float


def largest_distance(points: Tensor, chunk: int = 1024) -> float:
    """The largest Euclidean distance between two points of (N, ...): technique 1.

    All pairs are compared, chunk^2 pairs at a time.
    """
    parts = points.flatten(1).split(chunk)
    return max(float(torch.cdist(a, b).max()) for i, a in enumerate(parts) for b in parts[i:])


def overlap(ratio: float, dim: int) -> float:
    """C(gamma) = Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma), sec. 3.2.

    The norm of noise of deviation sigma is sqrt(D) sigma, with a standard deviation of sigma / sqrt(2). C is the share
    of that noise whose norm is within three such deviations of the norm at the next level up, gamma sigma.

    Args:
        ratio: gamma, the ratio of two neighbouring levels, at least 1.
        dim: D, the number of dimensions of a data point.
    """
    apart = math.sqrt(2 * dim) * (ratio - 1)
    return float(ndtr(apart + 3 * ratio) - ndtr(apart - 3 * ratio))


def ratio_of_overlap(dim: int, wanted: float = STATED_OVERLAP) -> float:
    """The ratio gamma with C(gamma) = wanted: technique 2. A larger overlap means more levels.

    Raises:
        ValueError: `wanted` is not between 0 and C(1) = 0.9973, or cannot be reached in so few dimensions.
    """
    if not 0 < wanted < overlap(1, dim):
        raise ValueError(f"overlap={wanted} is outside (0, {overlap(1, dim):.4f}).")
    highest = 2.0
    while overlap(highest, dim) > wanted:
        if highest > 1e9:  # in few dimensions the overlap does not fall to zero
            raise ValueError(f"overlap={wanted} cannot be reached: with dim={dim} every ratio gives a larger overlap.")
        highest *= 2
    return brentq(lambda ratio: overlap(ratio, dim) - wanted, 1, highest, xtol=1e-12)


def num_levels(sigma_min: float, sigma_max: float, ratio: float) -> int:
    """Number of levels of a geometric ladder from sigma_min to sigma_max, both included, with the nearest ratio."""
    return 1 + round(math.log(sigma_max / sigma_min) / math.log(ratio))


def ladder_ratio(sigma_min: float, sigma_max: float, num_timesteps: int) -> float:
    """gamma = sigma_{i+1} / sigma_i of a geometric ladder of num_timesteps levels, at least two."""
    return (sigma_max / sigma_min) ** (1 / (num_timesteps - 1))


def settled(ratio: float, step_size: float, visits: int) -> float:
    """s_T^2 / sigma^2: the variance after the updates at a level, divided by the exact one (sec. 3.4, prop. 3).

    The data are a single point, whose score is known. The updates start from the level above, of variance gamma^2
    sigma^2. With h = step_size, an update maps the variance v, in units of sigma^2, to (1 - h)^2 v + 2 h, so that

        s_T^2 / sigma^2 = (1 - h)^(2 T) (gamma^2 - b) + b,    b = 2 / (2 - h)

    where b > 1 is the limit for T -> infinity. The ratio is always above 1: with few or short steps because the start
    is not forgotten, with long steps because b is larger.

    Args:
        ratio: gamma.
        step_size: h, the step divided by sigma^2: the papers' epsilon / sigma_1^2.
        visits: T, the number of updates per level.
    """
    end = 2 / (2 - step_size)
    return (1 - step_size) ** (2 * visits) * (ratio**2 - end) + end


def step_size(ratio: float, visits: int) -> float:
    """The step divided by sigma^2 for which `settled` is nearest to 1, given the updates per level: technique 4.

    The published step sizes agree within 3 %, except for LSUN church, whose step is twice as long.
    """
    return float(minimize_scalar(lambda h: settled(ratio, h, visits), bounds=(0, 1), method="bounded").x)


def ladder(sigma_min: float, sigma_max: float, dim: int, visits: int, wanted: float = STATED_OVERLAP) -> Ladder:
    """The settings that follow from the size of the data and from the number of updates per level.

    Args:
        sigma_min: so small that the noise is not visible; the paper uses 0.01 for images in [0, 1].
        sigma_max: `largest_distance` of the data.
        dim: number of dimensions of a data point.
        visits: updates per level, the paper's T: 3 to 5.
        wanted: overlap of neighbouring levels.
    """
    levels = num_levels(sigma_min, sigma_max, ratio_of_overlap(dim, wanted))
    ratio = ladder_ratio(sigma_min, sigma_max, levels)
    step = step_size(ratio, visits)
    return Ladder(sigma_min, sigma_max, levels, ratio, overlap(ratio, dim), step, visits, settled(ratio, step, visits))
