"""The LightningDataModule of a run. It knows the ranks and the step of the Trainer; it knows no model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pytorch_lightning import LightningDataModule

from diffusion.data.shards.index import INDEX_NAME, Index, read_index
from diffusion.data.shards.layout import Layout, check_lanes, choose_lanes
from diffusion.data.shards.order import WINDOW, Plan
from diffusion.data.shards.readers import CachedShards
from diffusion.data.shards.remote import FileCache, Remote, is_remote
from diffusion.data.shards.samples import CACHE_BYTES, Samples
from diffusion.data.shards.stream import StreamLoader
from diffusion.settings import Between, Count, Number, Seed, Share, settings


@settings("data")
@dataclass(frozen=True)
class Described:
    """The description of a data set in the configuration, which is compared with the index of the set.

    Args:
        name: name of the set.
        image_size: side of the images in pixels.
        channels: channels of the images.
        num_classes: number of classes; 0 if the set has no labels or they are not used.
        rule: settings with which `prepare` creates the set.
    """

    name: str
    image_size: Count
    channels: Count = 3
    num_classes: Number = 0
    rule: dict | None = None


@settings("data")
class ImageShardsDataModule(LightningDataModule):
    """Batches from a folder of shards with an `index.json`. Each sample occurs once per epoch.

    For Lightning the data are one endless epoch. When the Trainer creates the iterator, the loader starts at
    micro-batch `global_step` x micro-batches per step. Lightning restores `global_step` from a checkpoint before that,
    so the loader has no state of its own. The Trainer needs `use_distributed_sampler=False`, `max_epochs=-1` and
    `max_steps`.

    Args:
        root: the folder of the data set, or the URL of a remote one (`remote`).
        batch_size: images per optimizer step, over all ranks.
        seed: seed of the run, which determines the order of the samples.
        split: the split to train on.
        lanes: number of lanes of the order, a divisor of the batch size; None chooses it from the number of shards
            (`layout`).
        num_workers: processes per rank that read and decode; 0 means the training process itself.
        cache: `auto`, `memory` or `none`: whether decoded images are kept in memory (`samples.Samples`).
        cache_bytes: largest size of the cache with `auto`, per rank.
        flip: whether training mirrors images at random; the training module does it on the device.
        on_bad_sample: `error`, or `skip`: use another sample of the shard instead (`samples.Samples`).
        max_bad_share: largest share of the split that may be skipped.
        remote: settings for a remote set: arguments of `Remote`; the others have their defaults.
        digest: the `Index.digest` that the set in `root` must have; None accepts any.
        prepare: the command that creates the data set, for the message when it is missing.

    Raises:
        ValueError: a value is out of its range. The data set itself is read on the first access of `index`.
    """

    holds: ClassVar[dict[str, int]] = {}  # values that the index must have, for a class of one data set
    drawn = False  # whether the samples are made in memory; such a set has no root
    kept_beside = True  # whether derived data, such as features, may be stored beside the shards

    def __init__(
        self,
        root: str | os.PathLike | None,
        batch_size: Count,
        seed: Seed = 0,
        split: str = "train",
        lanes: Count | None = None,
        num_workers: Annotated[int, Between(0, 1024)] = 0,
        cache: Literal["auto", "memory", "none"] = "auto",
        cache_bytes: int = CACHE_BYTES,
        flip: bool = False,
        on_bad_sample: Literal["error", "skip"] = "error",
        max_bad_share: Share = 0.01,
        remote: Mapping[str, str | float] | None = None,
        digest: str | None = None,
        prepare: str | None = None,
    ) -> None:
        super().__init__()
        if root is None and not self.drawn:
            raise ValueError("data.root=null: a value is needed, a folder or an address.")
        if lanes is not None:
            check_lanes(lanes, batch_size)
        if unknown := sorted(set(remote or ()) - {field.name for field in fields(Remote)}):
            names = ", ".join(field.name for field in fields(Remote))
            raise ValueError(f"data.remote.{unknown[0]} is not a setting. The settings of data.remote are {names}.")
        self.remote = Remote(**(remote or {}))
        self.root, self.batch_size, self.seed, self.split = root, batch_size, seed, split
        self.num_workers, self.cache, self.cache_bytes, self.flip = num_workers, cache, cache_bytes, flip
        self.on_bad_sample, self.max_bad_share = on_bad_sample, max_bad_share
        self.prepare, self.digest = prepare, digest
        self._lanes = lanes

    @cached_property
    def index(self) -> Index:
        """The index of the data set, after `prepare_data`.

        Raises:
            MissingData: there is no data set (a ValueError).
            ValueError: the set does not fit this class or `digest`.
        """
        self.prepare_data()
        index = self.read()
        for key, wanted in self.holds.items():
            if getattr(index, key) != wanted:
                raise ValueError(
                    f"data.root={self.root}: {type(self).__name__} needs a set with {key}={wanted}, but this one has "
                    f"{key}={getattr(index, key)}."
                )
        if self.digest not in (None, index.digest):
            raise ValueError(
                f"data.root={self.root} holds another data set ({index.digest[:12]}…) than "
                f"data.digest={self.digest[:12]}…: its images, their order or their shards have changed. Restore the "
                f"set, or start a new run with another run_dir."
            )
        return index

    @property
    def readable(self) -> bool:
        """Whether the set exists; False if it must be created first."""
        return self.drawn or is_remote(self.root) or (Path(self.root) / INDEX_NAME).is_file()

    def read(self) -> Index:
        """Read the index, without comparing it with the settings."""
        return read_index(self.root, self.prepare, self.remote)

    @cached_property
    def samples(self) -> Samples:
        """The decoded samples of the training split, by number."""
        return self.samples_of(self.split)

    def samples_of(self, split: str) -> Samples:
        """The decoded samples of a split, by number. Raises ValueError if the set does not have this split."""
        shards = None
        if is_remote(self.root):
            cache = FileCache(self.remote.folder, int(self.remote.gigabytes * 1e9), self.remote)
            shards = CachedShards(self.index, cache)
        checks = (self.on_bad_sample, self.max_bad_share)
        return Samples(self.index, split, self.cache, self.cache_bytes, shards, *checks)

    def look(self, unopened: bool = True) -> None:
        """Check that the shards have not changed (`Samples.look`). Raises DataChanged if one has."""
        self.samples.look(unopened)

    @property
    def num_images(self) -> int:
        """Number of images of the training split, which is one epoch."""
        return self.index.count(self.split)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.index.image_size

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.index.channels

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for images without labels."""
        return self.index.classes

    @property
    def lanes(self) -> int:
        """Number of lanes of the order. It affects the order of the samples, so the run records it."""
        return self._lanes or choose_lanes(len(self.index.of_split(self.split)), self.batch_size)

    def plan(self) -> Plan:
        """The order of the samples."""
        return Plan(self.samples.counts, self.batch_size, self.lanes, self.seed)

    def train_dataloader(self) -> StreamLoader:
        """The micro-batches of this rank, from the step of the Trainer on.

        Raises:
            ValueError: the batch size is not divisible by ranks x accumulation, or the shards of a remote set that are
                in use at the same time do not fit into data.remote.gigabytes.
        """
        trainer = self.trainer
        if is_remote(self.root):
            self._check_room(trainer.num_nodes)
        layout = Layout(self.batch_size, trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
        return StreamLoader(
            self.samples,
            self.plan(),
            layout,
            start=lambda: trainer.global_step * layout.accumulate,
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def _check_room(self, num_nodes: int) -> None:
        """Check that the current and the next windows of the lanes of one machine fit into the folder."""
        lanes = min(self.lanes, -(-self.lanes // num_nodes) + 1)
        largest = sorted(shard.bytes for shard in self.index.of_split(self.split))[-2 * WINDOW * lanes :]
        if sum(largest) > self.remote.gigabytes * 1e9:
            raise ValueError(
                f"data.remote.gigabytes={self.remote.gigabytes:g} is too small: {lanes} lanes use up to "
                f"{len(largest)} shards at the same time, {sum(largest) / 1e9:.3g} GB. Give a larger value, or a "
                "smaller data.lanes."
            )
