"""Denoisers made from networks: scaling of the input, conditioning value, conversion of the output, clipping of x0.

This is the only place where t becomes t - 1: published networks count noise levels from 0. Networks are not trained
below t = 1. There the network gets the conditioning value of t = 1, and its output is still converted at t (Song et al.
2021, score SDE). This module knows no loss, no sampler, no guidance and no particular network.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.prediction import PREDICTIONS, prediction_kind, split_output
from diffusion.process.schedule import Denoiser, Prediction, Schedule, like

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x, conditioning_value, labels) -> output: x (B, C, H, W), conditioning_value float32 (B,), output (B, C or
2C, H, W)."""

CONDITIONINGS: dict[str, Callable[[Schedule, float | Tensor], float | Tensor]] = {
    "time": lambda schedule, t: t - 1,
    "noise": lambda schedule, t: -schedule.log_ratio(t),
}
"""The conditioning value at t >= 1, by the network's attribute `conditioning` (default "time"): the time index t - 1,
or log(sigma_t / alpha_t), which is log sigma_t under VE."""


class NetworkDenoiser:
    """The denoiser of a network.

    The network's input is x_t / sqrt(alpha^2 + sigma^2), which has unit variance for data of unit variance; under VP it
    is x_t itself. With `prediction=edm` the input has unit variance for data of standard deviation 0.5. If the output
    has twice the channels of x_t, its second half is the learned variance in [-1, 1] (Nichol & Dhariwal 2021, eq. 15).
    For lower precision the caller uses autocast; the output is cast back to the dtype of x_t.

    Args:
        network: network(x, conditioning_value, labels). The conditioning value is t - 1 (real for real t, never below
            0) or the log of the noise level (`CONDITIONINGS`).
        schedule: the noise levels it was trained on.
        prediction: what the network outputs: epsilon, x0, v, score, scaled_score, mu or edm.

    Raises:
        ValueError: prediction is none of these.
    """

    def __init__(self, network: Network, schedule: Schedule, prediction: str = "epsilon") -> None:
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self._kind = prediction_kind(prediction)
        self._conditioning = CONDITIONINGS[getattr(network, "conditioning", "time")]

    def output(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """The unconverted output of the network, in the dtype of x_t.

        Args:
            x_t: (B, C, H, W). t: a float or (B,). labels: (B,) or None.
        """
        if isinstance(t, Tensor):
            value = self._conditioning(self.schedule, t.clamp(min=1)).to(x_t.device, torch.float32).expand(len(x_t))
        else:
            number = float(self._conditioning(self.schedule, max(t, 1)))
            value = torch.full((len(x_t),), number, dtype=torch.float32, device=x_t.device)
        deviation = self.schedule.std(t) if self._kind.input_std is None else self._kind.input_std(self.schedule, t)
        return self.network(x_t * like(1 / deviation, x_t), value, labels).to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        output, variance = split_output(self.output(x_t, t, labels), x_t)
        return Prediction(*self._kind.to_pair(self.schedule, x_t, t, output), variance)


class Clipped:
    """Wraps a denoiser: clips its x0 to the range of images and computes epsilon again from the clipped x0.

    Args:
        denoiser: the denoiser to wrap.
        schedule: the schedule of that denoiser.
        low, high: range of x0.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> None:
        self.denoiser, self.schedule, self.low, self.high = denoiser, schedule, low, high

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        x0, _, variance = self.denoiser(x_t, t, labels)
        clipped = x0.clamp(self.low, self.high)
        return Prediction(*PREDICTIONS["x0"].to_pair(self.schedule, x_t, t, clipped), variance)
