"""One model under two names: DDPM's loss is denoising score matching, and what VP samples VE samples as well.

    L_simple  E|epsilon_theta - epsilon|^2   (Ho et al. 2020, eq. 14)
    DSM       E sigma^2 |s_theta + epsilon / sigma|^2,  s_theta = -epsilon_theta / sigma   (Song & Ermon 2019, eq. 5, 6)

The two are equal on every draw, and so are their gradients. And with y = x / alpha, r = sigma / alpha (`process.
variables`) a sampler that is a function of x0, epsilon and lambda takes the same steps in both variables.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.denoiser import NetworkDenoiser
from diffusion.noise import ImageNoise
from diffusion.objective import DSM, Simple
from diffusion.process.kernels import noised
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import Denoiser, Schedule
from diffusion.process.variables import Exploding, carried, carried_denoiser
from diffusion.samplers.base import Sampler


class Losses(NamedTuple):
    """Both losses on the same draws, the relative difference of each and of their gradients: the largest difference of
    an entry over the largest entry."""

    simple: float
    dsm: float
    loss_gap: float
    gradient_gap: float


def losses(
    network: nn.Module,
    schedule: Schedule,
    x0: Tensor,
    epsilon: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    prediction: str = "epsilon",
) -> Losses:
    """By a network that predicts anything, on images x0 (B, C, H, W) at times t (B,), in the dtype of x0."""
    denoiser = NetworkDenoiser(network, schedule, prediction)
    x_t = noised(schedule, x0, t, epsilon)
    found, gradients = [], []
    for objective in (Simple(schedule, "epsilon"), DSM(schedule, "score", "sigma2")):
        said = denoiser(x_t, t, labels)
        output = PREDICTIONS[objective.prediction].from_pair(schedule, x_t, t, said.x0, said.epsilon)
        loss = objective(output, x_t, x0, epsilon, t).mean()
        found.append(float(loss.detach()))
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None])
        )
    simple, dsm = found
    gap = float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())
    return Losses(simple, dsm, abs(simple - dsm) / simple, gap)


class Twins(NamedTuple):
    """Two walks side by side: at each time the largest difference of x, over the largest |x| there."""

    times: list[float]
    gaps: list[float]
    end: Tensor


@torch.no_grad()
def walk_both(
    make: Callable[[Schedule], Sampler],
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Sequence[float],
    seed: int,
) -> Twins:
    """The same sampler on a schedule and on its VE twin, from the same points (B, ...) at times[0], on the same noise.

    Args:
        make: schedule -> sampler. denoise: under `schedule`, in the dtype of x.
    """
    twin, numbers = Exploding(schedule), torch.arange(len(x))
    here = make(schedule).walk(denoise, x, times, ImageNoise(seed, numbers))
    start = carried(x, times[0], schedule, twin)
    there = make(twin).walk(carried_denoiser(denoise, schedule, twin), start, times, ImageNoise(seed, numbers))
    gaps, end = [], x
    for (_, s), one, other in zip(pairwise(times), here, there, strict=True):
        back = carried(other.x, s, twin, schedule)
        gaps.append(float((one.x - back).abs().max() / one.x.abs().max()))
        end = one.x
    return Twins(list(times[1:]), gaps, end)
