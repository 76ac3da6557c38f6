"""The training data of a run, as Lightning asks for them. It knows the Trainer's ranks and step, and no model."""

import os
from functools import cached_property

from pytorch_lightning import LightningDataModule

from diffusion.data.index import Index, read_index
from diffusion.data.layout import Layout, check_batch, check_lanes, choose_lanes
from diffusion.data.order import Plan
from diffusion.data.stream import CACHE_BYTES, CACHES, Samples, StreamLoader


class ImageShardsDataModule(LightningDataModule):
    """Batches from a folder of shards (`index.json`), each sample once per epoch, in one endless Lightning epoch.

    The loader starts at the step the Trainer stands at when it makes the iterator, `global_step` x micro-batches per
    step, which Lightning restores from a checkpoint before it does so. Loaders have no state of their own to restore.
    The Trainer wants `use_distributed_sampler=False`, `max_epochs=-1` and `max_steps`.

    Args:
        root: the folder of the data set.
        batch_size: images per optimizer step, over all ranks.
        seed: of the run; the order of the samples follows from it.
        split: the split to train on.
        lanes: lanes of the order, a divisor of the batch size; None chooses from the number of shards (`layout`).
        num_workers: processes per rank that read and decode; 0 does it in the training process.
        cache: `auto`, `memory` or `none`: whether decoded images are kept in memory (`stream.Samples`).
        cache_bytes: what `auto` keeps, at most, per rank.
        flip: whether training mirrors images at random. Carried here, done on the device.
        prepare: the command that makes the data set, for the message when it is missing.

    Raises:
        ValueError: a value out of its range. The data set itself is read when `index` is first asked for.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        batch_size: int,
        seed: int = 0,
        split: str = "train",
        lanes: int | None = None,
        num_workers: int = 0,
        cache: str = "auto",
        cache_bytes: int = CACHE_BYTES,
        flip: bool = False,
        prepare: str | None = None,
    ) -> None:
        super().__init__()
        check_batch(batch_size, ranks=1)
        if lanes is not None:
            check_lanes(lanes, batch_size)
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} is negative: 0 decodes in the training process.")
        if cache not in CACHES:
            raise ValueError(f"data.cache={cache} is not one of {', '.join(CACHES)}.")
        self.root, self.batch_size, self.seed, self.split = root, batch_size, seed, split
        self.num_workers, self.cache, self.cache_bytes, self.flip = num_workers, cache, cache_bytes, flip
        self.prepare = prepare
        self._lanes = lanes

    @cached_property
    def index(self) -> Index:
        """The data set's index, after `prepare_data`. MissingData (a ValueError) when there is none."""
        self.prepare_data()
        return read_index(self.root, self.prepare)

    @cached_property
    def samples(self) -> Samples:
        """The decoded samples of the split, by number."""
        return Samples(self.index, self.split, self.cache, self.cache_bytes)

    @property
    def num_images(self) -> int:
        """Images in the split, which is one epoch."""
        return self.index.count(self.split)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.index.image_size

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.index.channels

    @property
    def num_classes(self) -> int:
        """Classes; 0 for images without labels."""
        return self.index.classes

    @property
    def lanes(self) -> int:
        """Lanes of the order: part of what a run's samples follow from, to be recorded with it."""
        return self._lanes or choose_lanes(len(self.index.of_split(self.split)), self.batch_size)

    def plan(self) -> Plan:
        """The order of the samples."""
        return Plan(self.samples.counts, self.batch_size, self.lanes, self.seed)

    def train_dataloader(self) -> StreamLoader:
        """This rank's micro-batches from the Trainer's step on.

        Raises:
            ValueError: the batch does not divide by the Trainer's ranks x accumulation.
        """
        trainer = self.trainer
        layout = Layout(self.batch_size, trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
        return StreamLoader(
            self.samples,
            self.plan(),
            layout,
            start=lambda: trainer.global_step * layout.accumulate,
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
