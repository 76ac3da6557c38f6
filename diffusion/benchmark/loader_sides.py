"""The loaders that are compared in this environment: ours, torch's DataLoader on bytes in memory, and webdataset's.

    python -m diffusion.benchmark.loader_sides JSON

Each loader runs in its own process, which benchmark/loader.py starts and queries. All of them decode with
`decode_image`, with the same number of workers, the same batch size, and two batches decoded ahead by each worker.
Costs are measured by loader_peers.Stopwatch; this module builds the loaders.
"""

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from diffusion.benchmark.loader_peers import (
    IMAGE_EXTENSIONS,
    PREFETCH,
    Stopwatch,
    label_of,
    loader_settings,
    serve,
    stored,
)
from diffusion.data.shards.index import Index, read_index
from diffusion.data.shards.layout import Layout, choose_lanes
from diffusion.data.shards.order import Plan
from diffusion.data.shards.samples import Samples, decode_image
from diffusion.data.shards.stream import StreamLoader

Settings = dict[str, Any]


def subset(root: str | Path, images: int) -> Index:
    """The index of the first shards of the training split that together hold `images` images, or of all shards.

    Raises:
        ValueError: there is no data set in the folder `root`.
    """
    index, shards = read_index(Path(root)), []
    for shard in index.of_split("train"):
        if sum(s.samples for s in shards) < images:
            shards.append(shard)
    return replace(index, shards=tuple(shards))


def stream_loader(index: Index, batch_size: int, seed: int, cache: str = "none", num_workers: int = 0) -> StreamLoader:
    """Our loader of a training split, for a single rank."""
    counts = [shard.samples for shard in index.shards]
    plan = Plan(counts, batch_size, choose_lanes(len(counts), batch_size), seed)
    return StreamLoader(Samples(index, "train", cache=cache), plan, Layout(batch_size), num_workers=num_workers)


def ours(settings: Settings) -> DataLoader:
    """Our loader."""
    index = subset(settings["root"], settings["images"])
    return stream_loader(index, settings["batch_size"], settings["seed"], num_workers=settings["num_workers"])


class InMemory(Dataset):
    """Encoded images in memory, which are decoded when they are requested."""

    def __init__(self, settings: Settings) -> None:
        self.channels, self.image_size = settings["channels"], settings["image_size"]
        self.samples = list(stored(settings["tars"]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        data, label = self.samples[number]
        return {"image": decode_image(data, self.channels, self.image_size), "label": label}


def memory(settings: Settings) -> DataLoader:
    """torch's DataLoader on bytes in memory, in random order. No file is read."""
    samples = InMemory(settings)
    generator = torch.Generator().manual_seed(settings["seed"])
    order = RandomSampler(samples, num_samples=settings["total"], generator=generator)  # one permutation after another
    return DataLoader(samples, sampler=order, **loader_settings(settings))


def webdataset(settings: Settings) -> Any:
    """webdataset's pipeline over the tars: shards drawn at random without end, then a shuffle buffer of 1,000 samples.

    Batches are collated by torch's default_collate, which writes the images directly to shared memory.
    """
    wds = importlib.import_module("webdataset")  # by name, because here it is the peer; diffusion.data uses it too

    def decoded(sample: dict[str, Any]) -> dict[str, Any]:
        data = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        return {
            "image": decode_image(data, settings["channels"], settings["image_size"]),
            "label": label_of(sample),
        }

    samples = wds.WebDataset(settings["tars"], resampled=True, shardshuffle=False, seed=settings["seed"])
    batches = samples.shuffle(1000).map(decoded).batched(settings["batch_size"], collation_fn=default_collate)
    return wds.WebLoader(batches, **(loader_settings(settings) | {"batch_size": None}))


SIDES: dict[str, Callable[[Settings], Any]] = {"ours": ours, "memory": memory, "webdataset": webdataset}


def peer(side: str) -> str:
    """The package of a loader, with its version. For ours, the figures contain the commit."""
    package = {"memory": "torch", "webdataset": "webdataset"}.get(side)
    return f"{package} {importlib.metadata.version(package)}" if package else "diffusion"


def main() -> None:
    settings = json.loads(sys.argv[1])

    def make() -> tuple[Stopwatch, str]:
        loader = SIDES[settings["side"]](settings)
        prefetch = getattr(loader, "prefetch_factor", None) or PREFETCH  # None without workers; a WebLoader has none
        return Stopwatch(loader, ahead=prefetch * settings["num_workers"]), peer(settings["side"])

    serve(make)


if __name__ == "__main__":
    main()
