"""A data set whose images say their numbers, and the loaders of all ranks at once."""

import itertools
import shutil

import numpy as np
import torch

from diffusion.data.shards.index import read_index
from diffusion.data.shards.layout import Layout
from diffusion.data.shards.order import Plan
from diffusion.data.shards.samples import Samples
from diffusion.data.shards.stream import StreamLoader
from diffusion.data.shards.writer import ShardWriter

COUNT, CLASSES, BATCH = 1009, 7, 840  # a prime number of images; a batch that 1 to 8 ranks divide


def pixels(number):
    """An image that says its number."""
    return np.array([number >> 8, number & 255, 0, 255], dtype=np.uint8).reshape(1, 2, 2)


def number_of(images):
    flat = images.reshape(len(images), 4).to(torch.int64)
    assert (flat[:, 2] == 0).all() and (flat[:, 3] == 255).all()
    return flat[:, 0] * 256 + flat[:, 1]


def write_numbered(root):
    """1,009 numbered images in 11 shards, the last of them smaller."""
    with ShardWriter(root, "numbered", image_size=2, channels=1, classes=CLASSES, max_samples=93) as writer:
        for number in range(COUNT):
            writer.write(pixels(number), number % CLASSES)
    return root


class Counted(Samples):
    """Samples that note the numbers of those they decode."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.decoded = []

    def _bytes(self, which, place):
        self.decoded.append(int(self._first[which]) + place)
        return super()._bytes(which, place)


def plan_of(samples, batch_size=BATCH, lanes=8, seed=3):
    return Plan(samples.counts, batch_size, lanes, seed)


def take(loader, count):
    return list(itertools.islice(loader, count))


def global_batches(samples, ranks, workers, steps, accumulate=1, start=0, batch_size=BATCH):
    """The global batches that the ranks' loaders make together: (position, number), each (steps, batch_size)."""
    parts = []
    for rank in range(ranks):
        layout = Layout(batch_size, rank, ranks, accumulate)
        loader = StreamLoader(samples, plan_of(samples, batch_size), layout, start * accumulate, workers)
        batches = take(loader, steps * accumulate)
        assert all(len(batch["image"]) == layout.micro_batch_size for batch in batches)
        assert all((batch["label"] == number_of(batch["image"]) % CLASSES).all() for batch in batches)
        parts.append([torch.stack([batch["position"], number_of(batch["image"])]) for batch in batches])
    steps_of = [[torch.cat(part[s * accumulate : (s + 1) * accumulate], dim=1) for part in parts] for s in range(steps)]
    return torch.stack([torch.cat(step, dim=1) for step in steps_of], dim=1)


def damaged(root, folder, numbers, per_shard=93):
    """A copy of the set with these samples' images overwritten."""
    shutil.copytree(root, folder)
    index = read_index(folder)
    for number in numbers:
        shard = index.shards[number // per_shard]
        at, size = index.offsets(shard)[number % per_shard][:2].tolist()
        with open(index.path(shard), "r+b") as file:
            file.seek(at)
            file.write(b"x" * size)
    return folder
