"""The images of a sampling in a folder: made by all ranks, each its share, and gone on with after an interruption.

    images_00000256_256.npz           uint8 (b, H, W, C) of the images from number 256 on, and the work they took
    features_00000256_256_NAME.npz    what an extractor sees in them

Which images make a batch depends on the batch size and on what is there already, not on the number of ranks, so that
these change no bit.
"""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffusion.distributed.ranks import Ranks
from diffusion.files import replacing
from diffusion.metrics.extractors import Extractor, Features
from diffusion.scoring.pictures import grid, save_png
from diffusion.scoring.pieces import Part, Pieces
from diffusion.scoring.sampling import Sampling, differences

STAMP = (1980, 1, 1, 0, 0, 0)  # of the members of an .npz: the same images make the same bytes
IMAGES = "images_*"


class Gallery:
    """Images 0 ... num_images - 1 of a sampling. A context, as `Pieces` is.

    Args:
        folder: for this alone; made when it is needed.
        sampling: how the images are made.
        num_images: at least 1.
        model: which model makes them, as JSON: with the sampling it decides them.
        ranks: who makes them.
        setting, overwrite: as in `Pieces`.
    """

    def __init__(
        self,
        folder: Path,
        sampling: Sampling,
        num_images: int,
        model: dict[str, Any],
        ranks: Ranks,
        setting: str | None = None,
        overwrite: bool = False,
    ) -> None:
        self.sampling, self.num_images = sampling, num_images
        about: dict[str, Any] = {"model": model, "sampling": sampling.identity()}
        if sampling.of_batch:  # then the last, smaller batch has other images too
            about["sampling"] |= {"num_images": num_images}
        size = sampling.batch_size
        self.pieces = Pieces(folder, about, ranks, num_images, size, setting, overwrite, differences)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.pieces.__exit__(*error)

    # ---- making ----

    def make(self, extractor: Extractor | None = None, title: str = "sampling") -> None:
        """All that is not there yet, by all ranks; each calls it, and it returns when the last is done.

        Raises:
            Abandoned: a rank has been told to stop. What is made stays.
            ValueError: another process works in the folder, or it holds images of another sampling.
        """
        pieces = self.pieces
        pieces.make(pieces.missing(IMAGES), lambda numbers: self._sample(numbers, extractor), title)
        if extractor is not None and (rest := pieces.missing(self._features(extractor))):
            pieces.make(rest, lambda numbers: self._look(numbers, self._joined(numbers), extractor), "features")
        if pieces.ranks.main and len(sizes := self.batch_sizes()) > 1:
            print(f"Batch sizes {listed(sizes)} were mixed, which changes rounding at most.", flush=True)

    def _sample(self, numbers: range, extractor: Extractor | None) -> bool:
        """These images, and their features."""
        before = self.sampling.counted.rows
        images = self.sampling.images(torch.arange(numbers.start, numbers.stop))
        work = np.int64(self.sampling.counted.rows - before)
        self.pieces.write(IMAGES, numbers, {"images": images.permute(0, 2, 3, 1).numpy(), "work": work})
        return extractor is None or self._look(numbers, images, extractor)

    def _look(self, numbers: range, images: Tensor, extractor: Extractor) -> bool:
        found = extractor.rows(images, numbers.start)
        arrays = {"pooled": found.pooled.numpy(), "logits": found.logits.numpy()}
        self.pieces.write(self._features(extractor), numbers, arrays)
        return True

    def _features(self, extractor: Extractor) -> str:
        return f"features_*_{extractor.name}_{extractor.digest[:16]}"

    def _batch(self, part: Part) -> Tensor:
        """uint8 (b, C, H, W)."""
        return torch.from_numpy(self.pieces.read(IMAGES, part, ["images"])["images"]).permute(0, 3, 1, 2)

    def _joined(self, numbers: range) -> Tensor:
        return torch.cat([self._batch(part) for part in self.pieces.parts(IMAGES, numbers)])

    # ---- what it takes of a disk ----

    def needs(self, extractor: Extractor | None = None) -> int:
        """Bytes that are still to be written to the folder, about."""
        channels, height, width = self.sampling.image_shape
        each = channels * height * width + (4 * seen(extractor) if extractor is not None else 0)
        return max(self.num_images * each - self.pieces.bytes(), 0)

    def written(self, png: bool = False) -> int:
        """Bytes of what `write` writes, about."""
        channels, height, width = self.sampling.image_shape
        block = 4096 if png else 0  # what a small file takes of a disk
        return self.num_images * (channels * height * width + block)

    # ---- what was made, for one rank ----

    def batches(self) -> Iterator[Tensor]:
        """All images in order, uint8 (b, C, H, W)."""
        return map(self._batch, self.pieces.parts(IMAGES))

    def images(self, most: int) -> Tensor:
        """The first images, at most so many."""
        return self._joined(range(min(most, self.num_images)))

    def features(self, extractor: Extractor) -> Features:
        """Of all images, in order."""
        kind = self._features(extractor)
        found = (self.pieces.read(kind, part) for part in self.pieces.parts(kind))
        return Features.joined(Features(torch.from_numpy(f["pooled"]), torch.from_numpy(f["logits"])) for f in found)

    def nfe(self) -> float:
        """Evaluations of the network an image, guidance included."""
        parts = list(self.pieces.parts(IMAGES))
        work = (self.pieces.read(IMAGES, part, ["work"])["work"] * len(part.numbers) / len(part.of) for part in parts)
        return float(sum(work)) / self.num_images

    def batch_sizes(self) -> list[int]:
        """Those that the images were sampled with: one, unless a sampling was gone on with in batches of another."""
        recorded = self.pieces.recorded()
        former = recorded["sampling"].get("batch_size") if isinstance(recorded, dict) else None
        return self.pieces.batch_sizes(IMAGES, former or self.sampling.batch_size)

    def record(self) -> dict[str, Any]:
        """What results.jsonl says of the images: how they were sampled, and the work each took."""
        sizes = self.batch_sizes()
        mixed = {"batch_sizes": listed(sizes)} if len(sizes) > 1 else {}
        return {**self.sampling.record(), **mixed, "nfe": self.nfe()}

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


def seen(extractor: Extractor) -> int:
    """Numbers that an extractor gives of an image: what goes into its last layer, and what comes out."""
    layers = [layer for layer in extractor.network.modules() if isinstance(layer, torch.nn.Linear)]
    return layers[-1].in_features + layers[-1].out_features if layers else 0


def listed(sizes: list[int]) -> str:
    """Several numbers as text: 10, 50 and 64."""
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last
