"""The images of a sampling in a folder, a file a batch: made by all ranks, each its share, and gone on with after an
interruption.

    about.json                        what decides the images; with another content the folder is begun anew
    images_00000256_256.npz           uint8 (b, H, W, C) of the images from number 256 on, and the work they took
    features_00000256_256_NAME.npz    what an extractor sees in them

Which images make a batch depends on the batch size alone, so ranks change no bit of them. A file is written whole or
not at all.
"""

import contextlib
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.files import replacing, write_atomically
from diffusion.metrics.extractors import Extractor, Features
from diffusion.training.pictures import grid, save_png
from diffusion.training.ranks import Ranks
from diffusion.training.sampling import Sampling, watched

PATIENCE = 60.0  # seconds until another machine's file is seen here
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
        self.folder, self.sampling, self.num_images, self.ranks = folder, sampling, num_images, ranks
        self._about = json.dumps({"model": model, "sampling": sampling.identity()}, sort_keys=True)
        self.batch_size = sampling.batch_size

    # ---- making ----

    def make(self, extractor: Extractor | None = None, title: str = "sampling") -> None:
        """All that is not there yet, by all ranks; each calls it, and it returns when the last is done.

        Raises:
            Abandoned: a rank has been told to stop. What is made stays.
        """
        if self.ranks.main:
            self._open()
        self.ranks.largest()
        with self.ranks.together():
            mine = [number * self.batch_size for number in self.ranks.share(-(-self.num_images // self.batch_size))]
            there = sum(self._count(first) for first in mine if self._images(first).is_file())
            batches = watched(
                title,
                self.num_images,
                self._made(mine, extractor),
                self.ranks,
                there=there * self.num_images // max(sum(map(self._count, mine)), 1),
            )
            for _ in batches:
                self.ranks.working()

    def _open(self) -> None:
        about = self.folder / "about.json"
        if not about.is_file() or about.read_text() != self._about:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_atomically(about, self._about)

    def _made(self, mine: list[int], extractor: Extractor | None) -> Iterator[int]:
        """How many images each batch that had to be made has."""
        for first in mine:
            self.ranks.attend()
            images, new = self._read(first), False
            if images is None:
                numbers, before = torch.arange(first, first + self._count(first)), self.sampling.counted.rows
                images, new = self.sampling.images(numbers), True
                work = self.sampling.counted.rows - before
                with replacing(self._images(first)) as file:
                    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), work=np.int64(work))
            if extractor is not None and not self._features(first, extractor).is_file():
                found = extractor.rows(images, first)
                with replacing(self._features(first, extractor)) as file:
                    np.savez(file, pooled=found.pooled.numpy(), logits=found.logits.numpy())
            if new:
                yield len(images)

    def _count(self, first: int) -> int:
        return min(self.batch_size, self.num_images - first)

    def _images(self, first: int) -> Path:
        return self.folder / f"images_{first:08d}_{self._count(first)}.npz"

    def _features(self, first: int, extractor: Extractor) -> Path:
        return self.folder / f"features_{first:08d}_{self._count(first)}_{extractor.name}_{extractor.digest[:16]}.npz"

    def _read(self, first: int) -> Tensor | None:
        """uint8 (b, C, H, W) that have been made; None if not."""
        if not self._images(first).is_file():
            return None
        return torch.from_numpy(_arrays(self._images(first))["images"]).permute(0, 3, 1, 2)

    # ---- what was made, for one rank ----

    @property
    def firsts(self) -> range:
        """The number of the first image of each batch."""
        return range(0, self.num_images, self.batch_size)

    def batches(self) -> Iterator[Tensor]:
        """All images in order, uint8 (b, C, H, W)."""
        for first in self.firsts:
            yield torch.from_numpy(_arrays(self._images(first))["images"]).permute(0, 3, 1, 2)

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
        found = (_arrays(self._features(first, extractor)) for first in self.firsts)
        return Features.joined(Features(torch.from_numpy(f["pooled"]), torch.from_numpy(f["logits"])) for f in found)

    def nfe(self) -> float:
        """Evaluations of the network an image, guidance included."""
        return sum(int(_arrays(self._images(first))["work"]) for first in self.firsts) / self.num_images

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
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # if it was for this alone


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that is there, or was written on another machine a moment ago."""
    deadline = time.monotonic() + PATIENCE
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
