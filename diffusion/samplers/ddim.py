"""DDIM, and everything between it and ancestral sampling."""

from typing import Annotated

from torch import Tensor

from diffusion.process.kernels import posterior
from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Past, Sampler
from diffusion.settings import Between, settings

Eta = Annotated[float, Between(0, 1, ": 0 is DDIM, 1 is ancestral sampling")]


@settings("sampler")
class DDIM(Sampler):
    """DDIM at eta = 0, ancestral sampling at eta = 1, anything between.

    Song et al. 2021 (DDIM), eqs. 12 and 16, for any s < t and any schedule. Under VE and at eta = 1 it is the ancestral
    sampler of Song et al. 2021 (score SDE), app. F. At s = 0, where sigma_s = 0, it returns x0 exactly. At eta = 0 it
    also goes up, s > t: encoding.

    Args:
        schedule: noise levels.
        eta: share of the posterior's standard deviation that is drawn afresh at each step, in [0, 1].

    Raises:
        ValueError: eta is outside [0, 1]; or a step with eta > 0 goes up.
    """

    def __init__(self, schedule: Schedule, eta: Eta = 0.0) -> None:
        super().__init__(schedule)
        self.eta = eta

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        alpha_s, sigma_s = self.schedule(s)
        x0, epsilon, _ = denoise(x_t, t)
        if self.eta == 0:
            return alpha_s * x0 + sigma_s * epsilon
        fresh = self.eta * posterior(self.schedule, t, s).std
        kept = (sigma_s**2 - fresh**2).clamp(min=0).sqrt()
        return alpha_s * x0 + kept * epsilon + fresh * randn(x_t)
