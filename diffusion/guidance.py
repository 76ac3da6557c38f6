"""Guidance: denoisers that wrap a denoiser and strengthen the class. Knows no network, no schedule and no sampler."""

from typing import Annotated

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Prediction
from diffusion.settings import AtLeast, settings

Scale = Annotated[float, AtLeast(0, "; 1 means no guidance")]


@settings("guidance")
class ClassifierFree:
    """Classifier-free guidance: uncond + scale * (cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

    Both predictions are computed in one batch of size 2B, conditional first. x0 and epsilon are guided with the same
    formula, so that alpha_t x0 + sigma_t epsilon is still x_t. A learned variance is taken from the conditional
    prediction.

    Args:
        denoiser: the denoiser to wrap; it accepts labels and null_label.
        scale: 0 is unconditional; 1 is conditional without guidance, at half the cost; above 1 is guided.
        null_label: the label that means "no class", usually the number of classes.

    Raises:
        ValueError: scale is negative or not finite; or, when called, labels is None.
    """

    def __init__(self, denoiser: Denoiser, scale: Scale, null_label: int) -> None:
        self.denoiser, self.scale, self.null_label = denoiser, scale, null_label

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        if labels is None:
            raise ValueError(f"guidance.scale={self.scale} needs labels. To sample without labels, give guidance=none.")
        if self.scale == 1:
            return self.denoiser(x_t, t, labels)
        both_t = torch.cat([t.expand(len(x_t))] * 2) if isinstance(t, Tensor) else t
        both_labels = torch.cat([labels, torch.full_like(labels, self.null_label)])
        x0, epsilon, variance = self.denoiser(torch.cat([x_t, x_t]), both_t, both_labels)
        return Prediction(self._guided(x0), self._guided(epsilon), None if variance is None else variance.chunk(2)[0])

    def _guided(self, both: Tensor) -> Tensor:
        cond, uncond = both.chunk(2)
        return uncond + self.scale * (cond - uncond)
