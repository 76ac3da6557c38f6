"""From image numbers to images: image k is a function of the seed and k, whatever the batch it is sampled in.

Knows samplers and denoisers as callables; it knows no file and no metric.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffusion.images import to_uint8
from diffusion.noise import ImageNoise, Stream
from diffusion.process.schedule import Denoiser
from diffusion.samplers.base import Sampler, Visit
from diffusion.samplers.wrapper import Batch, Wrapper, wrapped


def default_labels(image_numbers: Tensor, num_classes: int, chosen: Sequence[int] = ()) -> Tensor | None:
    """Image k gets label k mod classes, or the chosen labels in turn; None for an unconditional model."""
    if not num_classes:
        return None
    if chosen:
        return torch.tensor(list(chosen))[image_numbers % len(chosen)]
    return image_numbers % num_classes


@torch.no_grad()
def walk(
    denoise: Denoiser,
    sampler: Sampler,
    times: Sequence[float],
    image_numbers: Tensor,
    image_shape: tuple[int, int, int],
    labels: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    wrappers: Sequence[Wrapper] = (),
) -> Iterator[Visit]:
    """The way of these images from noise, as one batch: every visit of the sampler's walk. Arguments as `generate`."""
    numbers = image_numbers.to(device)
    labels = None if labels is None else labels.to(device)
    bound = denoise if labels is None else functools.partial(denoise, labels=labels)
    bound, sampler = wrapped(wrappers, bound, sampler, Batch(numbers, labels, seed))
    start = ImageNoise(seed, numbers, Stream.PRIOR)
    x = float(sampler.schedule.std(times[0])) * start(torch.empty(len(numbers), *image_shape, device=device))
    yield from sampler.walk(bound, x, times, ImageNoise(seed, numbers))


@torch.no_grad()
def generate(
    denoise: Denoiser,
    sampler: Sampler,
    times: Sequence[float],
    image_numbers: Tensor,
    image_shape: tuple[int, int, int],
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    wrappers: Sequence[Wrapper] = (),
) -> Iterator[Tensor]:
    """Sample these images: uint8 (b, C, H, W) on the CPU, a batch at a time, in the order of `image_numbers`.

    Args:
        denoise: guided and clipped as wanted; called as denoise(x_t, t, labels=...).
        sampler: takes the steps. times: descending, as `process.grids` gives them.
        image_numbers: int64 (N,); the noise of image k belongs to (seed, k) alone.
        image_shape: (C, H, W).
        labels: int64 (N,) or None.
        batch_size: images at a time; changes rounding at most.
        wrappers: of denoiser and sampler, the innermost first.

    Raises:
        ValueError: a sample is not finite.
    """
    for chunk in torch.arange(len(image_numbers)).split(batch_size):
        numbers, given = image_numbers[chunk], None if labels is None else labels[chunk]
        for visit in walk(denoise, sampler, times, numbers, image_shape, given, seed, device, wrappers):
            x = visit.x
        if not x.isfinite().all():
            raise ValueError(
                f"Sampling gave values that are not finite, in images {int(numbers[0])} to {int(numbers[-1])}: the "
                f"network's weights are no good, or the sampler's steps too long."
            )
        yield to_uint8(x).cpu()
