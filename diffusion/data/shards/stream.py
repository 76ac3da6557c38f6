"""Samples -> batches, in the order of the plan.

    Source (which samples, in order) -> map (read, decode, put together)          a webdataset pipeline

A batch is

    image     uint8 (b, C, H, W), in any memory layout
    label     int64 (b,), if the data set has classes
    position  int64 (b,): place in the endless stream, step * B + slot, which the training noise is keyed by
    stand_in  bool (b,), if bad samples are skipped: another sample is in the place of one that cannot be decoded

This module knows one rank's part of the work; it does not know who trains on it.
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

PLANNED = 8192  # places that are looked up at once


class Work(NamedTuple):
    """A micro-batch to be made: places in the endless stream and numbers of samples, int64 (b,) each."""

    places: np.ndarray
    numbers: np.ndarray


class Failed(NamedTuple):
    """What a loader process hands over in place of a batch that it could not make."""

    error: Exception


class Source(IterableDataset):
    """This rank's micro-batches to be made, from number `start` on, without end.

    `start` counts the micro-batches consumed before; what lies before it is neither read nor decoded. Of W loader
    workers, worker w serves micro-batches start + w, start + w + W, ...: `DataLoader` collects from its workers in
    turn, so they arrive in order.

    Args:
        plan: the order.
        layout: this rank's slots.
        start: see above.
        announce: told the numbers of the shards that will be read, the first needed first, whenever they change:
            those of the windows this rank's lanes are in, and of their next ones.
    """

    def __init__(
        self, plan: Plan, layout: Layout, start: int = 0, announce: Callable[[list[int]], None] | None = None
    ) -> None:
        self.plan, self.layout, self.start, self.announce = plan, layout, start, announce

    def __iter__(self) -> Iterator[Work]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        block = max(1, PLANNED // self.layout.micro_batch_size)
        news_at = 0  # the global batch at which other shards will be wanted
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
    """Memory in which loader processes hand images over: shared and without a name, so that neither the open files of a
    process nor the room of /dev/shm limit it. To be made before the processes are forked.

    A process uses its SLOTS places in turn. DataLoader asks it for a further batch when one of its PREFETCHED has been
    taken, and that is copied before the next is asked for: a place is not written to again before.
    """

    PREFETCHED = 2  # batches of each process that are made ahead
    SLOTS = PREFETCHED + 1
    _known: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()
    _numbers = itertools.count()

    def __init__(self, workers: int, size: int) -> None:
        self.number, self._size, self._turn = next(self._numbers), size, itertools.count()
        self._bytes = torch.frombuffer(mmap.mmap(-1, max(workers * self.SLOTS * size, 1)), dtype=torch.uint8)
        self._known[self.number] = self
        self.last = 0  # the place that was used last, in bytes

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """The next place of this loader process, uint8."""
        info = get_worker_info()
        self.last = (info.id * self.SLOTS + next(self._turn) % self.SLOTS) * self._size
        return self._bytes[self.last : self.last + math.prod(shape)].view(shape)

    @classmethod
    def view(cls, number: int, at: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        return cls._known[number]._bytes.as_strided(shape, strides, at)


class Sent:
    """A batch on its way from a loader process: small arrays, and where its images are."""

    def __init__(self, slots: Slots, images: Tensor, small: dict[str, np.ndarray]) -> None:
        self.images, self.small = (slots.number, slots.last, images.shape, images.stride()), small

    def taken(self) -> dict[str, Tensor | np.ndarray]:
        return {"image": Slots.view(*self.images).clone()} | self.small

    def pin_memory(self) -> dict[str, Tensor | np.ndarray]:
        """Called by DataLoader's thread for page-locked memory."""
        return {"image": Slots.view(*self.images).pin_memory()} | self.small


class Decoder:
    """Work -> a batch, or what prevented it."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.slots: Slots | None = None  # in a loader process

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
    """Loader workers get the signals sent to the process group as well; only the trainer is to act on them."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _as_it_is(batch: object) -> object:
    return batch


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
        self.source, self.begin = Source(plan, layout, announce=samples.announce), start
        pixels = samples.index.channels * samples.index.image_size**2
        self.decoder, self._size = Decoder(samples), layout.micro_batch_size * pixels
        super().__init__(
            DataPipeline(self.source, mapped(self.decoder)),
            batch_size=None,  # the pipeline makes the batches
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            prefetch_factor=Slots.PREFETCHED if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Raises BadSample, Unreachable, Unwritable, or OSError and MemoryError of a process that has run out of
        something, here, whatever process met it."""
        self.source.start = self.begin() if callable(self.begin) else self.begin
        self.decoder.slots = Slots(self.num_workers, self._size) if self.num_workers else None
        slots = self.decoder.slots  # kept while batches come, whoever else iterates
        batches = super().__iter__()
        known = weakref.ref(batches)

        def end() -> None:
            """Workers heed no SIGTERM, by which multiprocessing would end them, and wait for them without end."""
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
