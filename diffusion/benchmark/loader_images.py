"""Data sets for the benchmark of the loader: the same images on every machine, as expensive to decode as real ones."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.data.shards.writer import ShardWriter

SHARDS, SMALL_SIZE = 8, 32


def photo(number: int, size: int) -> bytes:
    """A JPEG that is as expensive to decode as a photo: smooth fields of several scales, with grain in some places.

    At 256 x 256 pixels it has about 20 to 40 kB. The same number gives the same pixels.
    """
    random = np.random.default_rng(number)

    def field(cells: int, channels: int) -> np.ndarray:
        coarse = random.integers(0, 256, (cells, cells, channels), dtype=np.uint8)
        smooth = [Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC) for c in coarse.transpose(2, 0, 1)]
        return np.stack(smooth, axis=2).astype(np.float32) - 127.5

    light = sum(weight * field(cells, 1) for cells, weight in ((3, 0.8), (8, 0.5), (24, 0.3), (64, 0.2)))
    colour = 0.4 * field(3, 3) + 0.2 * field(16, 3)
    grain = random.standard_normal((size, size, 1), dtype=np.float32) * 40 * (field(5, 1) / 255 + 0.5) ** 2
    pixels = np.clip(127.5 + light + colour + grain, 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def write_photos(root: Path, images: int, size: int) -> None:
    """A data set of photos, as JPEGs, in eight shards."""
    with ShardWriter(root, "photos", size, 3, 0, max_samples=-(-images // SHARDS)) as writer:
        for number in range(images):
            writer.write(photo(number, size), extension="jpg")


def write_small(root: Path, images: int) -> None:
    """A data set of random 32 x 32 images, as plain arrays."""
    random, shape = np.random.default_rng(0), (3, SMALL_SIZE, SMALL_SIZE)
    with ShardWriter(root, "small", SMALL_SIZE, 3, 0, max_samples=-(-images // SHARDS)) as writer:
        for _ in range(images):
            array = io.BytesIO()
            np.save(array, random.integers(0, 256, shape, dtype=np.uint8))
            writer.write(array.getvalue(), extension="npy")
