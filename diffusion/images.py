"""The uint8 border: images are uint8 in [0, 255] outside, float32 in [-1, 1] inside. Nothing else converts."""

import torch
from torch import Tensor

LEVELS_PER_UNIT = 127.5  # of the 256


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], x / 127.5 - 1 (Ho et al. 2020); no dequantisation noise. Any shape."""
    assert images.dtype == torch.uint8, f"expected uint8 images, met {images.dtype}"
    return images.to(torch.float32) / LEVELS_PER_UNIT - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 [0, 255], clipped, rounded to the nearest level (truncation darkens by half a level)."""
    return ((x.float().clamp(-1, 1) + 1) * LEVELS_PER_UNIT).round().to(torch.uint8)
