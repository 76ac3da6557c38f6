"""Where a walk of fewer steps ends, against one of more steps on the same noise.

Given x_0 the reverse kernels of DDPM compose: q(x_s | x_t, x_0) is q(x_u | x_t, x_0) followed by q(x_s | x_u, x_0). So
the noise of a long step is a sum of those of the short ones it stands for,

    z = sum over the short steps, v -> u, of  c(u, s) std(v, u) z_u  /  std(t, s)

with c(u, s) the factor of x_u in q(x_s | x_u, x_0) and std the kernels' own, whose squares add up: standard normal, and
where x_0 is the same for all short steps they end where the long one does. Two walks then differ by their
discretisation and not by chance. The distance of two points that share their noise, root mean square over points, is at
least the W2 of their laws. Knows samplers and denoisers as callables, and no truth.
"""

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.noise import Stream, keys, normal
from diffusion.process.grids import refined
from diffusion.process.kernels import posterior
from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Moment, Sampler


class SharedNoise:
    """Noise of walks along times of a finer grid: a function of (seed, image number, short step, number of the draw).

    A walk asks for that of each of its steps, `between` its two times; see `samplers.base.Sampler.walk`. Of a sampler
    that draws several times in a step the first draws of the short steps make up the first of the long one, the second
    its second.

    Args:
        schedule: noise levels.
        fine: falling times, all of those of the walks among them.
        seed: of the noise. numbers: of the images, int64 (B,).
    """

    def __init__(self, schedule: Schedule, fine: Sequence[float], seed: int, numbers: Tensor) -> None:
        self._schedule, self._seed, self._numbers = schedule, seed, numbers
        self._fine = torch.tensor(fine, dtype=torch.float64)
        self._short = posterior(schedule, self._fine[:-1], self._fine[1:]).std
        self._place = {t: k for k, t in enumerate(fine)}

    def __call__(self, x: Tensor) -> Tensor:
        raise TypeError("Shared noise belongs to the two times of a step: ask for it `between` them.")

    def between(self, t: float, s: float) -> RandomNormal:
        """The noise of the step from t down to s: standard normal like its argument, another one at each call."""
        assert t in self._place and s in self._place, "a time of the walk is not on the finer grid"
        start, stop, draws = self._place[t], self._place[s], itertools.count()
        assert start < stop, "the step does not go down"
        return lambda x: self._summed(start, stop, next(draws), x)

    def _summed(self, start: int, stop: int, draw: int, x: Tensor) -> Tensor:
        """Of the step between these places of the finer grid."""
        if stop - start == 1:
            return self._drawn(stop, draw, x)
        s = self._fine[stop]
        if s == 0:  # where no noise is added
            return torch.zeros_like(x)
        passed = self._fine[start + 1 : stop + 1]
        weights = posterior(self._schedule, passed, s.expand(len(passed))).x_t * self._short[start:stop]
        z = torch.zeros_like(x)
        for k, weight in enumerate((weights / weights.square().sum().sqrt()).tolist(), start + 1):
            z += weight * self._drawn(k, draw, x)
        return z

    def _drawn(self, k: int, draw: int, x: Tensor) -> Tensor:
        counters = (k, draw) if draw else (k,)
        return normal(keys(self._numbers.to(x.device), self._seed, Stream.STEP, *counters), x.shape[1:], x.dtype)


def rms(gap: Tensor) -> float:
    """Root mean square over points of the length of a difference (B, ...)."""
    return float(gap.double().flatten(1).square().sum(1).mean()) ** 0.5


class Refinement(NamedTuple):
    """Ends of walks on the same noise, by rising number of steps: (B, ...) each; the last is the finest."""

    num_steps: list[int]
    ends: list[Tensor]

    def gaps(self) -> list[float]:
        """Distance of the ends of each walk from those of the finest, which is left out."""
        return [rms(end - self.ends[-1]) for end in self.ends[:-1]]


def refine(
    sampler: Sampler,
    denoise: Denoiser,
    x: Tensor,
    grids: Sequence[Sequence[float]],
    seed: int,
    numbers: Tensor,
    fine: Sequence[float] | None = None,
) -> Refinement:
    """Walks from x along each of these grids, every one of whose times is a time of the last.

    Args:
        sampler: goes down at every step.
        x: (B, ...), at the first time of all grids.
        seed, numbers: of the noise of the walks.
        fine: the grid that the noise belongs to, where it is a finer one than the last.
    """
    fine, ends = grids[-1] if fine is None else fine, []
    noise = SharedNoise(sampler.schedule, fine, seed, numbers)
    for grid in grids:
        ends.append(sampler.sample(denoise, x, grid, noise))
    return Refinement([len(grid) - 1 for grid in grids], ends)


@torch.no_grad()
def local_errors(
    sampler: Sampler, denoise: Denoiser, points: Sequence[Tensor], times: Sequence[float], parts: int, seed: int
) -> list[float]:
    """Of each step of the grid, from points of the law at its beginning: how far one step ends from so many short ones
    on the same noise, root mean square. A sampler that reads the steps before is given those of a walk of short steps,
    which begins where the earliest of them did.

    Args:
        points: (B, ...) of noised data at each of the times but the last.
        parts: short steps in each step.
    """
    found = []
    for k, (t, s) in enumerate(pairwise(times)):
        first = max(0, k - sampler.memory)
        led, x = list(times[first : k + 2]), points[first]
        short = refined(led, parts)
        noise = SharedNoise(sampler.schedule, short, seed, torch.arange(len(x)))
        walked = [x, *(visit.x for visit in sampler.walk(denoise, x, short, noise))]
        *before, here, there = walked[::parts]  # at the times that led here, at t, and at s
        past = tuple(Moment(u, x_u, denoise(x_u, u)) for u, x_u in zip(led, before, strict=False))[::-1]
        found.append(rms(sampler.step(denoise, here, t, s, noise.between(t, s), past) - there))
    return found


class Order(NamedTuple):
    """error = constant * num_steps^-order, fitted to the logarithms."""

    order: float
    constant: float

    def at(self, num_steps: float) -> float:
        return self.constant * num_steps**-self.order


def fitted_order(num_steps: Sequence[int], errors: Sequence[float], onset: int = 0) -> Order | None:
    """By least squares, of the numbers of steps from `onset` on; None where fewer than two of these have an error above
    rounding."""
    known = [(n, e) for n, e in zip(num_steps, errors, strict=True) if n >= onset and math.isfinite(e) and e > 1e-13]
    if len(known) < 2:
        return None
    steps, found = np.log(np.array(known)).T
    slope, height = np.polyfit(steps, found, 1)
    return Order(float(-slope), float(np.exp(height)))


def order_of_gaps(num_steps: Sequence[int], gaps: Sequence[float]) -> Order | None:
    """The same of distances from the finest walk, num_steps one longer than gaps, which is itself off by its own error:
    of num_steps^-p the distances are n^-p - finest^-p. p is found between 0.2 and 4.

    Where errors of many steps add up to no more than rounding, or do not fall, None.
    """
    finest, steps = num_steps[-1], np.array(num_steps[:-1], dtype=float)
    known = np.array(gaps)
    if len(known) < 2 or not (known > 1e-13).all() or not known[-1] < known[0]:
        return None
    best, order, constant = math.inf, 0.0, 0.0
    for p in np.linspace(0.2, 4, 381):
        shape = steps**-p - float(finest) ** -p
        shift = np.log(known) - np.log(shape)
        miss = float(((shift - shift.mean()) ** 2).sum())
        if miss < best:
            best, order, constant = miss, float(p), float(np.exp(shift.mean()))
    return Order(order, constant)
