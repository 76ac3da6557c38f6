"""How far what sampling starts from is from noised data: W2(Law(X_t), N(0, std_t^2 I)) at the first time of a walk.

Of Gaussian data in closed form (`gaussian.w2`); of a mixture, and of a set of images, between two bounds:

    low     the distance of the Gaussians with their means and covariances (Gelbrich 1990)
    high    components, or points, are carried one by one: sqrt(sum_k w_k W2^2(component k, prior))

Where the noise is large the law is all but Gaussian, and the distance is the lower of the two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lab.gaussian import Law, law_at, prior_at, w2
from diffusion.process.schedule import Schedule
from diffusion.process.toy import Mixture


class Bounds(NamedTuple):
    """Two numbers between which a distance lies."""

    low: float
    high: float


class Spectrum(NamedTuple):
    """Mean and covariance of a set of points as far as a distance from isotropic noise asks for them.

    mean_square: |mean|^2. variances: the covariance's eigenvalues that are not 0, float64. dim: numbers in a point.
    """

    mean_square: float
    variances: Tensor
    dim: int

    @property
    def total(self) -> float:
        """E|x - mean|^2."""
        return float(self.variances.sum())


def of_mixture(toy: Mixture, schedule: Schedule, t: float) -> Bounds:
    """Of the noised data of a mixture at time t; both bounds are the same for a single Gaussian."""
    weights, means, covariances = toy.components(schedule(t))
    prior = prior_at(schedule, t, means.shape[1])
    each = [w2(Law(m, c), prior) ** 2 for m, c in zip(means, covariances, strict=True)]
    one_by_one = float(weights @ torch.tensor(each, dtype=torch.float64)) ** 0.5
    return Bounds(w2(law_at(toy, schedule(t)), prior), one_by_one)


def spectrum(points: Tensor) -> Spectrum:
    """Of points (N, ...), by the smaller of their covariance and their matrix of inner products; N at least 2."""
    x = points.double().flatten(1)
    mean = x.mean(0)
    centred = (x - mean) / (len(x) - 1) ** 0.5
    square = centred @ centred.mT if len(x) < x.shape[1] else centred.mT @ centred
    values = torch.linalg.eigvalsh(square).flip(0)[: min(len(x) - 1, x.shape[1])]
    return Spectrum(float(mean.square().sum()), values.clamp(min=0), x.shape[1])


def of_points(found: Spectrum, schedule: Schedule, t: float) -> Bounds:
    """Of a set of points, noised, at time t, from its spectrum: of the set, not of the law that it is drawn from."""
    (alpha, sigma), std = schedule(t), schedule.std(t)
    spread = ((alpha**2 * found.variances + sigma**2).sqrt() - std).square().sum()
    spread = spread + (found.dim - len(found.variances)) * (sigma - std) ** 2
    low = alpha**2 * found.mean_square + spread
    high = alpha**2 * (found.mean_square + found.total) + found.dim * (std - sigma) ** 2
    return Bounds(float(low) ** 0.5, float(high) ** 0.5)
