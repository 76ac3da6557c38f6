"""Training data drawn from a mixture whose score is known (`process.toy.SETS`). Nothing is on disk.

A point of C numbers is an image of one pixel with C channels, uint8 like every image. Rounding to levels 2/255 apart
adds a variance of (2/255)^2 / 12 to each number, which is a standard deviation of 0.0023.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Literal, NoReturn

import torch
from torch import Tensor

from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import Index, Shard
from diffusion.data.shards.samples import Samples
from diffusion.images import to_uint8
from diffusion.noise import Stream, seed63
from diffusion.process.toy import SETS, Mixture
from diffusion.settings import Count, Seed, settings

POINTS_OF_A_SHARD = 4096  # points per shard, for the order of the samples


class NoShards:
    """Implements `shards.readers.Shards` for a set that has no files."""

    def open(self, shard: Shard) -> NoReturn:
        raise AssertionError(f"{shard.path} is not on disk")

    def announce(self, shards: list[Shard]) -> None: ...

    def wrong(self, shard: Shard, afresh: bool = False) -> None: ...

    def glance(self) -> None: ...

    def look(self, shards: Iterable[Shard], unopened: bool) -> None: ...


class DrawnSamples(Samples):
    """Samples that are in memory from the start.

    Args:
        index: the index of the set, whose shards are never opened.
        images: uint8 (N, C, H, W).
    """

    def __init__(self, index: Index, images: Tensor) -> None:
        super().__init__(index, cache="memory", shards=NoShards())
        self._cache.images.copy_(images)
        self._cache.known[:] = True


@settings("data")
class MixtureDataModule(ImageShardsDataModule):
    """Batches of points of a mixture, without labels. The order is that of a data set of shards.

    Args:
        toy: a name in `process.toy.SETS`.
        num_points: number of points, which is one epoch. The points depend on `toy` and `num_points` only.
        batch_size, seed, lanes, digest: as in `ImageShardsDataModule`.
        flip: must be False, because a point cannot be mirrored.
        root: must be None, because there is no folder.

    Raises:
        ValueError: toy is unknown, or a value is out of its range.
    """

    drawn = True

    def __init__(
        self,
        toy: Literal["modes", "rings", "moons", "checkerboard"],
        num_points: Count,
        batch_size: Count,
        seed: Seed = 0,
        lanes: Count | None = None,
        flip: bool = False,
        root: str | None = None,
        digest: str | None = None,
    ) -> None:
        super().__init__(root, batch_size, seed=seed, lanes=lanes, flip=flip, digest=digest)
        if flip:
            raise ValueError("data.flip=true: points of a mixture cannot be mirrored. Give data.flip=false.")
        self.toy, self._num_points = toy, num_points

    @cached_property
    def mixture(self) -> Mixture:
        """The mixture from which the points are drawn."""
        return SETS[self.toy]()

    @cached_property
    def points(self) -> Tensor:
        """All points, uint8 (N, C, 1, 1)."""
        generator = torch.Generator().manual_seed(seed63(0, Stream.SAMPLES))
        return to_uint8(self.mixture.sample(self._num_points, generator))[..., None, None]

    def samples_of(self, split: str) -> DrawnSamples:
        """The points, by number; the same for every split."""
        return DrawnSamples(self.index, self.points)

    def read(self) -> Index:
        """The index of a set of these points. The sha256 of a shard is that of its points."""
        shards = []
        for number, points in enumerate(self.points.split(POINTS_OF_A_SHARD)):
            digest = hashlib.sha256(points.numpy().tobytes()).hexdigest()
            shards.append(Shard(f"train-{number:05d}", "train", len(points), points.numel(), digest, digest))
        return Index("memory", self.toy, image_size=1, channels=self.points.shape[1], classes=0, shards=tuple(shards))
