"""The data set that is on every machine: 1,797 handwritten digits of 8 x 8 pixels, out of scikit-learn.

It is written as shards once and read like any other.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from diffusion.data.module import ImageShardsDataModule
from diffusion.data.shards.index import INDEX_NAME, MissingData, read_index
from diffusion.data.shards.writer import ShardWriter
from diffusion.files import Room, remove_empty, writing

DIGITS_BYTES = 4_200_000  # of the shards and of the classifier beside them


def write_digits(root: str | os.PathLike) -> None:
    """Write `load_digits` as shards: one channel, round(v 255/16) of its values 0..16, labels 0..9, split train.

    They are made in a folder inside `root` and moved: of several processes at once, each finds or makes a whole set.
    Folders made in vain are removed again.
    """
    from sklearn.datasets import load_digits  # half a second, needed once

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    root = Path(root)
    made = [folder for folder in (root.absolute(), *root.absolute().parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".digits.") as aside:
            with ShardWriter(aside, "digits", image_size=8, channels=1, classes=10, max_samples=225) as writer:  # 8
                for image, label in zip(pixels, digits.target, strict=True):
                    writer.write(image[None], int(label))
            for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == INDEX_NAME):  # the index last
                os.replace(file, root / file.name)
    finally:
        remove_empty(made)


def write_missing_digits(root: str | os.PathLike) -> None:
    """Write the digits unless they are there."""
    try:
        read_index(root)
    except MissingData:
        write_digits(root)


class DigitsDataModule(ImageShardsDataModule):
    """`ImageShardsDataModule` that writes the digits where `root` has none. Arguments as there."""

    def prepare_data(self) -> None:
        """Write the shards unless they are there. Unwritable if the disk does not take them."""
        with writing(Room("data.root", Path(self.root), DIGITS_BYTES, "the digits")):
            write_missing_digits(self.root)
