"""Annealed Langevin dynamics: NCSN's sampler (Song & Ermon 2019, alg. 1) and NCSNv2's (Song & Ermon 2020, alg. 3).

From the noisiest level down, at each a number of Langevin updates in proportion to sigma^2. The papers write the update
with the half of the step that their published code takes, under the same name and with the same numbers:

    paper    x + (step / 2) score + sqrt(step) z
    code     x + step score + sqrt(2 step) z

The published figures come from the code. One at twice the step is the other.
"""

from typing import Literal

from torch import Tensor

from diffusion.process.schedule import Denoiser, RandomNormal, Schedule
from diffusion.samplers.base import Past
from diffusion.samplers.langevin import LangevinDynamics
from diffusion.settings import Positive, settings

Convention = Literal["code", "paper"]
SHARES = {"code": 1.0, "paper": 0.5}  # of the step, in h of x + h score + sqrt(2 h) z


@settings("sampler")
class AnnealedLangevin(LangevinDynamics):
    """Langevin updates of step_size sigma_t^2 at the levels of a walk, as often as its times name each of them.

    `process.grids.times(..., visits=T)` names each T times: the papers' T updates at every level. The papers' step at
    level i is epsilon sigma_i^2 / sigma_1^2, sigma_1 the least: `step_size` is their epsilon / sigma_1^2, which has no
    units. NCSN: 0.2 with T = 100, no denoising; NCSNv2 on CIFAR-10: 0.062 with T = 5, denoised.

    Args:
        schedule: noise levels; the papers' are `ve_geometric`, but any will do.
        step_size: of an update, over sigma_t^2.
        convention: what a step is: "code" or "paper", as above.
        denoise: end on x0 as predicted from the last x (NCSNv2's x + sigma_1^2 score, one call of the denoiser more);
            else on that x itself.

    Raises:
        ValueError: step_size is not positive, or the convention is neither.
    """

    def __init__(
        self,
        schedule: Schedule,
        step_size: Positive,
        convention: Convention = "code",
        denoise: bool = True,
    ) -> None:
        super().__init__(schedule)
        self.step_size, self.convention, self.denoise = step_size, convention, denoise

    def calls_of_step(self, t: float, s: float, past: int = 0) -> int:
        return 1 + (self.denoise and s == 0)

    def share(self, t: float, epsilon: Tensor, z: Tensor) -> float:
        return SHARES[self.convention] * self.step_size

    def step(self, denoise: Denoiser, x_t: Tensor, t: float, s: float, randn: RandomNormal, past: Past = ()) -> Tensor:
        if s == 0 and self.denoise:
            return denoise(self.update(denoise, x_t, t, randn), t).x0
        return super().step(denoise, x_t, t, s, randn)
