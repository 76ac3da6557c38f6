"""The loss on held-out images, which detects overfitting.

It is the training loss of the raw weights, like train/loss, but in evaluation mode, without mirrored images and without
label dropout. Every measurement uses the same images, noise levels and noise. So two measurements differ by the weights
only. The result is the same on any number of ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.changes import DataChanged
from diffusion.data.shards.index import check_splits
from diffusion.data.shards.samples import Samples
from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.images import from_uint8
from diffusion.noise import Stream, keys, normal, permutation
from diffusion.settings import Count, Number, settings
from diffusion.training.module import QUARTILES, DiffusionModule, by_quartile

COLUMNS = ("held_out/loss", *(f"held_out/loss_q{i}" for i in range(1, QUARTILES + 1)))


@settings("held_out")
@dataclass(frozen=True)
class HeldOut:
    """Settings of the held-out loss.

    Args:
        every_steps: steps between two measurements; there is one more at the end. 0 means never.
        split: split of the data set. None means validation, or else test; without either, nothing is measured.
        num_images: images of the split that are measured, chosen by the seed of the run; None means all.
        batch_size: images per batch, on each process.
    """

    every_steps: Number = 1000
    split: str | None = None
    num_images: Count | None = 2048
    batch_size: Count = 256


class HeldOutLoss:
    """Measures the held-out loss of a run.

    Args:
        module: the module in training.
        split: name of the split.
        samples: images of the split.
        numbers: numbers of the images to measure, int64 (N,).
        batch_size: images per batch.
        place, ranks: device and ranks of this process.
    """

    def __init__(
        self,
        module: DiffusionModule,
        split: str,
        samples: Samples,
        numbers: NDArray[np.int64],
        batch_size: int,
        place: Place,
        ranks: Ranks,
    ) -> None:
        self.module, self.split, self.samples, self.numbers = module, split, samples, numbers
        self.batch_size, self.place, self.ranks = batch_size, place, ranks

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The mean loss of all images and of each quartile of t, by COLUMNS, on all ranks.

        A quartile without images is left out.

        Raises:
            Abandoned: a rank has got a signal.
            BadSample, Unreachable: an image cannot be read.
        """
        batches = np.split(self.numbers, range(self.batch_size, len(self.numbers), self.batch_size))
        own = torch.zeros(2, len(COLUMNS), dtype=torch.float64, device=self.place.device)
        with self.ranks.together():
            for k in self.ranks.share(len(batches)):
                self.ranks.attend()
                own += self._sums(batches[k])
        collected = self.ranks.from_main(self.ranks.collected(own.cpu()))
        sums, counts = torch.stack(collected).sum(0).tolist()
        return {name: total / n for name, total, n in zip(COLUMNS, sums, counts, strict=True) if n}

    def _sums(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        module, device = self.module, self.place.device
        try:
            images, labels, *_ = self.samples.batch(numbers)
        except DataChanged as error:
            error.since = None  # these images are not trained on, so all checkpoints remain valid
            raise
        at = torch.from_numpy(numbers).to(device)
        x0 = from_uint8(images.to(device)).contiguous(memory_format=self.place.memory_format)
        labels = None if labels is None or module.network.null_label is None else labels.to(device)
        t = module.levels.draw(keys(at, module.seed, Stream.HELD_OUT, 0))
        epsilon = normal(keys(at, module.seed, Stream.HELD_OUT, 1), x0.shape[1:])
        with self.place.autocast():
            loss = module.loss(x0, labels, t, epsilon)
        return by_quartile(loss, t, module.num_timesteps)


def chosen(count: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """The numbers, ascending, of the images to measure in a split of `count` images."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(permutation(count, seed, Stream.HELD_OUT)[:wanted])


def split_of(held_out: HeldOut, data: ImageShardsDataModule) -> str | None:
    """The split to measure; None if the measurement is switched off or the data set has no split for it.

    Raises:
        ValueError: held_out.split does not exist, or is the training split.
    """
    if not held_out.every_steps:
        return None
    if held_out.split is None:
        return data.index.held_out_from(data.split)
    of = f"the set {data.index.name}" if data.drawn else f"the set in data.root={data.root}"
    check_splits(data.index.splits, of, data.split, held_out.split)
    return held_out.split


def held_out_loss(
    held_out: HeldOut, module: DiffusionModule, data: ImageShardsDataModule, place: Place, ranks: Ranks
) -> HeldOutLoss | None:
    """The held-out measurement of a run; None and ValueError as in `split_of`."""
    if (split := split_of(held_out, data)) is None:
        return None
    numbers = chosen(data.index.count(split), held_out.num_images, module.seed)
    return HeldOutLoss(module, split, data.samples_of(split), numbers, held_out.batch_size, place, ranks)
