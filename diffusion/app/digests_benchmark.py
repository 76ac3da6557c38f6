"""What it costs the loader to compare every sample with its digest, and to look once a second whether shards changed.

Our loader with and without it, on the same shards, in this process, batch by batch in turn; small PNGs and photos as
JPEGs. A figure is the CPU time of an alternation with the checks over that of the same one without; the ratio is the
median over the alternations. CPU time, because other work on the machine lengthens the wall time of one side or the
other; batch by batch, because it also takes the caches from them.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from diffusion.app.loader_benchmark import machine, one_thread
from diffusion.app.loader_images import SHARDS, SMALL_SIZE, photo, write_photos
from diffusion.data.index import read_index
from diffusion.data.layout import Layout, choose_lanes
from diffusion.data.order import Plan
from diffusion.data.samples import Samples
from diffusion.data.shards import LocalShards
from diffusion.data.stream import StreamLoader
from diffusion.data.writer import ShardWriter
from diffusion.files import write_atomically

LIMIT = 1.01


class UnwatchedShards(LocalShards):
    """Shards that nobody looks at."""

    def glance(self) -> None:
        pass


class UncheckedSamples(Samples):
    """Samples that are taken as they are read."""

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


def batches_of(samples: Samples, batch_size: int) -> Iterator[dict[str, Any]]:
    plan = Plan(samples.counts, batch_size, choose_lanes(len(samples.counts), batch_size), seed=0)
    return iter(StreamLoader(samples, plan, Layout(batch_size)))


def ratios(root: Path, batch_size: int, batches: int, rounds: int) -> tuple[list[float], list[float]]:
    """(with the checks / without, for each alternation; CPU seconds per image with them)."""
    index = read_index(root)
    sides = [
        batches_of(Samples(index), batch_size),
        batches_of(UncheckedSamples(index, shards=UnwatchedShards(index)), batch_size),
    ]
    for side in sides:  # open all files
        for _ in range(-(-index.count("train") // batch_size)):
            next(side)
    found, seconds = [], []
    for _ in range(rounds):
        spent = [0.0, 0.0]
        for turn in range(batches):
            for number in (0, 1) if turn % 2 else (1, 0):
                began = time.process_time()
                next(sides[number])
                spent[number] += time.process_time() - began
        found.append(spent[0] / spent[1])
        seconds.append(spent[0] / (batches * batch_size))
    return found, seconds


def main(cfg: DictConfig, say: Callable[[str], None]) -> int:
    """The task `digests` of `diffusion.benchmark`; the exit status, 0 if the bar holds."""
    settings, figures = cfg.digests, {}
    with tempfile.TemporaryDirectory(prefix="digests_") as folder, one_thread():
        for name, write, size in (("PNG", write_pngs, SMALL_SIZE), ("JPEG", write_photos, settings.image_size)):
            root = Path(folder) / name
            write(root, settings.images, size)
            found, seconds = ratios(root, settings.batch_size, settings.batches, settings.rounds)
            ratio = statistics.median(found)
            figures[f"{name} {size}x{size}"] = {"ratio": ratio, "ratios": found, "holds": ratio <= LIMIT}
            say(
                f"{name} {size}x{size}: with / without the checks {ratio:.4f} ({min(found):.4f} .. {max(found):.4f}), "
                f"{1e6 * statistics.median(seconds):,.1f} us of CPU time per image. At most {LIMIT:g}: "
                f"{'holds' if ratio <= LIMIT else 'does not hold'}"
            )
    if cfg.out is not None:
        write_atomically(cfg.out, json.dumps({"machine": machine()} | figures, indent=1) + "\n")
    return 0 if all(figure["holds"] for figure in figures.values()) else 1
