"""Parts of a user's own, in no package: a two-step sampler, a schedule, an objective, a metric, data."""

from typing import Annotated

import numpy as np
import torch
from torch.nn.functional import smooth_l1_loss

from diffusion.data.memory import ArraysDataModule
from diffusion.metrics.metric import Metric
from diffusion.objective import Objective
from diffusion.process.schedule import Level, Schedule
from diffusion.samplers.base import Sampler
from diffusion.samplers.ddim import DDIM
from diffusion.settings import Between, Count, Positive, settings


@settings("sampler")
class TwoStep(Sampler):
    """Extrapolate epsilon from the last two steps, and take DDIM's step with it.

    Args:
        weight: of the step before: 0 is DDIM, 0.5 is the method of Adams and Bashforth for even steps.
    """

    memory = 1

    def __init__(self, schedule: Schedule, weight: Annotated[float, Between(0, 1)] = 0.5) -> None:
        super().__init__(schedule)
        self.weight, self.inner = weight, DDIM(schedule)

    def step(self, denoise, x_t, t, s, randn, past=()):
        def extrapolated(x, time):
            found = denoise(x, time)
            if not past:
                return found
            epsilon = (1 + self.weight) * found.epsilon - self.weight * past[0].prediction.epsilon
            alpha, sigma = self.schedule(time)
            return found._replace(epsilon=epsilon, x0=(x - sigma * epsilon) / alpha)

        return self.inner.step(extrapolated, x_t, t, s, randn)


@settings("schedule")
class Sigmoid(Schedule):
    """alpha_bar = 1 - sigmoid(width (2 t / T - 1)).

    Args:
        num_timesteps: T. width: of the sigmoid.
    """

    def __init__(self, num_timesteps: Count = 1000, width: Positive = 5.0) -> None:
        super().__init__(num_timesteps)
        self.width = width

    def _level(self, t):
        lam = -self.width * (2 * t / self.num_timesteps - 1)
        return Level(torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt())

    def _time(self, log_ratio):
        return (1 - 2 * log_ratio / self.width) * self.num_timesteps / 2


@settings("objective")
class Huber(Objective):
    """The Huber loss of the output's error.

    Args:
        beta: where it turns from quadratic to linear.
    """

    def __init__(self, schedule, prediction="epsilon", beta: Positive = 1.0, label_dropout: float = 0.0) -> None:
        super().__init__(schedule, prediction, label_dropout)
        self.beta = beta

    def _loss(self, error, x0, t, share):
        return smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=self.beta)


class Centre(Metric):
    """The distance of the mean features of two sets of images."""

    title = "centre distance"
    higher_is_better = False
    least_images = 3

    @staticmethod
    def compute(features, reference):
        return {"centre": float((features.pooled.mean(0) - reference.features.mean(0)).norm())}


@settings("data")
class Stripes(ArraysDataModule):
    """Images of stripes, upright or lying, with noise.

    Args:
        number: of images in split train; a quarter of it in split test.
    """

    splits = ("train", "test")

    def __init__(self, number: Count, side: Count = 8, **others) -> None:
        super().__init__(**others)
        self.number, self.side = number, side

    def arrays(self, split):
        number = self.number if split == "train" else self.number // 4
        rng = np.random.default_rng(split == "train")
        labels = np.arange(number) % 2
        stripes = np.where(np.arange(self.side) % 2, 60, 190)[None, :] + np.zeros((self.side, 1))
        both = np.stack([stripes, stripes.T])[labels] + rng.integers(-50, 50, (number, self.side, self.side))
        return both.astype(np.uint8)[:, None], labels


class Features(torch.nn.Module):
    """Means of the quarters of an image as features, and logits of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(4, 2)
        torch.nn.init.constant_(self.dense.weight, 0.01)

    def forward(self, images):
        rows = images.float().mean(1).chunk(2, 1)
        features = torch.stack([quarter.mean((1, 2)) for row in rows for quarter in row.chunk(2, 2)], dim=1)
        return features, self.dense(features)


def features() -> Features:
    return Features()
