"""How many noise levels, how far apart, and how long a step: the techniques of NCSNv2 (Song & Ermon 2020).

Each is a function of the data's size and of what was chosen before:

    1  sigma_max   the largest distance between two points of the data                    largest_distance
    2  ratio       gamma of the geometric ladder, so that neighbouring shells overlap     ratio_of_overlap, overlap
    4  step_size   epsilon / sigma_1^2, so that T updates settle at the next level        step_size, settled

Technique 3, score = output / sigma, is the prediction `scaled_score`; technique 5 the averaged weights. Lengths are in
the units of the data: the paper's images lie in [0, 1], ours in [-1, 1], so its sigmas count double here; ratios and
step sizes, being free of units, do not change. Knows no schedule, no network and no sampler.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr
from torch import Tensor

STATED_OVERLAP = 0.5  # the paper's rule for technique 2
PUBLISHED_OVERLAP = 0.567  # what its five published ladders have


class Ladder(NamedTuple):
    """Settings of a run: `schedule=ve_geometric` with sigma_min, sigma_max, num_timesteps; annealed Langevin with
    step_size and `sampler.visits` updates at each level; and what these promise (`overlap`, `settled`)."""

    sigma_min: float
    sigma_max: float
    num_timesteps: int
    ratio: float
    overlap: float
    step_size: float
    visits: int
    settled: float


def largest_distance(points: Tensor, chunk: int = 1024) -> float:
    """The largest Euclidean distance between two of the points, (N, ...): technique 1. All pairs, chunk^2 at once."""
    parts = points.flatten(1).split(chunk)
    return max(float(torch.cdist(a, b).max()) for i, a in enumerate(parts) for b in parts[i:])


def overlap(ratio: float, dim: int) -> float:
    """C(gamma) = Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma), sec. 3.2.

    Noise of deviation sigma lies at the radius sqrt(D) sigma, give or take sigma / sqrt(2). This is the share of it
    that lies where three such deviations either side of the radius reach at the next level up, gamma sigma.

    Args:
        ratio: gamma, of two neighbouring levels, at least 1.
        dim: D, numbers in a data point.
    """
    apart = math.sqrt(2 * dim) * (ratio - 1)
    return float(ndtr(apart + 3 * ratio) - ndtr(apart - 3 * ratio))


def ratio_of_overlap(dim: int, wanted: float = STATED_OVERLAP) -> float:
    """The ratio gamma with C(gamma) = wanted: technique 2. More overlap means more levels.

    Raises:
        ValueError: `wanted` is not between 0 and C(1) = 0.9973.
    """
    if not 0 < wanted < overlap(1, dim):
        raise ValueError(f"overlap={wanted} is outside (0, {overlap(1, dim):.4f}).")
    highest = 2.0
    while overlap(highest, dim) > wanted:
        if highest > 1e9:  # three deviations either side never part in so few dimensions
            raise ValueError(f"overlap={wanted}: in {dim} dimensions neighbouring levels always overlap by more.")
        highest *= 2
    return brentq(lambda ratio: overlap(ratio, dim) - wanted, 1, highest, xtol=1e-12)


def num_levels(sigma_min: float, sigma_max: float, ratio: float) -> int:
    """Levels of a geometric ladder between the two, both included, whose ratio comes nearest to this one."""
    return 1 + round(math.log(sigma_max / sigma_min) / math.log(ratio))


def ladder_ratio(sigma_min: float, sigma_max: float, num_timesteps: int) -> float:
    """gamma = sigma_{i+1} / sigma_i of the geometric ladder with so many levels, at least two."""
    return (sigma_max / sigma_min) ** (1 / (num_timesteps - 1))


def settled(ratio: float, step_size: float, visits: int) -> float:
    """s_T^2 / sigma^2: variance after the updates at a level, over that which it ought to have (sec. 3.4, prop. 3).

    The data are a single point, whose score is known, and the start is the level above, of variance gamma^2 sigma^2.
    With h = step_size every update takes the variance v, in units of sigma^2, to (1 - h)^2 v + 2 h, so that

        s_T^2 / sigma^2 = (1 - h)^(2 T) (gamma^2 - b) + b,    b = 2 / (2 - h)

    where b > 1 is what updates without end settle at. Never quite 1: few or short steps stay above, long ones too.

    Args:
        ratio: gamma.
        step_size: h, the step over sigma^2: the papers' epsilon / sigma_1^2.
        visits: T, updates at each level.
    """
    end = 2 / (2 - step_size)
    return (1 - step_size) ** (2 * visits) * (ratio**2 - end) + end


def step_size(ratio: float, visits: int) -> float:
    """The step over sigma^2 that brings `settled` nearest to 1 for so many updates: technique 4.

    The published step sizes are these, within 3 %; that of LSUN church alone is twice as long.
    """
    return float(minimize_scalar(lambda h: settled(ratio, h, visits), bounds=(0, 1), method="bounded").x)


def ladder(sigma_min: float, sigma_max: float, dim: int, visits: int, wanted: float = STATED_OVERLAP) -> Ladder:
    """All of it: the settings that follow from the data's size and from the updates that one can afford.

    Args:
        sigma_min: so small that the data lose nothing by it; the paper's 0.01 for images in [0, 1].
        sigma_max: `largest_distance` of the data.
        dim: numbers in a data point.
        visits: updates at each level, the paper's T: 3 to 5.
        wanted: overlap of neighbouring levels.
    """
    levels = num_levels(sigma_min, sigma_max, ratio_of_overlap(dim, wanted))
    ratio = ladder_ratio(sigma_min, sigma_max, levels)
    step = step_size(ratio, visits)
    return Ladder(sigma_min, sigma_max, levels, ratio, overlap(ratio, dim), step, visits, settled(ratio, step, visits))
