"""What a sampler is, and the one loop all of them run in. Knows no schedule's family, no network and no time grid.

A walk goes from time to time as it is told, and may stay: at two times that are the same, Langevin dynamics take an
update of the law there, and samplers that carry from one law to another change nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Prediction, RandomNormal, Schedule


class Visit(NamedTuple):
    """Where a walk has arrived: the time, x there, and the prediction the step was made with (at the time before);
    None of a step that calls no denoiser, as one that adds noise."""

    t: float
    x: Tensor
    prediction: Prediction | None


class Moment(NamedTuple):
    """A place that a walk has left: the time, x there, and what the denoiser said of it."""

    t: float
    x: Tensor
    prediction: Prediction


Past = tuple[Moment, ...]  # the places before the present one, newest first


def goes_on(times: Sequence[float], k: int) -> bool:
    """Whether step k of a walk along these times, from times[k], goes the way of the step before it: what lies before
    is then its past. False for the first step, and where the walk stays or turns round."""
    return k > 0 and (times[k + 1] - times[k]) * (times[k] - times[k - 1]) > 0


class Sampler(ABC):
    """(x_t, t, s) -> x_s by calling a denoiser. Times are Python numbers, so their levels are looked up on the host.

    Labels are bound to the denoiser by the caller: `functools.partial(denoiser, labels=labels)`. A sampler has no
    memory of its own: what it wants to know of the steps before it is given, so one object can run several walks.

    Samplers around others are `samplers.wrapper.WrappedSampler`s.
    """

    of_batch = False  # whether an image depends on the others of its batch
    memory = 0  # moments of the past that a step reads, at most
    calls_per_step = 1  # denoiser calls of a step, where all have as many
    learned_by: str | None = None  # the setting by which it needs a network that learns its variance, as "variance"

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        """One step x_t -> x_s, s <= t; both (B, ...), same dtype. t is above 0.

        Args:
            randn: fresh noise like its argument; it belongs to this step.
            past: the moments before, newest first, at most `memory`; none at the start of a walk, and where it has
                stayed, turned round, or taken a step without a call of the denoiser.
        """

    def calls_of_step(self, t: float, s: float, past: int = 0) -> int:
        """Denoiser calls of the step from t to s. past: moments that it is given."""
        return self.calls_per_step

    def calls(self, times: Sequence[float]) -> int:
        """Denoiser calls of a walk along these times."""
        steps = zip(pairwise(times), self.pasts(times), strict=True)
        return sum(self.calls_of_step(t, s, len(past)) for (t, s), past in steps)

    def pasts(self, times: Sequence[float]) -> Iterator[list[float]]:
        """For each step of a walk along these times, the times of the moments that it is given, newest first."""
        past: list[float] = []
        for k, (t, s) in enumerate(pairwise(times)):
            past = past if goes_on(times, k) else []
            yield past
            past = [t, *past][: self.memory] if self.calls_of_step(t, s, len(past)) else []

    @torch.no_grad()
    def walk(self, denoise: Denoiser, x: Tensor, times: Sequence[float], randn: RandomNormal) -> Iterator[Visit]:
        """Every place on the way from x at times[0] to times[-1], the start excepted: len(times) - 1 visits."""
        past: Past = ()
        between = getattr(randn, "between", None)  # noise that belongs to the two times of a step
        for k, (t, s) in enumerate(pairwise(times)):
            predictions: list[Prediction] = []

            def noted(x_t: Tensor, time: float, seen: list[Prediction] = predictions) -> Prediction:
                seen.append(denoise(x_t, time))
                return seen[-1]

            past = past if goes_on(times, k) else ()
            arrived = self.step(noted, x, t, s, randn if between is None else between(t, s), past)
            first = predictions[0] if predictions else None
            past = () if first is None else (Moment(t, x, first), *past)[: self.memory]
            x = arrived
            yield Visit(s, x, first)

    def sample(self, denoise: Denoiser, x: Tensor, times: Sequence[float], randn: RandomNormal) -> Tensor:
        """x at times[-1], (B, ...), from x at times[0]. To watch the way, use `walk`.

        Args:
            denoise: any denoiser, guided, clipped or exact.
            x: at times[0]; pure noise is N(0, schedule.std(times[0])^2).
            times: where to go, as `process.grids.times` gives them; with 0 as the last, x0 is returned.
            randn: fresh noise like its argument, asked for in the same order whatever the batch. If it has a method
                `between(t, s)`, each step draws from what that gives for its two times.
        """
        for visit in self.walk(denoise, x, times, randn):
            x = visit.x
        return x
