"""Training data from arrays in memory instead of shards on disk.

    class MyImages(ArraysDataModule):
        def arrays(self, split):
            return images, labels          # uint8 (N, C, H, W), int64 (N,) or None

Such a set has no folder (`data.root=null`). Batches, their order and resuming are those of a set of shards.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable
from functools import cache
from typing import ClassVar, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import Index, Shard
from diffusion.data.shards.samples import Samples
from diffusion.settings import Count, Seed, settings

SAMPLES_OF_A_SHARD = 4096  # samples per shard, for the order of the samples


class NoShards:
    """Implements `shards.readers.Shards` for a set that has no files."""

    def open(self, shard: Shard) -> NoReturn:
        raise AssertionError(f"{shard.path} is not on disk")

    def announce(self, shards: list[Shard]) -> None: ...

    def wrong(self, shard: Shard, afresh: bool = False) -> None: ...

    def glance(self) -> None: ...

    def look(self, shards: Iterable[Shard], unopened: bool) -> None: ...


class ArraySamples(Samples):
    """Samples that are in memory from the start.

    Args:
        index: the index of the set, whose shards are never opened.
        split: the split. images: uint8 (N, C, H, W). labels: int64 (N,), or None in a set without labels.
    """

    def __init__(self, index: Index, split: str, images: Tensor, labels: Tensor | None) -> None:
        super().__init__(index, split, cache="memory", shards=NoShards())
        self._cache.images.copy_(images)
        if labels is not None:
            self._cache.labels.copy_(labels)
        self._cache.known[:] = True


@settings("data")
class ArraysDataModule(ImageShardsDataModule):
    """Batches of images that a subclass returns as arrays.

    A subclass implements `arrays`. Its `__init__` may take further settings; it calls that of this class.

    Args:
        batch_size, seed, split, lanes, flip, digest: as in `ImageShardsDataModule`.
        root: must be None, as the set is in no folder.

    Raises:
        ValueError: a value is out of its range; when the index is first used, what `arrays` returns is not allowed.
    """

    drawn = True
    splits: ClassVar[tuple[str, ...]] = ("train",)  # splits of the set

    def __init__(
        self,
        batch_size: Count,
        seed: Seed = 0,
        split: str = "train",
        lanes: Count | None = None,
        flip: bool = False,
        root: str | None = None,
        digest: str | None = None,
    ) -> None:
        super().__init__(root, batch_size, seed=seed, split=split, lanes=lanes, flip=flip, digest=digest)
        if root is not None:
            raise ValueError(f"data.root={root}: {type(self).__name__} takes its images from no folder. Leave it out.")
        self._arrays = cache(self._checked_arrays)

    @abstractmethod
    def arrays(self, split: str) -> tuple[ArrayLike, ArrayLike | None]:
        """Return the images of a split, uint8 (N, C, H, W) with H = W, and their labels, int (N,), or None.

        The same split must always have the same images, on every process.
        """

    def _checked_arrays(self, split: str) -> tuple[Tensor, Tensor | None]:
        given, labels = self.arrays(split)
        images, name = torch.as_tensor(np.asarray(given)), f"{type(self).__name__}.arrays({split!r})"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3] or not len(images):
            shape = tuple(images.shape)
            raise ValueError(f"{name} returned {images.dtype} {shape}, expected uint8 (N, C, H, W) with H = W, N > 0.")
        if labels is None:
            return images.contiguous(), None
        found = torch.as_tensor(np.asarray(labels)).long()
        if found.shape != images.shape[:1] or found.min() < 0:
            raise ValueError(f"{name} returned labels {tuple(found.shape)}, expected {len(images)} labels from 0 on.")
        return images.contiguous(), found

    def samples_of(self, split: str) -> ArraySamples:
        """The samples of a split, by number."""
        self.index.of_split(split)  # refuses one that does not exist
        return ArraySamples(self.index, split, *self._arrays(split))

    def read(self) -> Index:
        """The index that shards of these samples would have. The sha256 of a shard is that of its samples."""
        shards, classes, shape = [], 0, (0, 0)
        for split in self.splits:
            images, labels = self._arrays(split)
            shape = images.shape[1], images.shape[2]
            classes = max(classes, 0 if labels is None else int(labels.max()) + 1)
            for number, start in enumerate(range(0, len(images), SAMPLES_OF_A_SHARD)):
                part = slice(start, start + SAMPLES_OF_A_SHARD)
                digest = hashlib.sha256(images[part].numpy().tobytes())
                if labels is not None:
                    digest.update(labels[part].numpy().tobytes())
                size, sha256 = images[part].numel(), digest.hexdigest()
                shards.append(Shard(f"{split}-{number:05d}", split, len(images[part]), size, sha256, sha256))
        return Index("memory", self.name, shape[1], shape[0], classes, tuple(shards))

    @property
    def name(self) -> str:
        """The name of the set."""
        return type(self).__name__
