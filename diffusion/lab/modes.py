"""How much of each class a sampler makes, against its weight: counts, intervals, and one test of all of them.

Knows mixtures and points; it knows no sampler.
"""

import math
from typing import NamedTuple

import torch
from scipy.stats import chisquare, norm
from torch import Tensor

from diffusion.process.schedule import Level
from diffusion.process.toy import Mixture

CLEAN = Level(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


class Interval(NamedTuple):
    """A share and its confidence interval."""

    share: float
    low: float
    high: float


class Shares(NamedTuple):
    """What was counted. counts (classes,), expected shares (classes,), and the p of a chi-square test of all of them:
    the chance of shares as far from the expected ones as these, were these right."""

    counts: list[int]
    expected: list[float]
    p: float

    def intervals(self, confidence: float = 0.95) -> list[Interval]:
        return [wilson(count, sum(self.counts), confidence) for count in self.counts]


def class_weights(toy: Mixture) -> Tensor:
    """Weight of each class, (classes,), float64."""
    return torch.zeros(toy.num_classes, dtype=torch.float64).index_add(0, toy.classes, toy.weights)


def judged(toy: Mixture, x: Tensor) -> Tensor:
    """The most probable class of clean points (N, d): (N,)."""
    return toy.responsibilities(x, CLEAN).argmax(-1)


def shares(toy: Mixture, x: Tensor) -> Shares:
    """Of the points of a sampler, (N, d), all finite."""
    counts, weights = judged(toy, x).bincount(minlength=toy.num_classes), class_weights(toy)
    p = chisquare(counts.numpy(), (weights * len(x)).numpy()).pvalue if toy.num_classes > 1 else 1.0
    return Shares(counts.tolist(), weights.tolist(), float(p))


def wilson(count: int, number: int, confidence: float = 0.95) -> Interval:
    """The interval of a share by Wilson's score (1927): also for 0 of n, and never outside [0, 1]."""
    z = float(norm.ppf((1 + confidence) / 2))
    share = count / number
    centre = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
