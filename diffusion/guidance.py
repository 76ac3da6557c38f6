"""Guidance: denoisers that wrap denoisers and pull towards a class. Knows no network, no schedule and no sampler."""

from typing import Annotated

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Prediction
from diffusion.settings import AtLeast, settings

Scale = Annotated[float, AtLeast(0, "; 1 means no guidance")]


@settings("guidance")
class ClassifierFree:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    Both halves go through the denoiser as one batch, conditional first. x0 and epsilon are guided alike, so they stay a
    pair of x_t; a learned variance is the conditional one.

    Args:
        denoiser: takes labels, and null_label for none.
        scale: 0 is unconditional, 1 conditional and unguided (half the work), above 1 sharper.
        null_label: the label that means no label, usually the number of classes.

    Raises:
        ValueError: scale is negative or not finite; or, when called, there are no labels.
    """

    def __init__(self, denoiser: Denoiser, scale: Scale, null_label: int) -> None:
        self.denoiser, self.scale, self.null_label = denoiser, scale, null_label

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        if labels is None:
            raise ValueError(f"guidance.scale={self.scale} needs labels; without labels use guidance=none.")
        if self.scale == 1:
            return self.denoiser(x_t, t, labels)
        both_t = torch.cat([t.expand(len(x_t))] * 2) if isinstance(t, Tensor) else t
        both_labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        x0, epsilon, variance = self.denoiser(torch.cat([x_t, x_t]), both_t, both_labels)
        return Prediction(self._guided(x0), self._guided(epsilon), None if variance is None else variance.chunk(2)[0])

    def _guided(self, both: Tensor) -> Tensor:
        cond, uncond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)
