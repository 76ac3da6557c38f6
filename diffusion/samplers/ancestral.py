"""Ancestral sampling: the reverse process of DDPM, one Gaussian step after another."""

from torch import Tensor

from diffusion.process.kernels import Variance, needs_learned_variance, posterior, reverse_std
from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Past, Sampler
from diffusion.settings import settings


@settings("sampler")
class Ancestral(Sampler):
    """x_s = mean of q(x_s | x_t, x0) at the predicted x0, plus noise (Ho et al. 2020, alg. 2), for any s < t.

    The last step adds no noise: at s = 0 it returns the mean, which is x0.

    Args:
        schedule: noise levels.
        variance: of the noise: "small", "large" or "learned", as `process.kernels.reverse_std` has them.

    Raises:
        ValueError: variance is none of these; or it is "learned" and the denoiser predicts none.
    """

    def __init__(self, schedule: Schedule, variance: Variance = "small") -> None:
        super().__init__(schedule)
        self.variance = variance
        self.learned_by = "variance" if variance == "learned" else None

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        prediction, kernel = denoise(x_t, t), posterior(self.schedule, t, s)
        mean = kernel.x_t * x_t + kernel.x0 * prediction.x0
        if s == 0:
            return mean
        if self.variance == "learned" and prediction.variance is None:
            raise needs_learned_variance("sampler.variance")
        return mean + reverse_std(self.schedule, t, s, self.variance, prediction.variance) * randn(x_t)
