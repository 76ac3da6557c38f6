"""Gaussian data: what a sampler makes of their law, exactly.

The exact denoiser of N(m, S) is affine in x_t, and so is every step of a sampler that is linear in what the denoiser
says: x_s = A x_t + b + C z. Then N(mean, S) becomes N(A mean + b, A S A^T + C C^T), without a sample being drawn, and
the distance of two laws is that of Gaussians (Dowson & Landau 1982; Olkin & Pukelsheim 1982),

    W2^2 = |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)

Knows samplers as callables; it knows no network and draws nothing.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Level, Schedule
from diffusion.process.toy import Gaussian, Mixture
from diffusion.samplers.base import Moment, Sampler


class Law(NamedTuple):
    """N(mean, covariance): (d,) and (d, d), float64."""

    mean: Tensor
    covariance: Tensor


class Affine(NamedTuple):
    """x -> matrix x + offset + noise z, z standard normal: (d, e), (d,), (d, n d), float64; x of e numbers may be
    several places of a walk, and z of n draws, one after the other."""

    matrix: Tensor
    offset: Tensor
    noise: Tensor

    def __call__(self, law: Law) -> Law:
        """The law of the outcome."""
        covariance = self.matrix @ law.covariance @ self.matrix.mT + self.noise @ self.noise.mT
        return Law(self.matrix @ law.mean + self.offset, (covariance + covariance.mT) / 2)

    def remembered(self, kept: int) -> "Affine":
        """The outcome, followed by the first `kept` numbers of x."""
        rest = torch.eye(self.matrix.shape[1], dtype=torch.float64)[:kept]
        noise = torch.cat([self.noise, self.noise.new_zeros(kept, self.noise.shape[1])])
        return Affine(torch.cat([self.matrix, rest]), torch.cat([self.offset, rest.new_zeros(kept)]), noise)


def law_at(toy: Mixture, level: Level) -> Law:
    """The noised data as a Gaussian of the same mean and covariance: their law itself, where they are Gaussian."""
    return Law(*toy.moments(level))


def prior_at(schedule: Schedule, t: float, dim: int) -> Law:
    """What sampling starts from at time t: N(0, std_t^2 I), with std_t^2 = alpha_t^2 + sigma_t^2.

    1 under VP, 1 + sigma_t^2 under VE: the law of noised data of mean 0 and variance 1. The code of Song et al. 2021
    (score SDE) starts VE from sigma_t^2 alone.
    """
    return Law(torch.zeros(dim, dtype=torch.float64), schedule.std(t) ** 2 * torch.eye(dim, dtype=torch.float64))


def w2(one: Law, other: Law) -> float:
    """Wasserstein distance of two Gaussians, by the map that carries one to the other: no digits cancel.

    x -> m' + G (x - m), G = S^-1/2 (S^1/2 S' S^1/2)^1/2 S^-1/2, moves a point by (G - I)(x - m) around m' - m. Where
    both covariances are singular the formula above is taken as it stands, to 1e-8 of their size.
    """
    if _least(one.covariance) < _least(other.covariance):
        one, other = other, one
    shift = float((one.mean - other.mean).square().sum())
    root = _root(one.covariance)
    middle = _root(root @ other.covariance @ root)
    if _least(one.covariance) > 1e-12 * float(one.covariance.diagonal().max()):
        inverse = torch.linalg.inv(root)
        moved = (inverse @ middle @ inverse - torch.eye(len(root), dtype=torch.float64)) @ root
        return (shift + float(moved.square().sum())) ** 0.5
    spread = float((one.covariance + other.covariance - 2 * middle).diagonal().sum())
    return (shift + max(spread, 0.0)) ** 0.5


def step_of(
    sampler: Sampler, denoise: Denoiser, t: float, s: float, dim: int, before: Sequence[float] = (), draws: int = 1
) -> Affine:
    """The sampler's step from t to s as a map, found by trying it on the axes; for vectors of `dim` numbers.

    Args:
        before: the times of the walk before t that the step remembers, newest first. The map is then of x_t followed
            by x at these times.
        draws: of noise in the step, at least; where it takes more it is tried again.

    Raises:
        ValueError: the step is not affine: the denoiser is not, or the sampler is not linear in what it says.
    """
    places = dim * (1 + len(before))
    eye, zero = torch.eye(places, dtype=torch.float64), torch.zeros(1, places, dtype=torch.float64)
    trial = torch.linspace(0.3, 1.1, places, dtype=torch.float64)[None]
    shaken = torch.linspace(-0.6, -2.2, draws * dim, dtype=torch.float64)[None]
    still = torch.zeros(1 + places, draws * dim, dtype=torch.float64)
    z = torch.cat([still, torch.eye(draws * dim, dtype=torch.float64), shaken])
    x = torch.cat([zero, eye, torch.zeros(draws * dim, places, dtype=torch.float64), trial])
    drawn: list[Tensor] = []

    def noise(like: Tensor) -> Tensor:
        drawn.append(like)
        if like.shape != x_t.shape:
            raise not_affine(sampler)
        return z[:, dim * (len(drawn) - 1) : dim * len(drawn)] if len(drawn) <= draws else torch.zeros_like(like)

    x_t, *others = x.split(dim, dim=1)
    past = tuple(Moment(u, x_u, denoise(x_u, u)) for u, x_u in zip(before, others, strict=True))
    y = sampler.step(denoise, x_t, t, s, noise, past)
    if len(drawn) > draws:
        return step_of(sampler, denoise, t, s, dim, before, len(drawn))
    offset, last = y[0], y[-1]
    found = Affine((y[1 : 1 + places] - offset).mT, offset, (y[1 + places : -1] - offset).mT)
    expected = found.matrix @ trial[0] + offset + found.noise @ shaken[0]
    if not torch.allclose(last, expected, rtol=1e-9, atol=1e-9 * float(1 + x.abs().max())):
        raise not_affine(sampler)
    return found


def not_affine(sampler: Sampler) -> ValueError:
    return ValueError(f"{type(sampler).__name__}: its step is not affine on Gaussian data, so their law is not known.")


def propagated(sampler: Sampler, denoise: Denoiser, law: Law, times: Sequence[float]) -> Iterator[Law]:
    """The law after each step of the walk along these times, from `law` at the first. Of a sampler that remembers, the
    law of all places that it remembers is carried along."""
    dim, whole = len(law.mean), law
    for (t, s), before in zip(pairwise(times), sampler.pasts(times), strict=True):
        places = dim * (1 + len(before))
        whole = Law(whole.mean[:places], whole.covariance[:places, :places])
        kept = dim * min(1 + len(before), sampler.memory)
        whole = step_of(sampler, denoise, t, s, dim, before).remembered(kept)(whole)
        yield Law(whole.mean[:dim], whole.covariance[:dim, :dim])


def end_of(sampler: Sampler, denoise: Denoiser, law: Law, times: Sequence[float]) -> Law:
    """The law at the last of these times."""
    return [law, *propagated(sampler, denoise, law, times)][-1]


def fitted(toy: Gaussian, num_points: int, generator: torch.Generator) -> Gaussian:
    """The Gaussian of largest likelihood of so many points of another: a model that has learned from them all there is
    to learn.

    Raises:
        ValueError: fewer points than twice the numbers in one.
    """
    mean, _ = toy.moments(Level(*torch.tensor([1.0, 0.0], dtype=torch.float64)))
    if num_points < 2 * len(mean):
        raise ValueError(f"{num_points} points are too few to estimate a covariance of {len(mean)} numbers from.")
    x = toy.sample(num_points, generator)
    return Gaussian(x.mean(0), covariance=x.T.cov(correction=0).reshape(len(mean), len(mean)))


# ---- the denoiser's error ----


class DenoisingError(NamedTuple):
    """E|D(x_t) - x_0|^2 of a denoiser, over all numbers of a point: what no denoiser avoids, and what is above it."""

    irreducible: float
    excess: float


def denoising_error(denoise: Denoiser, toy: Gaussian, schedule: Schedule, t: float) -> DenoisingError:
    """At time t, of an affine denoiser, in closed form.

    With C = alpha^2 S + sigma^2 I the irreducible part is tr(S - alpha^2 S C^-1 S); that of D(x) = P x + q above it is
    E|(P - P*) x + q - q*|^2 over the law N(alpha m, C) of x_t.
    """
    level = schedule(t)
    alpha, _ = level
    law, dim = law_at(toy, level), len(law_at(toy, level).mean)
    clean = law_at(toy, Level(torch.ones_like(alpha), torch.zeros_like(alpha))).covariance
    known = torch.linalg.solve(law.covariance, clean)
    irreducible = float((clean - alpha**2 * clean @ known).diagonal().sum())
    probe = torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)])
    gap = denoise(probe, t).x0 - toy.denoiser(schedule)(probe, t).x0
    matrix = (gap[1:] - gap[0]).mT
    mean = matrix @ law.mean + gap[0]
    excess = mean.square().sum() + (matrix @ law.covariance @ matrix.mT).diagonal().sum()
    return DenoisingError(irreducible, float(excess))


def _root(covariance: Tensor) -> Tensor:
    values, axes = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return axes @ torch.diag(values.clamp(min=0).sqrt()) @ axes.mT


def _least(covariance: Tensor) -> float:
    return float(torch.linalg.eigvalsh(covariance)[0])
