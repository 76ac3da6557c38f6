"""Where the error of a sampler comes from: initialisation, training, discretisation; and their sum against the whole.

The end of a walk is off for three reasons, and a walk can be had in which one of them after the other is mended:

    from pure noise, by this denoiser, in these steps           what one gets
    from noised data, by this denoiser, in these steps          without the error of initialisation
    from noised data, by the exact denoiser, in these steps     without that of training either
    the data, or what far more steps make of noised data        without that of discretisation either

The distance of each line from the next is the part of one error. By the triangle inequality the distance of the first
from the last is at most their sum. Of Gaussian data all of it is known exactly (`of_gaussian`). Of a mixture the lines
are walks on the same noise, the last of them one in many more steps, and distances are those of points that belong
together, at least as large as those of the laws (`of_mixture`).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lab.gaussian import Law, end_of, law_at, prior_at, step_of, w2
from diffusion.lab.modes import CLEAN
from diffusion.lab.refinement import SharedNoise, local_errors, refine, rms
from diffusion.noise import Stream, keys, normal
from diffusion.process.grids import refined
from diffusion.process.kernels import transition
from diffusion.process.schedule import Denoiser, Schedule
from diffusion.process.toy import Gaussian, Mixture
from diffusion.samplers.base import Sampler


class Parts(NamedTuple):
    """The share of each error in the distance of what is sampled from the data, and that distance itself."""

    initialisation: float
    training: float
    discretisation: float
    total: float

    @property
    def sum(self) -> float:
        """Of the three; at least the total."""
        return self.initialisation + self.training + self.discretisation


class Step(NamedTuple):
    """A step of a walk.

    renewed: 1 - r_s^2 / r_t^2 with r = sigma / alpha, under VE 1 - sigma_s^2 / sigma_t^2: the share of the noise's
    variance that the step takes away. error: how far it ends from the exact law, if it began there.
    """

    t: float
    s: float
    renewed: float
    error: float


def renewed(schedule: Schedule, t: float, s: float) -> float:
    """1 - (sigma_s alpha_t / (alpha_s sigma_t))^2: 0 for a step that stays, 1 for one to clean data."""
    alpha, sigma = transition(schedule, t, s)
    return float((sigma / schedule(t).sigma) ** 2)


# ---- Gaussian data: laws ----


def of_gaussian(toy: Gaussian, sampler: Sampler, denoise: Denoiser, times: Sequence[float]) -> Parts:
    """W2 of laws, exactly. denoise: affine, as that of another Gaussian is."""
    schedule, exact = sampler.schedule, toy.denoiser(sampler.schedule)
    clean, begun = law_at(toy, CLEAN), law_at(toy, schedule(times[0]))
    if times[-1] > 0:
        clean = law_at(toy, schedule(times[-1]))
    prior = prior_at(schedule, times[0], len(begun.mean))
    ends = [
        end_of(sampler, denoise, prior, times),
        end_of(sampler, denoise, begun, times),
        end_of(sampler, exact, begun, times),
        clean,
    ]
    return Parts(*(w2(one, other) for one, other in zip(ends, ends[1:], strict=False)), total=w2(ends[0], ends[-1]))


def steps_of_gaussian(toy: Gaussian, sampler: Sampler, times: Sequence[float]) -> list[Step]:
    """Each step of the walk by the exact denoiser, from the exact law at its beginning: W2 to that at its end. A
    sampler that reads the steps before is given those that the probability flow would have taken, which keeps to the
    law."""
    schedule, exact, found = sampler.schedule, toy.denoiser(sampler.schedule), []
    for (t, s), before in zip(pairwise(times), sampler.pasts(times), strict=True):
        law, there = law_at(toy, schedule(t)), law_at(toy, schedule(s))
        moved = step_of(sampler, exact, t, s, len(law.mean), before)(along_flow(toy, schedule, [t, *before]))
        found.append(Step(t, s, renewed(schedule, t, s), w2(moved, there)))
    return found


def along_flow(toy: Gaussian, schedule: Schedule, times: Sequence[float]) -> Law:
    """The law of the exact x at the first of these times, followed by where the probability flow has it at the
    others."""
    first, *others = times
    law = law_at(toy, schedule(first))
    axes = torch.cat([torch.zeros_like(law.mean)[None], torch.eye(len(law.mean), dtype=torch.float64)])
    moved = torch.cat([axes, *(toy.flow(axes, schedule, first, u) for u in others)], dim=1)
    matrix, offset = (moved[1:] - moved[0]).mT, moved[0]
    return Law(matrix @ law.mean + offset, matrix @ law.covariance @ matrix.mT)


def distance_of_gaussian(toy: Gaussian, sampler: Sampler, times: Sequence[float]) -> float:
    """W2 between the exact law at the end of the times and that of a walk which begins in the exact law."""
    schedule = sampler.schedule
    begun, there = (law_at(toy, schedule(t)) for t in (times[0], times[-1]))
    return w2(end_of(sampler, toy.denoiser(schedule), begun, times), there)


# ---- mixtures: points on shared noise ----


class Starts(NamedTuple):
    """Points (N, d) at the first time of a walk: noised data, and pure noise, from the same noise."""

    data: Tensor
    prior: Tensor


def starts(schedule: Schedule, t: float, x0: Tensor, seed: int) -> Starts:
    """alpha x_0 + sigma z and std z."""
    (alpha, sigma), std = (float(value) for value in schedule(t)), float(schedule.std(t))
    z = normal(keys(torch.arange(len(x0), device=x0.device), seed, Stream.PRIOR), x0.shape[1:], x0.dtype)
    return Starts(alpha * x0 + sigma * z, std * z)


def steps_of_mixture(
    toy: Mixture, sampler: Sampler, times: Sequence[float], x0: Tensor, seed: int, parts: int = 16
) -> list[Step]:
    """Each step of the walk by the exact denoiser, from noised points of x0 (N, d): how far it ends from so many short
    ones on the same noise, root mean square."""
    schedule, exact = sampler.schedule, toy.denoiser(sampler.schedule)
    points = [starts(schedule, t, x0, seed).data for t in times[:-1]]
    found = local_errors(sampler, exact, points, times, parts, seed)
    ends = zip(times, times[1:], found, strict=False)
    return [Step(t, s, renewed(schedule, t, s), error) for t, s, error in ends]


def of_mixture(
    toy: Mixture, sampler: Sampler, denoise: Denoiser, times: Sequence[float], x0: Tensor, seed: int, parts: int = 16
) -> Parts:
    """Root mean square distances of points that share their noise, over x0 (N, d) of the data.

    Args:
        sampler: goes down at every step.
        parts: short steps in each step of the walk that stands for one without discretisation.
    """
    schedule, exact, numbers = sampler.schedule, toy.denoiser(sampler.schedule), torch.arange(len(x0))
    begun, fine = starts(schedule, times[0], x0, seed), refined(list(times), parts)
    noise = SharedNoise(schedule, fine, seed, numbers)
    walk = lambda by, x: sampler.sample(by, x, times, noise)  # noqa: E731
    ideal = refine(sampler, exact, begun.data, [times, fine], seed, numbers)
    ends = [walk(denoise, begun.prior), walk(denoise, begun.data), *ideal.ends]
    return Parts(*(rms(one - other) for one, other in zip(ends, ends[1:], strict=False)), total=rms(ends[0] - ends[-1]))
