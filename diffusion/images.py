"""Conversion of images between uint8 in [0, 255], as stored, and float32 in [-1, 1], as computed with.

No other module converts.
"""

import torch
from torch import Tensor

LEVELS_PER_UNIT = 127.5  # uint8 levels per unit of x; [-1, 1] has 255 steps


def from_uint8(images: Tensor) -> Tensor:
    """Convert uint8 in [0, 255] to float32 in [-1, 1]: x / 127.5 - 1, without dequantisation noise (Ho et al. 2020).

    Any shape.
    """
    assert images.dtype == torch.uint8, f"expected uint8 images, got {images.dtype}"
    return images.to(torch.float32) / LEVELS_PER_UNIT - 1


def to_uint8(x: Tensor) -> Tensor:
    """Convert [-1, 1] to uint8 in [0, 255]: clip, then round to the nearest level.

    Truncating instead would darken the image by half a level. Any shape.
    """
    return ((x.float().clamp(-1, 1) + 1) * LEVELS_PER_UNIT).round().to(torch.uint8)
