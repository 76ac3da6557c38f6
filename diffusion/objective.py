"""Training objectives: from a network's output to one loss per image, a mean over its pixels, never over the batch.

    x_t = noised(schedule, x0, t, epsilon)
    loss = objective(denoiser.output(x_t, t, labels), x_t, x0, epsilon, t)

What differs between objectives is the quantity whose squared error is taken, and its weight at each noise level; those
of the variational bound may also learn how wide the reverse step is. As every kind of output is linear in (x_t,
output), the error of x0 or epsilon is the error of the output carried through the hub with x_t = 0. Nothing here makes
the host wait for the device. Knows no network and no sampler, nor how t is drawn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffusion.process.bound import term
from diffusion.process.kernels import Variance
from diffusion.process.prediction import Predicted, parted, prediction_kind
from diffusion.process.schedule import Level, Schedule, like
from diffusion.settings import Positive, Share, settings


class Objective(ABC):
    """Loss per image of a network that outputs `prediction`, and where `variance` is "learned" that as well.

    `unstable` says what Ho et al. 2020 met with training by this objective where they found it unstable, else None.

    Args:
        schedule: noise levels.
        prediction: what the network outputs, one of `process.prediction.PREDICTIONS`.
        label_dropout: share of the images whose label is hidden in training, for classifier-free guidance.

    Raises:
        ValueError: prediction is none of these, or the share outside [0, 1].
    """

    variance: str | None = None
    unstable: str | None = None

    def __init__(self, schedule: Schedule, prediction: Predicted = "epsilon", label_dropout: Share = 0.0) -> None:
        self.schedule, self.prediction, self.label_dropout = schedule, prediction, label_dropout
        self._kind = prediction_kind(prediction)

    def __call__(self, output: Tensor, x_t: Tensor, x0: Tensor, epsilon: Tensor, t: float | Tensor) -> Tensor:
        """Loss (B,) in the dtype of x_t. All images (B, C, ...) of one shape, the output of twice the channels where
        the variance is learned; t a float or (B,), in (0, T]."""
        output, share = parted(output, x_t)
        assert (share is not None) == (self.variance == "learned"), f"variance {self.variance}, but output {share=}"
        error = output - self._kind.from_pair(self.schedule, x_t, t, x0, epsilon)
        return self._loss(error, x0, t, share).flatten(1).mean(1)

    def x0_weight(self, t: Tensor) -> Tensor | None:
        """What the squared error of x0 weighs in the loss at times t (B,), float64 (B,); None: the loss has other parts
        than a weighted squared error."""
        return None

    def _output_weight(self, t: Tensor) -> Tensor:
        """The squared error of the output where that of x0 is 1, float64 (B,). The error of epsilon is then -alpha /
        sigma, as both are of one x_t."""
        alpha, sigma = self.schedule(t)
        ratio = (alpha / sigma)[:, None]
        one = torch.ones_like(ratio)
        return (self._kind.from_pair(self.schedule, torch.zeros_like(one), t, one, -ratio) ** 2)[:, 0]

    @abstractmethod
    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        """Loss per pixel, (B, ...), of an error of the output; share is the learned variance (`process.kernels`)."""

    def _errors(self, error: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The errors of x0 and epsilon that belong to an error of the output."""
        return self._kind.to_pair(self.schedule, torch.zeros_like(error), t, error)


@settings("objective")
class Simple(Objective):
    """Mean squared error of the output itself: L_simple (Ho et al. 2020, eq. 14) if that is epsilon."""

    def __init__(self, schedule: Schedule, prediction: Predicted = "epsilon", label_dropout: Share = 0.0) -> None:
        super().__init__(schedule, prediction, label_dropout)
        if prediction == "mu":
            self.unstable = (
                "objective=mu: Ho et al. 2020 (table 2) found the unweighted error of mu unstable to train, with poor "
                "samples; weighted as in the bound, objective=bound objective.prediction=mu, it trains."
            )

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        return error**2

    def x0_weight(self, t: Tensor) -> Tensor:
        return self._output_weight(t)


@settings("objective")
class Bound(Objective):
    """The terms of the variational bound, in bits per dimension (Ho et al. 2020, eq. 5): L.

        t > 1:  1/2 (post / var - 1 - log(post / var)) + (error of the mean)^2 / (2 var),    / log 2
        t = 1:  -log2 of the mass that p(x_0 | x_1) has on the level of each pixel (eq. 13)

    post is the posterior's variance, var that of p. For epsilon the second part is the paper's
    beta^2 / (2 var alpha (1 - alpha_bar)) (error of epsilon)^2, with its alpha = 1 - beta. The loss of an image is the
    term of its own t, as in the code of Ho et al. 2020: times T it estimates the bound, without L_T, which is constant.

    A learned variance lies between the posterior's and the forward kernel's (Nichol & Dhariwal 2021, eq. 15); Ho et al.
    left their diagonal free. Both parts of the output then have a gradient from it.

    Args:
        schedule: noise levels, at least two.
        prediction: what the network outputs.
        variance: of p: "small", the posterior's, "large", the forward kernel's (beta_t under VP), or "learned".

    Raises:
        ValueError: prediction or variance unknown, or schedule.num_timesteps < 2.
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
            raise ValueError(f"schedule.num_timesteps={schedule.num_timesteps}: the bound needs at least 2.")
        self.variance = variance
        if variance == "learned" and prediction == "epsilon":
            self.unstable = (
                "objective=bound objective.prediction=epsilon objective.variance=learned: Ho et al. 2020 (table 2) "
                "found a variance learned by the bound together with epsilon unstable to train, with poor samples; "
                "objective=hybrid learns it without disturbing the mean."
            )

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        x0_error, _ = self._errors(error, t)
        return term(self.schedule, t, x0, x0_error, self.variance, share)


@settings("objective")
class Hybrid(Bound):
    """L_simple + vlb_weight L_vlb: the mean learned from the first, the variance from the second (Nichol & Dhariwal
    2021, eq. 16).

    L_vlb is T times the term of the image's own t, in bits per dimension, an unbiased estimate of the bound: the
    scaling of their code, which the weight of 0.001 belongs to. It sends no gradient to the mean.

    Args:
        schedule: noise levels, at least two.
        prediction: what the first half of the output is; its plain squared error is the first part.
        variance: "learned": a fixed one has nothing to learn from the second part.
        vlb_weight: the paper's lambda.

    Raises:
        ValueError: prediction unknown, variance not "learned", vlb_weight not positive, schedule.num_timesteps < 2.
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
                f"objective.variance={variance}: objective=hybrid learns the variance; for a fixed one give "
                f"objective={prediction}."
            )
        self.vlb_weight, self.unstable = vlb_weight, None

    def _loss(self, error: Tensor, x0: Tensor, t: float | Tensor, share: Tensor | None) -> Tensor:
        vlb = self.schedule.num_timesteps * super()._loss(error.detach(), x0, t, share)
        return error**2 + self.vlb_weight * vlb


def sigma2(level: Level) -> Tensor:
    """sigma^2: every noise level counts alike (Song & Ermon 2019, sec. 4.2); the loss is then L_simple of epsilon."""
    return level.sigma**2


def one(level: Level) -> Tensor:
    """1: the plain squared error of the score, which the lowest noise levels dominate."""
    return torch.ones_like(level.sigma)


WEIGHTS = {"sigma2": sigma2, "one": one}


@settings("objective")
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
