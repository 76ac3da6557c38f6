"""What changes a sampling from outside: it wraps the denoiser, the sampler, or both, of each batch.

    class Repeated(WrappedSampler):
        def step(self, denoise, x_t, t, s, randn, past=()): ...        by self.inner.step

    class Repeat(Wrapper):
        def sampler(self, sampler, batch): return Repeated(sampler)

Editing, restoration and guidance by something else than a class enter here. A wrapper is told which images a batch
holds, so that what it does to an image is a function of that image alone, whatever the batch and the rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Prediction, RandomNormal
from diffusion.samplers.base import Past, Sampler


class Batch(NamedTuple):
    """The images that are sampled together.

    numbers: int64 (B,), on the device of the sampling. labels: int64 (B,) there; None for a model without classes.
    seed: of the sampling; noise of a wrapper's own is `ImageNoise(seed, numbers, stream)`.
    """

    numbers: Tensor
    labels: Tensor | None
    seed: int


class WrappedSampler(Sampler):
    """A sampler around another, `inner`: it has its schedule, its memory and its calls, and looks at the batch if that
    does. As it stands it takes the inner sampler's steps; a subclass overrides `step`, and hands `past` on.

    A step that makes other calls than the inner one's also overrides `calls_of_step`.
    """

    def __init__(self, inner: Sampler) -> None:
        super().__init__(inner.schedule)
        self.inner = inner
        self.of_batch, self.memory, self.learned_by = inner.of_batch, inner.memory, inner.learned_by

    def calls_of_step(self, t: float, s: float, past: int = 0) -> int:
        return self.inner.calls_of_step(t, s, past)

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        return self.inner.step(denoise, x_t, t, s, randn, past)


class Wrapper(ABC):
    """Wraps what samples a batch. A subclass overrides `denoiser`, `sampler`, or both."""

    needs_gradients = False  # whether it differentiates a denoiser; else the network computes without gradients
    of_batch = False  # whether an image depends on the others of its batch

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the images, as JSON: the wrapper's name and settings, and digests of what else it uses. Samples
        of another identity are never added to these."""

    def denoiser(self, denoise: Denoiser, batch: Batch) -> Denoiser:
        """The denoiser that the sampler calls for this batch.

        Args:
            denoise: what it would call otherwise: guided and clipped, the labels bound to it, so that it is called as
                denoise(x_t, t). With `needs_gradients` it can be differentiated with respect to x_t inside
                `torch.enable_grad()`.
        """
        return denoise

    def sampler(self, sampler: Sampler, batch: Batch) -> Sampler:
        """The sampler that walks this batch: `sampler` itself, or a `WrappedSampler` of it. It is not changed, as other
        batches take it too."""
        return sampler


def wrapped(wrappers: Sequence[Wrapper], denoise: Denoiser, sampler: Sampler, batch: Batch) -> tuple[Denoiser, Sampler]:
    """The denoiser and the sampler of a batch. The first wrapper is the innermost one.

    Raises:
        TypeError: a wrapper gives a sampler that does not stand around the one it was given.
    """
    if wrappers and not any(wrapper.needs_gradients for wrapper in wrappers):
        denoise = without_gradients(denoise)
    for wrapper in wrappers:
        denoise, around = wrapper.denoiser(denoise, batch), wrapper.sampler(sampler, batch)
        if not stands_around(around, sampler):
            raise TypeError(
                f"{type(wrapper).__name__}.sampler gives a {type(around).__name__} that does not keep what the walk "
                f"must know of {type(sampler).__name__}, such as its memory: return the sampler itself, or a "
                f"WrappedSampler(sampler) whose constructor calls super().__init__(sampler)."
            )
        sampler = around
    return denoise, sampler


def stands_around(outer: Any, inner: Sampler) -> bool:
    """Whether a sampler is the inner one, or a `WrappedSampler` of it, over any number of others."""
    while outer is not inner and isinstance(getattr(outer, "inner", None), Sampler):
        kept = outer.schedule is outer.inner.schedule and outer.memory >= outer.inner.memory
        if not (isinstance(outer, WrappedSampler) and kept and outer.of_batch >= outer.inner.of_batch):
            return False
        outer = outer.inner
    return outer is inner


def without_gradients(denoise: Denoiser) -> Denoiser:
    """The same without gradients, also inside `torch.enable_grad()`."""

    def computed(x_t: Tensor, t: float | Tensor) -> Prediction:
        with torch.no_grad():
            return denoise(x_t, t)

    return computed
