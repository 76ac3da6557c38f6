"""Predictor and corrector: a sampler goes down, Langevin updates set right the law it has arrived at (Song et al. 2021,
score SDE, sec. 4.2 and app. G).

Both are ordinary samplers: the corrector takes the steps that stay, the predictor those that go down. Times that name
every level twice (`visits=2`) are the paper's PC sampler with one corrector step, which comes first at each level.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from diffusion.errors import Refusal
from diffusion.process.kernels import transition
from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Past, Sampler
from diffusion.samplers.langevin import LangevinDynamics
from diffusion.settings import Positive, settings

Norms = Literal["image", "batch", "expected"]


@settings("sampler.corrector")
class LangevinCorrector(LangevinDynamics):
    """The paper's corrector (alg. 4 and 5): the step is set by a ratio of norms, h = 2 a (snr |z| / |score|)^2.

    a is 1 under VE and 1 - beta_t under VP: the square of alpha_t / alpha_{t-1}.

    Args:
        schedule: noise levels.
        snr: the ratio. VE: 0.16 on CIFAR-10, 0.15 on 256x256 faces, 0.075 on LSUN.
        norms: whose norms. "image": each image's own, so that an image depends on no other. "batch": their means over
            the batch, as in the paper's code: then an image depends on the batch that it was made in. "expected":
            those of exact noise, |z| = sigma |score|, the paper's "ALD" corrector, whose step follows from the level
            alone: annealed Langevin's with the step size 2 snr^2 (0.316 is NCSN's, 0.176 NCSNv2's on CIFAR-10). In a
            few dimensions only this one will do: the ratio of norms is then anything, and the updates settle at no
            law that is known.

    Raises:
        ValueError: snr is not positive, or norms are none of these.
    """

    def __init__(self, schedule: Schedule, snr: Positive = 0.16, norms: Norms = "image") -> None:
        super().__init__(schedule)
        self.snr, self.norms, self.of_batch = snr, norms, norms == "batch"

    def share(self, t: float, epsilon: Tensor, z: Tensor) -> Tensor:
        widest = 2 * (transition(self.schedule, t, max(t - 1, 0)).alpha * self.snr) ** 2
        if self.norms == "expected":
            return widest
        noise, guess = (values.reshape(len(values), -1).norm(dim=1).double() for values in (z, epsilon))
        if self.norms == "batch":
            noise, guess = noise.mean(), guess.mean()
        return widest * (noise / guess) ** 2


class PredictorCorrector(Sampler):
    """Steps that go down by one sampler, steps that stay by another.

    A step that stays is the end of the past, so that a predictor which remembers the steps before would never be given
    any.

    Args:
        schedule: noise levels, of both.
        predictor: schedule -> the sampler that goes down. The paper's "reverse diffusion" under VE, and its "ancestral
            sampling" under VP, is `Ancestral(variance="large")`; its "ancestral sampling" under VE is `Ancestral()`.
        corrector: schedule -> the sampler that stays.

    Raises:
        ValueError: the predictor remembers steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        predictor: Callable[[Schedule], Sampler],
        corrector: Callable[[Schedule], Sampler] = LangevinCorrector,
    ) -> None:
        super().__init__(schedule)
        self.predictor, self.corrector = predictor(schedule), corrector(schedule)
        if self.predictor.memory:
            raise Refusal(
                f"sampler.predictor: {type(self.predictor).__name__} reads the steps before, and between two of its "
                f"steps are the corrector's: give a predictor without a memory, such as Heun, or this one as the "
                f"sampler."
            )
        self.of_batch = self.predictor.of_batch or self.corrector.of_batch
        asks = {"predictor": self.predictor.learned_by, "corrector": self.corrector.learned_by}
        self.learned_by = next((f"{part}.{setting}" for part, setting in asks.items() if setting), None)

    def part(self, t: float, s: float) -> Sampler:
        """The one of the two that takes this step."""
        return self.corrector if s == t else self.predictor

    def calls_of_step(self, t: float, s: float, past: int = 0) -> int:
        return self.part(t, s).calls_of_step(t, s)

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        return self.part(t, s).step(denoise, x_t, t, s, randn)
