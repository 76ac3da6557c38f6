"""The cost of comparing every sample with its digest, and of checking once per second whether shards have changed.

Batches of fixed samples are read with and without the checks, in this process, in alternating order, for many rounds:
small PNGs, and photos as JPEGs. The cost of a batch is the smallest CPU time of all rounds, because other work on the
machine can only make it longer. The figure is the sum of these costs with the checks, divided by the sum without. Other
work of the loader is left out; it is the same for both and would make the ratio smaller.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.benchmark.loader import machine, one_thread
from diffusion.benchmark.loader_images import SHARDS, SMALL_SIZE, photo, write_photos
from diffusion.benchmark.settings import Digests
from diffusion.data.shards.index import read_index
from diffusion.data.shards.readers import LocalShards
from diffusion.data.shards.samples import Samples
from diffusion.data.shards.writer import ShardWriter
from diffusion.files import write_atomically

LIMIT = 1.01


class UnwatchedShards(LocalShards):
    """Shards that are not checked for changes."""

    def glance(self) -> None:
        pass


class UncheckedSamples(Samples):
    """Samples that are not compared with their digests."""

    def _bytes(self, which: int, place: int) -> tuple[bytes, bytes]:
        return self._stored(which, self._reader(which), place)


def write_pngs(root: Path, images: int, size: int) -> None:
    """A data set of photos as PNGs with labels, in eight shards."""
    with ShardWriter(root, "pngs", size, 3, 10, max_samples=-(-images // SHARDS)) as writer:
        for number in range(images):
            pixels = io.BytesIO()
            with Image.open(io.BytesIO(photo(number, size))) as image:
                image.save(pixels, "PNG")
            writer.write(pixels.getvalue(), number % 10, extension="png")


def costs(root: Path, batch_size: int, rounds: int) -> tuple[float, float]:
    """CPU seconds per image, with and without the checks."""
    index = read_index(root)
    sides = Samples(index), UncheckedSamples(index, shards=UnwatchedShards(index))
    batches = np.arange(index.count("train") // batch_size * batch_size).reshape(-1, batch_size)
    least = np.full((2, len(batches)), np.inf)
    for turn in range(rounds):
        for k, batch in enumerate(batches):
            for side in (0, 1) if turn % 2 else (1, 0):
                began = time.process_time()
                sides[side].batch(batch)
                least[side, k] = min(least[side, k], time.process_time() - began)
    checked, unchecked = least.sum(axis=1) / batches.size
    return float(checked), float(unchecked)


def main(settings: Digests, out: Path | None, say: Callable[[str], None]) -> int:
    """The task `digests` of `diffusion.benchmark`. Returns the exit status, 0 if the limit is met."""
    figures = {}
    with tempfile.TemporaryDirectory(prefix="digests_") as folder, one_thread():
        for name, write, size in (("PNG", write_pngs, SMALL_SIZE), ("JPEG", write_photos, settings.image_size)):
            root = Path(folder) / name
            write(root, settings.images, size)
            checked, unchecked = costs(root, settings.batch_size, settings.rounds)
            ratio = checked / unchecked
            figures[f"{name} {size}x{size}"] = {"ratio": ratio, "with": checked, "without": unchecked}
            say(
                f"{name} {size}x{size}: {1e6 * checked:,.2f} us of CPU time per image with the checks, "
                f"{1e6 * unchecked:,.2f} us without, ratio {ratio:.4f}. Limit {LIMIT:g}: "
                f"{'passed' if ratio <= LIMIT else 'FAILED'}"
            )
    if out is not None:
        write_atomically(out, json.dumps({"machine": machine()} | figures, indent=1) + "\n")
    return 0 if all(figure["ratio"] <= LIMIT for figure in figures.values()) else 1
