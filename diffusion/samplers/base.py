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
    """Where a walk has arrived: the time, x there, and the prediction the step was made with (at the time before)."""

    t: float
    x: Tensor
    prediction: Prediction


class Moment(NamedTuple):
    """A place that a walk has left: the time, x there, and what the denoiser said of it."""

    t: float
    x: Tensor
    prediction: Prediction


Past = tuple[Moment, ...]  # the places before the present one, newest first


class Sampler(ABC):
    """(x_t, t, s) -> x_s by calling a denoiser. Times are Python numbers, so their levels are looked up on the host.

    Labels are bound to the denoiser by the caller: `functools.partial(denoiser, labels=labels)`. A sampler has no
    memory of its own: what it wants to know of the steps before it is given, so one object can run several walks.
    """

    of_batch = False  # whether an image depends on the others of its batch
    memory = 0  # moments of the past that a step reads, at most
    calls_per_step = 1  # denoiser calls of a step

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        """One step x_t -> x_s, s <= t; both (B, ...), same dtype. t is above 0.

        Args:
            randn: fresh noise like its argument; it belongs to this step.
            past: the moments before, newest first, at most `memory`; none at the start of a walk, and where it has
                stayed or turned round.
        """

    def calls(self, times: Sequence[float]) -> int:
        """Denoiser calls of a walk along these times."""
        return self.calls_per_step * (len(times) - 1)

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

            if k and (s - t) * (t - times[k - 1]) <= 0:
                past = ()
            arrived = self.step(noted, x, t, s, randn if between is None else between(t, s), past)
            past = (Moment(t, x, predictions[0]), *past)[: self.memory]
            x = arrived
            yield Visit(s, x, predictions[0])

    def sample(self, denoise: Denoiser, x: Tensor, times: Sequence[float], randn: RandomNormal) -> Tensor:
        """x at times[-1], (B, ...), from x at times[0]. To watch the way, use `walk`.

        Args:
            denoise: any denoiser, guided, clipped or exact.
            x: at times[0]; pure noise is N(0, schedule.std(times[0])^2).
            times: where to go, as `process.grids.times` gives them; with 0 as the last, x0 is returned.
            randn: fresh noise like its argument, asked for in the same order whatever the batch.
        """
        for visit in self.walk(denoise, x, times, randn):
            x = visit.x
        return x
