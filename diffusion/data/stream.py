"""Shards -> batches: samples read by their offset, decoded, and put together in the order of the plan.

    Source (numbers of samples, in order) -> map (read, decode) -> batched          a webdataset pipeline

Nothing is ever unpickled: an image is PNG, JPEG, WebP or a plain .npy array, a label is an integer or JSON. A batch is

    image     uint8 (b, C, H, W)
    label     int64 (b,), if the data set has classes
    position  int64 (b,): place in the endless stream, step * B + slot, which the training noise is keyed by

This module knows one rank's part of the work; it does not know who trains on it.
"""

import io
import itertools
import json
import math
import mmap
import os
import signal
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from webdataset import DataPipeline
from webdataset.filters import batched
from webdataset.filters import map as mapped

from diffusion.data.index import Index, Shard
from diffusion.data.layout import Layout
from diffusion.data.order import Plan
from diffusion.files import sha256_of

CACHES = ("auto", "memory", "none")
CACHE_BYTES = 1 << 30  # what `auto` keeps of decoded images, at most, per rank
OPEN_SHARDS = 320  # 64 lanes with windows of 4 shards, and some; two files each, where a process may usually have 1024


class BadSample(ValueError):
    """A sample cannot be read or decoded; the message names the shard and the sample."""


# ---- from a tar to pixels ----


class ShardReader(Protocol):
    """An open shard: any bytes of it by their offset."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""

    def close(self) -> None:
        """Give the file back."""


class LocalShard:
    """A shard on a local or mounted file system. `pread` has no position, so forked processes may share it."""

    def __init__(self, index: Index, shard: Shard) -> None:
        self._file = os.open(index.path(shard), os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, self._file)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), fewer where the file ends."""
        return os.pread(self._file, size, offset)

    def close(self) -> None:
        """Close the file; it is closed at the latest when nobody has this object any more."""
        self._closed()


def decode_image(data: bytes, channels: int, image_size: int) -> np.ndarray:
    """PNG, JPEG, WebP, or .npy of uint8 (C, H, W) -> uint8 (C, H, W). Told apart by their first bytes, never unpickled.

    Raises:
        ValueError: another size than the data set's. Damaged data raise what PIL and NumPy raise.
    """
    shape = (channels, image_size, image_size)
    if data.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.size != (image_size, image_size):
                raise ValueError(f"an image of {image.size[0]} x {image.size[1]} pixels, expected {shape}")
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"an image {array.dtype} {array.shape}, expected uint8 {shape}")
    return array


def decode_label(data: bytes, classes: int) -> int:
    """The text of an integer (.cls), or JSON with the integer as `label` -> the integer.

    Raises:
        ValueError: anything else, or outside [0, classes).
    """
    label = json.loads(data)
    if isinstance(label, dict):
        label = label.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise ValueError(f"the label {label!r}, expected an integer in [0, {classes})")
    return label


class Samples(Dataset):
    """The decoded samples of one split, by number, in the index's order: `samples[i] -> (image, label or None)`.

    Args:
        index: the data set.
        split: which part of it.
        cache: `memory` keeps decoded images, so that each is decoded once and not every epoch; `none` does not;
            `auto` does when all of the split takes at most `cache_bytes`. The memory is shared with worker processes
            forked later, not between ranks.
        cache_bytes: the limit of `auto`.
        open_shard: what opens a shard for reading.

    Raises:
        ValueError: no such split, or an unknown `cache`.
    """

    def __init__(
        self,
        index: Index,
        split: str = "train",
        cache: str = "none",
        cache_bytes: int = CACHE_BYTES,
        open_shard: Callable[[Index, Shard], ShardReader] = LocalShard,
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"data.cache={cache} is not one of {', '.join(CACHES)}.")
        self.index, self.shards = index, index.of_split(split)
        self.counts = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self._first = np.cumsum(self.counts) - self.counts
        self._open_shard = open_shard
        self._open: OrderedDict[int, tuple[ShardReader, np.ndarray]] = OrderedDict()  # the least lately used first
        bytes_of_all = len(self) * index.channels * index.image_size**2
        self._cache = None
        if cache == "memory" or (cache == "auto" and bytes_of_all <= cache_bytes):
            self._cache = _SharedImages(len(self), index.channels, index.image_size)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, number: int) -> tuple[np.ndarray, int | None]:
        """uint8 (C, H, W), not to be written to, and the class, None in a data set without.

        Raises:
            IndexError: no sample has this number.
            BadSample: it cannot be read or decoded.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        if self._cache is not None and self._cache.known[number]:
            image, label = self._cache.images[number], int(self._cache.labels[number])
        else:
            image, label = self._decode(number)
            if self._cache is not None:
                self._cache.images[number], self._cache.labels[number] = image, label
                self._cache.known[number] = True  # after its content
        return image, (label if self.index.classes else None)

    def _decode(self, number: int) -> tuple[np.ndarray, int]:
        """The image and the class (0 in a data set without) from the tar."""
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        reader, offsets = self._reader(which)
        image_at, image_size, label_at, label_size = (int(x) for x in offsets[number - self._first[which]])
        try:
            image = decode_image(_read(reader, image_at, image_size), self.index.channels, self.index.image_size)
            label = decode_label(_read(reader, label_at, label_size), self.index.classes) if self.index.classes else 0
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and others on damaged data
            raise BadSample(self._complaint(which, int(number - self._first[which]), image_at, error)) from error
        return image, label

    def _reader(self, which: int) -> tuple[ShardReader, np.ndarray]:
        if which in self._open:
            self._open.move_to_end(which)
        else:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
            shard = self.shards[which]
            self._open[which] = (self._open_shard(self.index, shard), self.index.offsets(shard))
        return self._open[which]

    def _complaint(self, which: int, number: int, image_at: int, error: Exception) -> str:
        """What went wrong, where, and whether the file has changed since it was written."""
        shard, path = self.shards[which], self.index.path(self.shards[which])
        name = self._open[which][0].read(image_at - 512, 100).split(b"\0")[0].decode(errors="replace")  # tar header
        changed = not path.is_file() or sha256_of(path) != shard.sha256
        verdict = "differs from its sha256 in index.json: prepare it again" if changed else "is as written"
        return (
            f"data.root={self.index.root}: cannot read sample {number} ({name!r}) of shard {shard.path}: {error}. "
            f"The shard {verdict}."
        )


def _read(reader: ShardReader, offset: int, size: int) -> bytes:
    data = reader.read(offset, size)
    if len(data) != size or not size:
        raise ValueError(f"met {len(data)} bytes at offset {offset}, expected {size or 'some'}")
    return data


class _SharedImages:
    """Decoded images in anonymous shared memory: a forked worker's images are there for all the others.

    Two workers may decode one sample at once; both write the same bytes.
    """

    def __init__(self, count: int, channels: int, image_size: int) -> None:
        shape = (count, channels, image_size, image_size)
        self.images = np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
        self.labels = np.frombuffer(mmap.mmap(-1, count * 8), np.int64)
        self.known = np.frombuffer(mmap.mmap(-1, count), np.bool_)


# ---- from samples to batches ----


class Source(IterableDataset):
    """Numbers and places of this rank's samples, from micro-batch `start` on, without end.

    `start` counts the micro-batches consumed before; what lies before it is neither read nor decoded. Of W loader
    workers, worker w serves whole micro-batches start + w, start + w + W, ...: `DataLoader` collects from its workers
    in turn, so they arrive in order.
    """

    def __init__(self, plan: Plan, layout: Layout, start: int = 0) -> None:
        self.plan, self.layout, self.start = plan, layout, start

    def __iter__(self) -> Iterator[dict[str, int]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for micro_step in itertools.count(self.start + first, stride):
            places = self.layout.places(micro_step)
            _, numbers = self.plan.locate(places)
            for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
                yield {"position": place, "number": number}


class Decoder:
    """Adds `image` and `label` to what the source hands out."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, sample: dict) -> dict:
        image, label = self.samples[sample["number"]]
        return {"image": image, "label": label, "position": sample["position"]}


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """Samples -> a batch: image uint8 (b, C, H, W), label int64 (b,) if there are classes, position int64 (b,)."""
    batch = {"image": torch.from_numpy(np.stack([sample["image"] for sample in samples]))}
    if samples[0]["label"] is not None:
        batch["label"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
    batch["position"] = torch.tensor([sample["position"] for sample in samples], dtype=torch.int64)
    return batch


def pipeline(source: Source, samples: Samples) -> DataPipeline:
    """The source's samples decoded and batched: one micro-batch after another, without end."""
    batches = batched(source.layout.micro_batch_size, collate, partial=False)
    return DataPipeline(source, mapped(Decoder(samples)), batches)


def ignore_signals(worker: int) -> None:
    """Loader workers get the signals sent to the process group as well; only the trainer is to act on them."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class StreamLoader(DataLoader):
    """A rank's micro-batches, in order and without end, decoded by `num_workers` processes (0: by this one).

    Workers are forked: they share the cache and the pages of the index with this process, start at once, and touch
    no accelerator, which is what forbids forking otherwise.

    Args:
        samples: the decoded samples of a split.
        plan: their order.
        layout: this rank's part of each global batch.
        start: number of micro-batches consumed before, or a function that gives it when an iterator is made.
        num_workers: loader processes.
        pin_memory: put batches into page-locked memory, for faster copies to a GPU.
    """

    def __init__(
        self,
        samples: Samples,
        plan: Plan,
        layout: Layout,
        start: int | Callable[[], int] = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source, self.begin = Source(plan, layout), start
        super().__init__(
            pipeline(self.source, samples),
            batch_size=None,  # the pipeline makes the batches
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.source.start = self.begin() if callable(self.begin) else self.begin
        return super().__iter__()
