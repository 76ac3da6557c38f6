"""Ancestral sampling: the reverse process of DDPM, one Gaussian step after another."""

from torch import Tensor

from diffusion.process.kernels import posterior, transition
from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Sampler


class Ancestral(Sampler):
    """x_s = mean of q(x_s | x_t, x0) at the predicted x0, plus noise (Ho et al. 2020, alg. 2), for any s < t.

    The last step adds no noise: at s = 0 it returns the mean, which is x0.

    Args:
        schedule: noise levels.
        variance: of the noise. "small": the posterior's (beta tilde; optimal for data at one point). "large": the
            forward kernel's from s to t (beta_t under VP, 1 - alpha_bar_t / alpha_bar_s over a stride; optimal for
            white-noise data). "learned": between the two where the network says (Nichol & Dhariwal 2021, eq. 15).

    Raises:
        ValueError: variance is none of these; or it is "learned" and the denoiser predicts none.
    """

    def __init__(self, schedule: Schedule, variance: str = "small") -> None:
        super().__init__(schedule)
        if variance not in ("small", "large", "learned"):
            raise ValueError(f"sampler.variance={variance} is none of small, large, learned.")
        self.variance = variance

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal) -> Tensor:
        prediction, kernel = denoise(x_t, t), posterior(self.schedule, t, s)
        mean = kernel.x_t * x_t + kernel.x0 * prediction.x0
        return mean if s == 0 else mean + self._std(kernel.std, prediction.variance, t, s) * randn(x_t)

    def _std(self, small: Tensor, share: Tensor | None, t: float, s: float) -> Tensor:
        if self.variance == "small":
            return small
        large = transition(self.schedule, t, s).sigma
        if self.variance == "large":
            return large
        if share is None:
            raise ValueError("sampler.variance=learned: this network predicts no variance; use small or large.")
        return (share * large.log() + (1 - share) * small.log()).exp()
