"""How images are sampled from a model: by which sampler, at which times, how guided. A recipe knows no model yet.

recipe.sampling(denoiser, place, image_shape)      the Sampling of that model
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.process.grids import RHO, Spacing, times
from diffusion.process.kernels import needs_learned_variance
from diffusion.process.schedule import Denoiser, Prediction, Schedule
from diffusion.samplers.base import Sampler
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.wrapper import Wrapper
from diffusion.scoring.sampling import Counted, Sampling
from diffusion.settings import Count, Positive, settings


@settings("sampler")
@dataclass(frozen=True)
class Plan:
    """Which times a walk visits, and what its sampler sees.

    Args:
        num_steps: levels that are visited; None: every level of the schedule, or as many as max_calls allows.
        max_calls: calls of the denoiser in a walk, at most. spacing: of the levels, or the times.
        rho: of the spacing "karras". visits: steps at each.
        clip_x0: clip the estimate of x0 to [-1, 1] at every step.
    """

    num_steps: Count | None = None
    max_calls: Count | None = None
    spacing: Spacing | list[float] = "linear"
    rho: Positive = RHO
    visits: Count = 1
    clip_x0: bool = True

    def times(self, sampler: Sampler) -> list[float]:
        """Descending, the last 0. ValueError if the schedule has fewer levels than are to be visited, or a walk of one
        step has more calls than are allowed."""
        if self.max_calls is None:
            return self._grid(sampler, self.num_steps)
        return self._longest(sampler, self.max_calls)

    def about(self) -> dict[str, Any]:
        """What of it decides images beside the times, for the record."""
        known: dict[str, Any] = {"visits": self.visits} if self.visits > 1 else {}
        known |= {"rho": self.rho} if self.spacing == "karras" and self.rho != RHO else {}
        return {**known, "spacing": self.spacing, "clip_x0": self.clip_x0}

    def _grid(self, sampler: Sampler, steps: int | None) -> list[float]:
        return times(sampler.schedule, steps, self.spacing, self.visits, self.rho)

    def _longest(self, sampler: Sampler, max_calls: int) -> list[float]:
        """The grid of the most steps whose walk has no more calls, which grow with the steps: it lies between `low`
        steps and `high`, and is looked for in turn where it is in proportion, and half way."""
        low, high, found, proportional = 0, min(max_calls, sampler.schedule.num_timesteps) + 1, [], True
        steps, calls = high - 1, 0
        while high - low > 1:
            grid = self._grid(sampler, steps)
            calls = sampler.calls(grid)
            if calls <= max_calls:
                low, found = steps, grid
            else:
                high = steps
            likely = steps * max_calls // max(calls, 1) if proportional else (low + high) // 2
            steps, proportional = min(max(likely, low + 1), high - 1), not proportional
        if not found:
            raise Refusal(f"sampler.max_calls={max_calls}: one step has {calls} calls.")
        return found


@dataclass(frozen=True)
class Recipe:
    """All that decides the images of a model but the model and their numbers.

    Args:
        sampler: schedule -> sampler, a partial whose keywords are its settings.
        guide: (denoiser=..., null_label=...) -> denoiser; None: unguided. guidance_scale: 1: unguided.
        seed: of the noise. batch_size: images at a time; changes rounding at most.
        labels: given to the images in turn; none: image k of a conditional model gets label k mod classes.
        wrappers: of denoiser and sampler, the innermost first.
    """

    sampler: Callable[[Schedule], Sampler]
    plan: Plan
    guide: Callable[..., Denoiser] | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 256
    labels: tuple[int, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()

    def by_ddim(self, num_steps: int, eta: float = 0.0, **plan: Any) -> Self:
        """The same with DDIM of so many steps, linearly spaced unless `plan` says otherwise."""
        chosen = Plan(num_steps=num_steps, **{"clip_x0": self.plan.clip_x0, **plan})
        return replace(self, sampler=partial(DDIM, eta=eta), plan=chosen)

    def batched(self, batch_size: int) -> Self:
        """The same, so many images at a time."""
        return replace(self, batch_size=batch_size)

    def about(self) -> dict[str, Any]:
        """Settings of the sampler, for the record."""
        return {**described(self.sampler), **self.plan.about()}

    def sampler_of(self, schedule: Schedule) -> tuple[Sampler, list[float]]:
        """The sampler on a schedule, and the times it visits."""
        made = self.sampler(schedule=schedule)
        return made, self.plan.times(made)

    def denoiser(self, called: Denoiser, network: NetworkDenoiser, where: Place) -> Denoiser:
        """What the sampler calls: `called`, the network's denoiser, in its precision, guided and clipped."""

        def denoise(x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
            with where.autocast():
                return called(x_t.contiguous(memory_format=where.memory_format), t, labels)

        guided: Denoiser = denoise
        if self.guide is not None:
            guided = self.guide(denoiser=denoise, null_label=network.network.null_label)
        return Clipped(guided, network.schedule) if self.plan.clip_x0 else guided

    def sampling(
        self,
        denoiser: NetworkDenoiser,
        where: Place,
        image_shape: tuple[int, int, int],
        attend: Callable[[], None] = lambda: None,
    ) -> Sampling:
        """The sampling of a model.

        Args:
            attend: called at every evaluation of the network; may raise to leave the sampling.

        Raises:
            ValueError: the model has not so many levels, has not these labels, or learns no variance.
        """
        sampler, visited = self.sampler_of(denoiser.schedule)
        num_classes = denoiser.network.num_classes
        check_learned(sampler, denoiser.network.out_channels == 2 * image_shape[0])
        self.check_labels(num_classes)
        counted = Counted(denoiser, attend)
        about = {"sampler": type(sampler).__name__.lower(), **self.about()}
        about |= {"guidance_scale": self.guidance_scale, "precision": where.precision}
        return Sampling(
            self.denoiser(counted, denoiser, where), counted, sampler, visited, image_shape, num_classes, self.seed,
            where.device, self.batch_size, self.labels, self.wrappers, about,
        )  # fmt: skip

    def check_labels(self, num_classes: int) -> None:
        """Refuse labels that a model of so many classes does not have."""
        labels = list(self.labels)
        if labels and not num_classes:
            raise Refusal(f"labels={labels}: this model is unconditional.")
        if beyond := [label for label in labels if label >= num_classes]:
            raise Refusal(f"labels={labels}: this model has the classes 0 to {num_classes - 1}, not {beyond[0]}.")


def check_learned(sampler: Sampler, learned: bool) -> None:
    """Refuse a sampler that needs a learned variance where none is learned. learned: whether the network's is."""
    if sampler.learned_by is not None and not learned:
        raise needs_learned_variance(f"sampler.{sampler.learned_by}")


def described(made: Any) -> dict[str, Any]:
    """The settings of a partial, those of partials among them as `corrector.snr`."""
    found: dict[str, Any] = {}
    for name, value in (getattr(made, "keywords", None) or {}).items():
        if isinstance(value, partial):
            found |= {f"{name}.{key}": inner for key, inner in described(value).items()}
        elif value is None or isinstance(value, bool | int | float | str | list | tuple | Mapping):
            found[name] = value
    return found
