"""Training objectives: from a network's output to one loss per image, a mean over its pixels, never over the batch.

    x_t = noised(schedule, x0, t, epsilon)
    loss = objective(denoiser.output(x_t, t, labels), x_t, x0, epsilon, t)

What differs between objectives is the quantity whose squared error is taken, and its weight at each noise level. As
every kind of output is linear in (x_t, output), the error of x0 or epsilon is the error of the output carried through
the hub with x_t = 0. Nothing here makes the host wait for the device. Knows no network and no sampler, nor how t is
drawn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.kernels import posterior, transition
from diffusion.process.prediction import prediction_kind
from diffusion.process.schedule import Level, Schedule, like


class Objective(ABC):
    """Loss per image of a network that outputs `prediction`.

    Args:
        schedule: noise levels.
        prediction: what the network outputs: epsilon, x0, v, score or mu.

    Raises:
        ValueError: prediction is none of these.
    """

    def __init__(self, schedule: Schedule, prediction: str = "epsilon") -> None:
        self.schedule, self.prediction = schedule, prediction
        self._kind = prediction_kind(prediction)

    def __call__(self, output: Tensor, x_t: Tensor, x0: Tensor, epsilon: Tensor, t: float | Tensor) -> Tensor:
        """Loss (B,) in the dtype of x_t. All images (B, ...) of one shape; t a float or (B,), in (0, T]."""
        assert output.shape == x_t.shape, f"output {tuple(output.shape)} is not shaped like x_t {tuple(x_t.shape)}"
        error = output - self._kind.from_pair(self.schedule, x_t, t, x0, epsilon)
        return self._loss(error, t).flatten(1).mean(1)

    @abstractmethod
    def _loss(self, error: Tensor, t: float | Tensor) -> Tensor:
        """Loss per pixel, (B, ...), of an error of the output."""

    def _errors(self, error: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The errors of x0 and epsilon that belong to an error of the output."""
        return self._kind.to_pair(self.schedule, torch.zeros_like(error), t, error)


class Simple(Objective):
    """Mean squared error of the output itself: L_simple (Ho et al. 2020, eq. 14) if that is epsilon."""

    def _loss(self, error: Tensor, t: float | Tensor) -> Tensor:
        return error**2


class Bound(Objective):
    """The terms of the variational bound, KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) (Ho et al. 2020, eqs. 5 and 8).

        1/2 (post / var - 1 - log(post / var)) + (error of the mean)^2 / (2 var)

    in nats per dimension; post is the posterior's variance, var that of p. For epsilon the second part is the paper's
    beta^2 / (2 var alpha (1 - alpha_bar)) (error of epsilon)^2, with its alpha = 1 - beta.

    At t = 1, where the posterior has no width and the paper puts a discretised likelihood, this is the weighted squared
    error alone, with the posterior variance of t = 2 for either choice of `variance`, as in the code of Ho et al. 2020.
    (The likelihood itself is reckoned where bits/dim are.)

    Args:
        schedule: noise levels, at least two.
        prediction: what the network outputs.
        variance: of p: "small", the posterior's, or "large", the forward kernel's (beta_t under VP).

    Raises:
        ValueError: prediction or variance unknown, or schedule.num_timesteps < 2.
    """

    def __init__(self, schedule: Schedule, prediction: str = "epsilon", variance: str = "small") -> None:
        super().__init__(schedule, prediction)
        if variance not in ("small", "large"):
            raise ValueError(f"objective.variance={variance} is neither small nor large.")
        if schedule.num_timesteps < 2:
            raise ValueError(f"schedule.num_timesteps={schedule.num_timesteps}: the bound needs at least 2.")
        self.variance = variance

    def _loss(self, error: Tensor, t: float | Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        from_two = t.clamp(min=2)
        post = posterior(self.schedule, from_two, from_two - 1).std ** 2
        wide = transition(self.schedule, from_two, from_two - 1).sigma ** 2
        var = torch.where(t < 2, post, wide) if self.variance == "large" else post
        widths = 0.5 * (post / var - 1 - (post / var).log())
        mean_per_x0 = posterior(self.schedule, t, (t - 1).clamp(min=0)).x0
        x0_error, _ = self._errors(error, t)
        return like(widths, error) + like(mean_per_x0**2 / (2 * var), error) * x0_error**2


def sigma2(level: Level) -> Tensor:
    """sigma^2: every noise level counts alike (Song & Ermon 2019, sec. 4.2); the loss is then L_simple of epsilon."""
    return level.sigma**2


def one(level: Level) -> Tensor:
    """1: the plain squared error of the score, which the lowest noise levels dominate."""
    return torch.ones_like(level.sigma)


WEIGHTS = {"sigma2": sigma2, "one": one}


class DSM(Objective):
    """Denoising score matching: weight * (score + epsilon / sigma)^2 (Vincent 2011; Song & Ermon 2019, eq. 5, doubled).

    Args:
        schedule: noise levels.
        prediction: what the network outputs.
        weight: "sigma2", "one", or a function of the `Level` that answers with float64 of its shape.

    Raises:
        ValueError: prediction or weight unknown.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str = "score",
        weight: str | Callable[[Level], Tensor] = "sigma2",
    ) -> None:
        super().__init__(schedule, prediction)
        if isinstance(weight, str) and weight not in WEIGHTS:
            raise ValueError(f"objective.weight={weight} is none of {', '.join(WEIGHTS)}.")
        self.weight = WEIGHTS[weight] if isinstance(weight, str) else weight

    def _loss(self, error: Tensor, t: float | Tensor) -> Tensor:
        level = self.schedule(t)
        _, epsilon_error = self._errors(error, t)
        return like(self.weight(level) / level.sigma**2, error) * epsilon_error**2
