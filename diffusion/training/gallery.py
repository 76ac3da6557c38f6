"""The images of a sampling in a folder, a file a batch: made by all ranks, each its share, and gone on with after an
interruption.

    images_00000256_256.npz           uint8 (b, H, W, C) of the images from number 256 on, and the work they took
    features_00000256_256_NAME.npz    what an extractor sees in them

Which images make a batch depends on the batch size alone, so ranks change no bit of them.
"""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.files import replacing
from diffusion.metrics.extractors import Extractor, Features
from diffusion.training.pictures import grid, save_png
from diffusion.training.pieces import Pieces
from diffusion.training.ranks import Ranks
from diffusion.training.sampling import Sampling

STAMP = (1980, 1, 1, 0, 0, 0)  # of the members of an .npz: the same images make the same bytes


class Gallery:
    """Images 0 ... num_images - 1 of a sampling.

    Args:
        folder: for this alone; made when it is needed.
        sampling: how the images are made.
        num_images: at least 1.
        model: which model makes them, as JSON: with the sampling it decides them.
        ranks: who makes them.
    """

    def __init__(self, folder: Path, sampling: Sampling, num_images: int, model: dict[str, Any], ranks: Ranks) -> None:
        self.sampling, self.num_images = sampling, num_images
        self.pieces = Pieces(folder, {"model": model, "sampling": sampling.identity()}, ranks)
        self.firsts = range(0, num_images, sampling.batch_size)  # number of the first image of each batch

    # ---- making ----

    def make(self, extractor: Extractor | None = None, title: str = "sampling") -> None:
        """All that is not there yet, by all ranks; each calls it, and it returns when the last is done.

        Raises:
            Abandoned: a rank has been told to stop. What is made stays.
        """
        sizes = [self._count(first) for first in self.firsts]
        self.pieces.make(sizes, lambda number: self._make(self.firsts[number], extractor), title)

    def _make(self, first: int, extractor: Extractor | None) -> bool:
        """One batch, if it is not there; and its features, if these are not."""
        name, new = self._images(first), not self.pieces.there(self._images(first))
        if new:
            before = self.sampling.counted.rows
            images = self.sampling.images(torch.arange(first, first + self._count(first)))
            work = np.int64(self.sampling.counted.rows - before)
            self.pieces.write(name, {"images": images.permute(0, 2, 3, 1).numpy(), "work": work})
        if extractor is not None and not self.pieces.there(self._features(first, extractor)):
            found = extractor.rows(images if new else self._batch(first), first)
            arrays = {"pooled": found.pooled.numpy(), "logits": found.logits.numpy()}
            self.pieces.write(self._features(first, extractor), arrays)
        return new

    def _count(self, first: int) -> int:
        return min(self.sampling.batch_size, self.num_images - first)

    def _images(self, first: int) -> str:
        return f"images_{first:08d}_{self._count(first)}"

    def _features(self, first: int, extractor: Extractor) -> str:
        return f"features_{first:08d}_{self._count(first)}_{extractor.name}_{extractor.digest[:16]}"

    def _batch(self, first: int) -> Tensor:
        """uint8 (b, C, H, W)."""
        return torch.from_numpy(self.pieces.read(self._images(first))["images"]).permute(0, 3, 1, 2)

    # ---- what was made, for one rank ----

    def batches(self) -> Iterator[Tensor]:
        """All images in order, uint8 (b, C, H, W)."""
        return map(self._batch, self.firsts)

    def images(self, most: int) -> Tensor:
        """The first images, at most so many."""
        found: list[Tensor] = []
        for batch in self.batches():
            found.append(batch)
            if sum(map(len, found)) >= most:
                break
        return torch.cat(found)[:most]

    def features(self, extractor: Extractor) -> Features:
        """Of all images, in order."""
        found = (self.pieces.read(self._features(first, extractor)) for first in self.firsts)
        return Features.joined(Features(torch.from_numpy(f["pooled"]), torch.from_numpy(f["logits"])) for f in found)

    def nfe(self) -> float:
        """Evaluations of the network an image, guidance included."""
        return sum(int(self.pieces.read(self._images(first))["work"]) for first in self.firsts) / self.num_images

    def labels(self) -> Tensor | None:
        return self.sampling.labels_of(torch.arange(self.num_images))

    def write_npz(self, path: Path) -> tuple[int, int, int, int]:
        """All images as `arr_0`, uint8 (N, H, W, C), their labels, if there are any, as `arr_1`: the format that ADM's
        evaluator reads. Batch by batch, so that memory does not grow with N. Returns the shape of arr_0."""
        channels, height, width = self.sampling.image_shape
        shape = (self.num_images, height, width, channels)
        labels = self.labels()
        with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy", STAMP), "w", force_zip64=True) as member:
                head = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, head)
                for batch in self.batches():
                    member.write(np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy()).data)
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy", STAMP), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, labels.numpy())
        return shape

    def write(self, out: Path, grid_images: int = 100, png: bool = False) -> tuple[int, int, int, int]:
        """samples.npz, grid.png of the first images, and on request a file each in png/. The shape of arr_0."""
        shutil.rmtree(out / "png", ignore_errors=True)
        number = 0
        for image in (image for batch in self.batches() for image in batch) if png else ():
            save_png(grid(image[None], gap=0, smallest=1), out / "png" / f"{number:06d}.png")
            number += 1
        shown, classes = self.images(grid_images), self.sampling.num_classes
        save_png(grid(shown, classes if classes and len(shown) % classes == 0 else None), out / "grid.png")
        return self.write_npz(out / "samples.npz")

    def remove(self) -> None:
        self.pieces.remove()
