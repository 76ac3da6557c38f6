"""What changes a sampling from outside: it wraps the denoiser, the sampler, or both, of each batch.

Editing, restoration and guidance by something else than a class enter here. A wrapper is told which images a batch
holds, so that what it does to an image is a function of that image alone, whatever the batch and the rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Prediction
from diffusion.samplers.base import Sampler


class Batch(NamedTuple):
    """The images that are sampled together.

    numbers: int64 (B,), on the device of the sampling. labels: int64 (B,) there; None for a model without classes.
    seed: of the sampling; noise of a wrapper's own is `ImageNoise(seed, numbers, stream)`.
    """

    numbers: Tensor
    labels: Tensor | None
    seed: int


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
        """The sampler that walks this batch: `sampler` wrapped, and not changed, as other batches take it too."""
        return sampler


def wrapped(wrappers: Sequence[Wrapper], denoise: Denoiser, sampler: Sampler, batch: Batch) -> tuple[Denoiser, Sampler]:
    """The denoiser and the sampler of a batch. The first wrapper is the innermost one."""
    if wrappers and not any(wrapper.needs_gradients for wrapper in wrappers):
        denoise = without_gradients(denoise)
    for wrapper in wrappers:
        denoise, sampler = wrapper.denoiser(denoise, batch), wrapper.sampler(sampler, batch)
    return denoise, sampler


def without_gradients(denoise: Denoiser) -> Denoiser:
    """The same without gradients, also inside `torch.enable_grad()`."""

    def computed(x_t: Tensor, t: float | Tensor) -> Prediction:
        with torch.no_grad():
            return denoise(x_t, t)

    return computed
