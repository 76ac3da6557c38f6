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
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import DataPipeline
from webdataset.filters import map as mapped

from diffusion.data.layout import Layout
from diffusion.data.order import Plan
from diffusion.data.remote import Unreachable
from diffusion.data.samples import BadSample, Samples
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


class Decoder:
    """Work -> a batch, or what prevented it."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, work: Work) -> dict[str, Tensor | np.ndarray] | Failed:
        try:
            images, labels, stand_ins = self.samples.batch(work.numbers)
        except (BadSample, Unreachable, Unwritable) as error:
            return Failed(error)
        small = {"position": work.places}  # as arrays: each tensor takes a file of shared memory of its own
        if labels is not None:
            small["label"] = labels.numpy()
        if stand_ins is not None:
            small["stand_in"] = stand_ins.numpy()
        return {"image": images} | small


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
        super().__init__(
            DataPipeline(self.source, mapped(Decoder(samples))),
            batch_size=None,  # the pipeline makes the batches
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Raises BadSample, Unreachable or Unwritable here, whatever process met it."""
        self.source.start = self.begin() if callable(self.begin) else self.begin
        batches = super().__iter__()
        known = weakref.ref(batches)

        def end() -> None:
            """Workers heed no SIGTERM, by which multiprocessing would end them, and wait for them without end."""
            if self.num_workers and (left := known()) is not None:
                left._shutdown_workers()

        atexit.register(end)
        try:
            for batch in batches:
                if isinstance(batch, Failed):
                    raise batch.error
                yield {key: v if isinstance(v, Tensor) else torch.from_numpy(v) for key, v in batch.items()}
        finally:
            atexit.unregister(end)
            end()
