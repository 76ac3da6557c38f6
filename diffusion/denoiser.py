"""From networks to denoisers: what a network is fed, how its output is read, and the clipping of x0.

Here, once, time loses 1: published networks count their noise levels from 0. Below t = 1 nothing was trained: there a
network is asked as at t = 1, its output still being read at t, as Song et al. (2021, score SDE) do. Knows no loss, no
sampler, no guidance and no particular network.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.prediction import PREDICTIONS, parted, prediction_kind
from diffusion.process.schedule import Denoiser, Prediction, Schedule, like

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x, told, labels) -> output: x (B, C, H, W), told float32 (B,), output (B, C or 2C, H, W)."""

CONDITIONINGS: dict[str, Callable[[Schedule, float | Tensor], float | Tensor]] = {
    "time": lambda schedule, t: t - 1,
    "noise": lambda schedule, t: -schedule.log_ratio(t),
}
"""What a network is told of t >= 1, as its attribute `conditioning` says, "time" where it has none: the time index, or
log(sigma_t / alpha_t), which under VE is log sigma_t."""


class NetworkDenoiser:
    """A network as a denoiser.

    The network sees x_t / sqrt(alpha^2 + sigma^2), of unit variance for data of unit variance: x_t itself under VP.
    With `prediction=edm` it sees x_t of unit variance for data of standard deviation 0.5. The second half of its
    channels, where it has twice those of x_t, is the learned variance in [-1, 1] (Nichol & Dhariwal 2021, eq. 15).
    Lower precision is the caller's autocast and ends at the network's output.

    Args:
        network: network(x, told, labels); it is told t - 1, real for real t and never below 0, or the noise level
            (`CONDITIONINGS`).
        schedule: the noise levels it was trained on.
        prediction: what it outputs: epsilon, x0, v, score, scaled_score, mu or edm.

    Raises:
        ValueError: prediction is none of these.
    """

    def __init__(self, network: Network, schedule: Schedule, prediction: str = "epsilon") -> None:
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self._kind = prediction_kind(prediction)
        self._conditioning = CONDITIONINGS[getattr(network, "conditioning", "time")]

    def output(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output as it is, in x_t's dtype. x_t (B, C, H, W), t a float or (B,), labels (B,) or None."""
        if isinstance(t, Tensor):
            told = self._conditioning(self.schedule, t.clamp(min=1)).to(x_t.device, torch.float32).expand(len(x_t))
        else:
            value = float(self._conditioning(self.schedule, max(t, 1)))
            told = torch.full((len(x_t),), value, dtype=torch.float32, device=x_t.device)
        deviation = self.schedule.std(t) if self._kind.input_std is None else self._kind.input_std(self.schedule, t)
        return self.network(x_t * like(1 / deviation, x_t), told, labels).to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        output, variance = parted(self.output(x_t, t, labels), x_t)
        return Prediction(*self._kind.to_pair(self.schedule, x_t, t, output), variance)


class Clipped:
    """A denoiser whose x0 is clipped to the range of images, and whose epsilon is derived again from that.

    Args:
        denoiser: the denoiser to wrap.
        schedule: its schedule.
        low, high: the range of x0.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule, low: float = -1.0, high: float = 1.0) -> None:
        self.denoiser, self.schedule, self.low, self.high = denoiser, schedule, low, high

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        x0, _, variance = self.denoiser(x_t, t, labels)
        clipped = x0.clamp(self.low, self.high)
        return Prediction(*PREDICTIONS["x0"].to_pair(self.schedule, x_t, t, clipped), variance)
