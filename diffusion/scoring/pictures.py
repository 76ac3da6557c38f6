"""Images to picture files a person looks at."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from diffusion.files import write_atomically

SMALLEST_TILE = 32  # pixels: smaller images are enlarged, without smoothing


def grid(images: Tensor, columns: int | None = None, gap: int = 2, smallest: int = SMALLEST_TILE) -> Image.Image:
    """uint8 (N, C, H, W), C 1 or 3 -> one picture, row by row on a dark ground."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    n, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = max(1, math.ceil(smallest / height))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=3)
    rows, high, wide = math.ceil(n / columns), height * scale + gap, width * scale + gap
    canvas = np.full((rows * high + gap, columns * wide + gap, 3), 24, dtype=np.uint8)
    for k, image in enumerate(pixels):
        top, left = gap + k // columns * high, gap + k % columns * wide
        canvas[top : top + height * scale, left : left + width * scale] = image
    return Image.fromarray(canvas)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_atomically(path, buffer.getvalue())
