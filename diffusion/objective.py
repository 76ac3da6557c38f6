"""Training objectives: one loss per image, the mean over its pixels, from the output of a network.

    x_t = noised(schedule, x0, t, epsilon)
    loss = objective(denoiser.output(x_t, t, labels), x_t, x0, epsilon, t)

Objectives differ in the quantity whose squared error they compute, and in its weight at each noise level. Those of the
variational bound can also learn the variance of the reverse step. Every kind of output is linear in (x_t, output). So
the error of x0 or epsilon is the converted error of the output, with x_t = 0 (`process.prediction`). Nothing here makes
the host wait for the device. This module knows no network, no sampler and not how t is drawn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffusion.process.bound import term
from diffusion.process.kernels import Variance
from diffusion.process.prediction import Predicted, prediction_kind, split_output
from diffusion.process.schedule import Level, Schedule, like
from diffusion.settings import Positive, Share, settings


class Objective(ABC):
    """Base class of objectives: the loss per image of a network that outputs `prediction`.

    If `variance` is "learned", the network also outputs the variance of the reverse step. `unstable` is a warning if Ho
    et al. 2020 found training with this objective unstable, else None.

    Args:
        schedule: noise levels.
        prediction: what the network outputs, one of `process.prediction.PREDICTIONS`.
        label_dropout: share of images trained without their label, for classifier-free guidance; in [0, 1].

    Raises:
        ValueError: prediction is unknown, or label_dropout is outside [0, 1].
    """

    variance: str | None = None
    unstable: str | None = None

    def __init__(self, schedule: Schedule, prediction: Predicted = "epsilon", label_dropout: Share = 0.0) -> None:
        self.schedule, self.prediction, self.label_dropout = schedule, prediction, label_dropout
        self._kind = prediction_kind(prediction)

    def __call__(self, output: Tensor, x_t: Tensor, x0: Tensor, epsilon: Tensor, t: float | Tensor) -> Tensor:
        """The loss per image, (B,), in the dtype of x_t.

        Args:
            output: of the network, (B, C, ...), or (B, 2C, ...) if the variance is learned.
            x_t, x0, epsilon: (B, C, ...), of one shape.
            t: a float or (B,), in (0, T].
        """
        output, share = split_output(output, x_t)
        assert (share is not None) == (self.variance == "learned"), f"variance {self.variance}, but output {share=}"
        error = output - self._kind.from_pair(self.schedule, x_t, t, x0, epsilon)
        return self._loss(error, x0, t, share).flatten(1).mean(1)

    def x0_weight(self, t: Tensor) -> Tensor | None:
        """The weight of the squared error of x0 in the loss, at times t (B,): float64 (B,).

        None: the loss is not a weighted squared error alone.
        """
        return None

    def _output_weight(self, t: Tensor) -> Tensor:
        """The squared error of the output if the error of x0 is 1: float64 (B,).

        The error of epsilon is then -alpha / sigma, because x_t is the same.
        """
        alpha, sigma = self.schedule(t)
        ratio = (alpha / sigma)[:, None]
        one = torch.ones_like(ratio)
        return (self._kind.from_pair(self.schedule, torch.zeros_like(one), t, one, -ratio) ** 2)[:, 0]

    @abstractmethod
    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        """The loss per pixel, (B, ...), from the error of the output.

        share: the learned variance, as in `process.kernels.reverse_std`, or None.
        """

    def _errors(self, error: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The errors of x0 and epsilon, from the error of the output."""
        return self._kind.to_pair(self.schedule, torch.zeros_like(error), t, error)


@settings("objective")
class Simple(Objective):
    """Mean squared error of the output. For epsilon this is L_simple (Ho et al. 2020, eq. 14)."""

    def __init__(self, schedule: Schedule, prediction: Predicted = "epsilon", label_dropout: Share = 0.0) -> None:
        super().__init__(schedule, prediction, label_dropout)
        if prediction == "mu":
            self.unstable = (
                "objective=mu: Ho et al. 2020 (table 2) report that training on the unweighted error of mu is unstable "
                "and gives poor samples. The weights of the variational bound are stable: objective=bound "
                "objective.prediction=mu."
            )

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        return error**2

    def x0_weight(self, t: Tensor) -> Tensor:
        return self._output_weight(t)


@settings("objective")
class Bound(Objective):
    """The terms of the variational bound L, in bits per dimension (Ho et al. 2020, eq. 5).

        t > 1:  1/2 (post / var - 1 - log(post / var)) + (error of the mean)^2 / (2 var),    / log 2
        t = 1:  -log2 of the mass of p(x_0 | x_1) on the level of each pixel (eq. 13)

    post is the variance of the posterior, var that of p. For epsilon the second part is the paper's
    beta^2 / (2 var alpha (1 - alpha_bar)) (error of epsilon)^2, with its alpha = 1 - beta. The loss of an image is the
    term of its own t, as in the code of Ho et al. 2020. Multiplied by T it estimates the bound without the constant
    L_T.

    A learned variance lies between those of the posterior and of the forward kernel (Nichol & Dhariwal 2021, eq. 15);
    Ho et al. learned an unconstrained diagonal. Both parts of the output then get a gradient from this loss.

    Args:
        schedule: noise levels, at least two.
        prediction: what the network outputs.
        variance: variance of p: "small" (of the posterior), "large" (of the forward kernel, beta_t under VP) or
            "learned".

    Raises:
        ValueError: prediction or variance is unknown, or schedule.num_timesteps < 2.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Predicted = "epsilon",
        variance: Variance = "small",
        label_dropout: Share = 0.0,
    ) -> None:
        super().__init__(schedule, prediction, label_dropout)
        if schedule.num_timesteps < 2:
            raise ValueError(
                f"schedule.num_timesteps={schedule.num_timesteps} must be at least 2 for objective=bound and "
                "objective=hybrid."
            )
        self.variance = variance
        if variance == "learned" and prediction == "epsilon":
            self.unstable = (
                "objective=bound objective.prediction=epsilon objective.variance=learned: Ho et al. 2020 (table 2) "
                "report that learning the variance together with epsilon by the bound is unstable and gives poor "
                "samples. objective=hybrid learns the variance without a gradient to the mean."
            )

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        x0_error, _ = self._errors(error, t)
        return term(self.schedule, t, x0, x0_error, self.variance, share)


@settings("objective")
class Hybrid(Bound):
    """The hybrid objective L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, eq. 16).

    The mean is learned from L_simple and the variance from L_vlb, which has no gradient to the mean. L_vlb is T times
    the term of the image's own t, in bits per dimension, an unbiased estimate of the bound. This is the scaling of
    their code, for which vlb_weight=0.001 was chosen.

    Args:
        schedule: noise levels, at least two.
        prediction: what the first half of the output is; L_simple is its squared error.
        variance: must be "learned".
        vlb_weight: the paper's lambda.

    Raises:
        ValueError: prediction is unknown, variance is not "learned", vlb_weight is not positive, or
            schedule.num_timesteps < 2.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Predicted = "epsilon",
        variance: Variance = "learned",
        vlb_weight: Positive = 0.001,
        label_dropout: Share = 0.0,
    ) -> None:
        super().__init__(schedule, prediction, variance, label_dropout)
        if variance != "learned":
            raise ValueError(
                f"objective.variance={variance}: objective=hybrid needs objective.variance=learned. For a fixed "
                f"variance give objective={prediction}."
            )
        self.vlb_weight, self.unstable = vlb_weight, None

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        vlb = self.schedule.num_timesteps * super()._loss(error.detach(), x0, t, share)
        return error**2 + self.vlb_weight * vlb


def sigma2(level: Level) -> Tensor:
    """sigma^2: all noise levels have the same weight (Song & Ermon 2019, sec. 4.2). The loss is L_simple of epsilon."""
    return level.sigma**2


def one(level: Level) -> Tensor:
    """1: the unweighted squared error of the score, which is dominated by the lowest noise levels."""
    return torch.ones_like(level.sigma)


WEIGHTS = {"sigma2": sigma2, "one": one}


@settings("objective")
class DSM(Objective):
    """Denoising score matching: weight * (score + epsilon / sigma)^2 (Vincent 2011; Song & Ermon 2019, eq. 5, doubled).

    Args:
        schedule: noise levels.
        prediction: what the network outputs.
        weight: "sigma2", "one", or a function of a `Level` that returns float64 of its shape.

    Raises:
        ValueError: prediction or weight is unknown.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Predicted = "score",
        weight: Literal["sigma2", "one"] | Callable[[Level], Tensor] = "sigma2",
        label_dropout: Share = 0.0,
    ) -> None:
        super().__init__(schedule, prediction, label_dropout)
        self.weight = WEIGHTS[weight] if isinstance(weight, str) else weight

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        _, epsilon_error = self._errors(error, t)
        return like(self._epsilon_weight(t), error) * epsilon_error**2

    def _epsilon_weight(self, t: float | Tensor) -> Tensor:
        level = self.schedule(t)
        return self.weight(level) / level.sigma**2

    def x0_weight(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule(t)
        return self._epsilon_weight(t) * (alpha / sigma) ** 2
