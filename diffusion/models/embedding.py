"""Embeddings of the noise level and of the class, and the initialised layers that they are built from.

Any network may use them. In this package's networks the sum of both embeddings goes through a swish and then into each
block.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def variance_scaling_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Fill `weight` in place from a uniform distribution of variance scale / mean(fan_in, fan_out).

    scale=1 is Xavier initialisation; 1e-10 is what Ho et al. 2020 use as "zero".
    """
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    limit = math.sqrt(3 * scale / ((fan_in + fan_out) / 2))
    return nn.init.uniform_(weight, -limit, limit)


def initialised(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """The layer with its weight initialised by `variance_scaling_` and its bias set to zero."""
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


def linear(channels_in: int, channels_out: int, scale: float = 1.0) -> nn.Module:
    """A linear layer, initialised."""
    return initialised(nn.Linear(channels_in, channels_out), scale)


class TimeEmbedding(nn.Module):
    """Positional embedding of a time index, as in DDPM: (B,) -> (B, 4 width).

    Sines, then cosines, of the index at geometric frequencies 1 ... 1e-4 (both ends included), followed by two linear
    layers. The index runs from 0 to T-1 and is not rescaled.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width // 2
        self.dense_1 = linear(width, 4 * width)
        self.dense_2 = linear(4 * width, 4 * width)

    def forward(self, time_index: Tensor) -> Tensor:
        exponent = torch.arange(self.half, dtype=torch.float32, device=time_index.device) / (self.half - 1)
        angle = time_index.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.dense_1.weight.dtype)
        return self.dense_2(F.silu(self.dense_1(waves)))


class FourierEmbedding(nn.Module):
    """Random Fourier embedding of the log of a noise level, as in NCSN++: (B,) -> (B, 4 width).

    Sines, then cosines, of 2 pi w log sigma at `width` frequencies w ~ N(0, scale^2), followed by two linear layers
    (Song et al. 2021, score SDE, app. H). The frequencies are drawn once and are not trained.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(width))
        self.dense_1 = linear(2 * width, 4 * width)
        self.dense_2 = linear(4 * width, 4 * width)

    def forward(self, log_sigma: Tensor) -> Tensor:
        angle = 2 * math.pi * log_sigma.float()[:, None] * self.frequencies
        waves = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.dense_1.weight.dtype)
        return self.dense_2(F.silu(self.dense_1(waves)))


TimeEmbeddingKind = Literal["positional", "fourier"]
CONDITIONING = {"positional": "time", "fourier": "noise"}  # what each kind embeds: a key of `denoiser.CONDITIONINGS`


def time_embedding_of(kind: str, width: int, scale: float) -> nn.Module:
    """The embedding module of this kind: (B,) -> (B, 4 width).

    Args:
        scale: standard deviation of the frequencies of a Fourier embedding.
    """
    return TimeEmbedding(width) if kind == "positional" else FourierEmbedding(width, scale)


class LabelEmbedding(nn.Embedding):
    """Embedding of class labels: int64 (B,), or None for "no class" -> (B, width).

    One row per class, and a last row for "no class".
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)

    def forward(self, labels: Tensor | None, count: int) -> Tensor:
        """The rows of the labels. `count` is the batch size B, needed where labels is None."""
        if labels is None:
            labels = torch.full((count,), self.num_embeddings - 1, device=self.weight.device)
        return super().forward(labels)
