"""Batches of samples, in the order of the plan.

    Source (which samples, in order) -> map (read, decode, collate)          a webdataset pipeline

A batch is

    image     uint8 (b, C, H, W), in any memory layout
    label     int64 (b,), if the data set has classes
    position  int64 (b,): place in the endless stream, step * B + slot, from which the training noise is computed
    stand_in  bool (b,), if bad samples are skipped: whether this sample replaces one that cannot be decoded

This module knows the part of one rank. It does not know the training.
"""

import atexit
import itertools
import math
import mmap
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import DataPipeline
from webdataset.filters import map as mapped

from diffusion.data.shards.layout import Layout
from diffusion.data.shards.order import Plan
from diffusion.data.shards.remote import Unreachable
from diffusion.data.shards.samples import BadSample, Samples
from diffusion.files import Unwritable

PLANNED = 8192  # places that are looked up in one call


class Work(NamedTuple):
    """A micro-batch to be read: places in the endless stream and numbers of samples, int64 (b,) each."""

    places: np.ndarray
    numbers: np.ndarray


class Failed(NamedTuple):
    """What a loader process returns instead of a batch that it could not read."""

    error: Exception


class Source(IterableDataset):
    """The endless sequence of micro-batches of this rank, from number `start` on.

    Micro-batches before `start` are neither read nor decoded. With W loader workers, worker w serves micro-batches
    start + w, start + w + W, ... `DataLoader` takes batches from its workers in turn, so that they arrive in order.

    Args:
        plan: the order.
        layout: the slots of this rank.
        start: number of micro-batches consumed before.
        announce: called with the numbers of the shards that will be read, in the order in which they are needed,
            whenever they change. They are those of the current and the next windows of this rank's lanes.
    """

    def __init__(
        self, plan: Plan, layout: Layout, start: int = 0, announce: Callable[[list[int]], None] | None = None
    ) -> None:
        self.plan, self.layout, self.start, self.announce = plan, layout, start, announce

    def __iter__(self) -> Iterator[Work]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        block = max(1, PLANNED // self.layout.micro_batch_size)
        news_at = 0  # the global batch at which the shards change
        for begin in itertools.count(self.start + first, stride * block):
            micro_steps = range(begin, begin + stride * block, stride)
            places = np.stack([self.layout.places(micro_step) for micro_step in micro_steps])
            _, numbers = self.plan.locate(places)
            for micro_step, row, samples in zip(micro_steps, places, numbers, strict=True):
                step = micro_step // self.layout.accumulate
                if self.announce and step >= news_at:
                    shards, batches = self.plan.ahead(self.layout.slots(step))
                    self.announce(shards)
                    news_at = step + batches
                yield Work(row, samples)


class Slots:
    """Shared memory through which loader processes pass images.

    It is anonymous, so that it is not limited by the number of open files or the size of /dev/shm. Create it before the
    processes are forked.

    A process uses its SLOTS places in turn. DataLoader requests a further batch from a process after one of its
    PREFETCHED batches has been taken and copied. So no place is overwritten before it has been copied.
    """

    PREFETCHED = 2  # batches that each process prepares ahead
    SLOTS = PREFETCHED + 1
    _known: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, workers: int, size: int) -> None:
        self.number, self._size, self._turn = next(self._numbers), size, itertools.count()
        self._bytes = torch.frombuffer(mmap.mmap(-1, max(workers * self.SLOTS * size, 1)), dtype=torch.uint8)
        self._known[self.number] = self
        self.last = 0  # offset in bytes of the last place used

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """The next place of this loader process, as a uint8 tensor of this shape."""
        info = get_worker_info()
        self.last = (info.id * self.SLOTS + next(self._turn) % self.SLOTS) * self._size
        return self._bytes[self.last : self.last + math.prod(shape)].view(shape)

    @classmethod
    def view(cls, number: int, at: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """The images at offset `at` in the memory with this number."""
        return cls._known[number]._bytes.as_strided(shape, strides, at)


class Sent:
    """A batch sent by a loader process: small arrays, and the place of its images in the shared memory."""

    def __init__(self, slots: Slots, images: Tensor, small: dict[str, np.ndarray]) -> None:
        self.images, self.small = (slots.number, slots.last, images.shape, images.stride()), small

    def taken(self) -> dict[str, Tensor | np.ndarray]:
        """The batch, with a copy of the images."""
        return {"image": Slots.view(*self.images).clone()} | self.small

    def pin_memory(self) -> dict[str, Tensor | np.ndarray]:
        """The batch, with the images copied to page-locked memory. Called by the pinning thread of DataLoader."""
        return {"image": Slots.view(*self.images).pin_memory()} | self.small


class Decoder:
    """Reads and decodes a micro-batch: Work -> a batch, or the error."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.slots: Slots | None = None  # only with loader processes

    def __call__(self, work: Work) -> dict[str, Tensor | np.ndarray] | Sent | Failed:
        try:
            images, labels, stand_ins = self.samples.batch(work.numbers, *((self.slots.room,) if self.slots else ()))
        except (BadSample, Unreachable, Unwritable, OSError, MemoryError) as error:
            return Failed(error)
        small = {"position": work.places}
        if labels is not None:
            small["label"] = labels.numpy()
        if stand_ins is not None:
            small["stand_in"] = stand_ins.numpy()
        return Sent(self.slots, images, small) if self.slots else {"image": images} | small


def ignore_signals(worker: int) -> None:
    """Ignore signals in a loader worker. Signals reach the whole process group, but only the trainer handles them."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _as_it_is(batch: object) -> object:
    return batch


class StreamLoader(DataLoader):
    """The endless sequence of micro-batches of a rank, decoded by `num_workers` processes (0: by this process).

    Workers are forked. They start at once and share the cache and the index with this process. Forking is safe here,
    because the workers do not use the accelerator.

    Args:
        samples: the decoded samples of a split.
        plan: the order of the samples.
        layout: the part of this rank in each global batch.
        start: number of micro-batches consumed before, or a function that returns it when an iterator is created.
        num_workers: number of loader processes.
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
        self.source, self.begin = Source(plan, layout, announce=samples.announce), start
        pixels = samples.index.channels * samples.index.image_size**2
        self.decoder, self._size = Decoder(samples), layout.micro_batch_size * pixels
        super().__init__(
            DataPipeline(self.source, mapped(self.decoder)),
            batch_size=None,  # the pipeline collates the batches
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            prefetch_factor=Slots.PREFETCHED if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Iterate over the batches.

        Raises:
            BadSample, Unreachable, Unwritable, OSError, MemoryError: in this process, also if it occurred in a worker.
        """
        self.source.start = self.begin() if callable(self.begin) else self.begin
        self.decoder.slots = Slots(self.num_workers, self._size) if self.num_workers else None
        slots = self.decoder.slots  # keep this memory while this iterator is in use
        batches = super().__iter__()
        known = weakref.ref(batches)

        def end() -> None:
            """End the workers. They ignore SIGTERM, so that multiprocessing would wait for them for ever."""
            if slots and (left := known()) is not None:
                left._shutdown_workers()

        atexit.register(end)
        try:
            for batch in batches:
                if isinstance(batch, Failed):
                    raise batch.error
                if isinstance(batch, Sent):
                    batch = batch.taken()
                yield {key: v if isinstance(v, Tensor) else torch.from_numpy(v) for key, v in batch.items()}
        finally:
            atexit.unregister(end)
            end()
