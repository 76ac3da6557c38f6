"""The data sets that are on every machine: 1,797 handwritten digits of 8 x 8 pixels, out of scikit-learn.

They are written as shards once and read like any other. Which there are, and their splits, is
known without torch and lightning.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from diffusion.data.shards.index import INDEX_NAME, MissingData, read_index
from diffusion.files import remove_empty

SPLITS = {"digits": ("train",), "digits_held_out": ("train", "test")}  # of each set, by its name
BYTES = 4_200_000  # of the shards and of the classifier beside them
HELD_OUT = 5  # one image in 5 is held out


def split_of(name: str, number: int) -> str:
    """The split of the image with this number, as `load_digits` has it.

    In digits_held_out an image is in test if the sha256 of its number, written out, is a multiple of 5.
    """
    held_out = int(hashlib.sha256(str(number).encode()).hexdigest(), 16) % HELD_OUT == 0
    return "test" if name == "digits_held_out" and held_out else "train"


def write_digits(root: str | os.PathLike, name: str = "digits") -> None:
    """Write `load_digits` as shards: one channel, round(v 255/16) of its values 0..16, labels 0..9.

    They are made in a folder inside `root` and moved: of several processes at once, each finds or makes a whole set.
    Folders made in vain are removed again.

    Args:
        name: of the set, one of SPLITS.
    """
    from sklearn.datasets import load_digits  # these two take seconds, and are needed once

    from diffusion.data.shards.writer import ShardWriter

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    split = np.array([split_of(name, number) for number in range(len(pixels))])
    root = Path(root)
    made = [folder for folder in (root.absolute(), *root.absolute().parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".digits.") as aside:
            with ShardWriter(aside, name, image_size=8, channels=1, classes=10, max_samples=225) as writer:
                for part in SPLITS[name]:
                    for image, label in zip(pixels[split == part], digits.target[split == part], strict=True):
                        writer.write(image[None], int(label), part)
            for file in sorted(Path(aside).iterdir(), key=lambda file: file.name == INDEX_NAME):  # the index last
                os.replace(file, root / file.name)
    finally:
        remove_empty(made)


def write_missing_digits(root: str | os.PathLike, name: str = "digits") -> None:
    """Write the digits unless they are there."""
    try:
        read_index(root)
    except MissingData:
        write_digits(root, name)
