"""Training data drawn from a mixture whose score is known (`process.toy.SETS`). Nothing is on disk.

A point of C numbers is an image of one pixel with C channels, uint8 like every image. Rounding to levels 2/255 apart
adds a variance of (2/255)^2 / 12 to each number, which is a standard deviation of 0.0023.
"""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffusion.data.memory import ArraysDataModule
from diffusion.images import to_uint8
from diffusion.noise import Stream, seed63
from diffusion.process.toy import SETS, Mixture
from diffusion.settings import Count, Seed, settings


@settings("data")
class MixtureDataModule(ArraysDataModule):
    """Batches of points of a mixture, without labels. The order is that of a data set of shards.

    Args:
        toy: a name in `process.toy.SETS`.
        num_points: number of points, which is one epoch. The points depend on `toy` and `num_points` only.
        batch_size, seed, lanes, digest: as in `ImageShardsDataModule`.
        flip: must be False, because a point cannot be mirrored.
        root: must be None, as the set is in no folder.

    Raises:
        ValueError: toy is unknown, or a value is out of its range.
    """

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
        super().__init__(batch_size, seed=seed, lanes=lanes, flip=flip, root=root, digest=digest)
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

    def arrays(self, split: str) -> tuple[Tensor, None]:
        """The points, without labels."""
        return self.points, None

    @property
    def name(self) -> str:
        """The name of the mixture."""
        return self.toy
