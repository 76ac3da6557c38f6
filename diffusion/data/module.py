"""The training data of a run, as Lightning asks for them. It knows the Trainer's ranks and step, and no model."""

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
    """What a configuration says of a data set, to be held against its index.

    Args:
        image_size: in pixels. num_classes: 0: the set has no labels, or they are not used.
        rule: how `prepare` makes the set.
    """

    name: str
    image_size: Count
    channels: Count = 3
    num_classes: Number = 0
    rule: dict | None = None


@settings("data")
class ImageShardsDataModule(LightningDataModule):
    """Batches from a folder of shards (`index.json`), each sample once per epoch, in one endless Lightning epoch.

    The loader starts at the step the Trainer stands at when it makes the iterator, `global_step` x micro-batches per
    step, which Lightning restores from a checkpoint before it does so. Loaders have no state of their own to restore.
    The Trainer wants `use_distributed_sampler=False`, `max_epochs=-1` and `max_steps`.

    Args:
        root: the folder of the data set, or the URL of a remote one (`remote`).
        batch_size: images per optimizer step, over all ranks.
        seed: of the run; the order of the samples follows from it.
        split: the split to train on.
        lanes: lanes of the order, a divisor of the batch size; None chooses from the number of shards (`layout`).
        num_workers: processes per rank that read and decode; 0 does it in the training process.
        cache: `auto`, `memory` or `none`: whether decoded images are kept in memory (`stream.Samples`).
        cache_bytes: what `auto` keeps, at most, per rank.
        flip: whether training mirrors images at random. Carried here, done on the device.
        on_bad_sample: `error`, or `skip`: another sample of the shard stands in (`samples.Samples`).
        max_bad_share: share of the split that may be skipped.
        remote: how a remote set is had: arguments of `Remote`; those not given are its defaults.
        digest: the set that `root` must hold (`Index.digest`); None takes any.
        prepare: the command that makes the data set, for the message when it is missing.

    Raises:
        ValueError: a value out of its range. The data set itself is read when `index` is first asked for.
    """

    holds: ClassVar[dict[str, int]] = {}  # what its index must say, of a class for one data set
    drawn = False  # whether its samples are drawn, so that it has no root
    kept_beside = True  # whether what is derived from the set, as features, may be kept beside its shards

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
            raise ValueError(f"data.remote has no {unknown[0]}, only {names}.")
        self.remote = Remote(**(remote or {}))
        self.root, self.batch_size, self.seed, self.split = root, batch_size, seed, split
        self.num_workers, self.cache, self.cache_bytes, self.flip = num_workers, cache, cache_bytes, flip
        self.on_bad_sample, self.max_bad_share = on_bad_sample, max_bad_share
        self.prepare, self.digest = prepare, digest
        self._lanes = lanes

    @cached_property
    def index(self) -> Index:
        """The data set's index, after `prepare_data`. MissingData (a ValueError) when there is none, ValueError when it
        is another set than this class is for or than `digest` says."""
        self.prepare_data()
        index = self.read()
        for key, wanted in self.holds.items():
            if getattr(index, key) != wanted:
                raise ValueError(
                    f"data.root={self.root}: {type(self).__name__} is for a set with {key} {wanted}, this one has "
                    f"{getattr(index, key)}."
                )
        if self.digest not in (None, index.digest):
            raise ValueError(
                f"data.root={self.root} holds another data set ({index.digest[:12]}…) than the one asked for "
                f"(data.digest={self.digest[:12]}…): its images, their order or their shards have changed."
            )
        return index

    @property
    def readable(self) -> bool:
        """Whether the set can be read as it is; False where it has yet to be made."""
        return self.drawn or is_remote(self.root) or (Path(self.root) / INDEX_NAME).is_file()

    def read(self) -> Index:
        """The index as it is found."""
        return read_index(self.root, self.prepare, self.remote)

    @cached_property
    def samples(self) -> Samples:
        """The decoded samples of the split that is trained on, by number."""
        return self.samples_of(self.split)

    def samples_of(self, split: str) -> Samples:
        """The decoded samples of a split, by number. ValueError if the set does not have it."""
        shards = None
        if is_remote(self.root):
            cache = FileCache(self.remote.folder, int(self.remote.gigabytes * 1e9), self.remote)
            shards = CachedShards(self.index, cache)
        checks = (self.on_bad_sample, self.max_bad_share)
        return Samples(self.index, split, self.cache, self.cache_bytes, shards, *checks)

    def look(self, unopened: bool = True) -> None:
        """Look whether the shards are what they were (`Samples.look`). DataChanged if one is not."""
        self.samples.look(unopened)

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
            ValueError: the batch does not divide by the Trainer's ranks x accumulation, or what is in use of a remote
                set at any time does not fit its folder.
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
        """The windows that a machine's lanes are in, and the next ones, must have room in the folder."""
        lanes = min(self.lanes, -(-self.lanes // num_nodes) + 1)
        largest = sorted(shard.bytes for shard in self.index.of_split(self.split))[-2 * WINDOW * lanes :]
        if sum(largest) > self.remote.gigabytes * 1e9:
            raise ValueError(
                f"data.remote.gigabytes={self.remote.gigabytes:g} is too small: {lanes} lanes use up to "
                f"{len(largest)} shards at a time, {sum(largest) / 1e9:.3g} GB. Give more, or fewer data.lanes."
            )
