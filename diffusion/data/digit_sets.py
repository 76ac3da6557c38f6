"""The digits data sets: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

They are written as shards once, and then read like any other data set. This module needs neither torch nor lightning.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from diffusion.data.shards.index import INDEX_NAME, MissingData, read_index
from diffusion.files import remove_empty

SPLITS = {"digits": ("train",), "digits_held_out": ("train", "test")}  # splits by the name of the set
BYTES = 4_200_000  # size of the shards and of the classifier beside them
HELD_OUT = 5  # one image in 5 is held out


def split_of(name: str, number: int) -> str:
    """The split of the image with this number in `load_digits`.

    In digits_held_out an image is in test if the sha256 of its number, as decimal text, is a multiple of 5.
    """
    held_out = int(hashlib.sha256(str(number).encode()).hexdigest(), 16) % HELD_OUT == 0
    return "test" if name == "digits_held_out" and held_out else "train"


def write_digits(root: str | os.PathLike, name: str = "digits") -> None:
    """Write the images of `load_digits` as shards: one channel, values v in 0..16 as round(255 v / 16), labels 0..9.

    The files are written to a temporary folder inside `root` and then moved, so that several processes can call this at
    once. After an error the folders that were created are removed.

    Args:
        root: folder of the data set.
        name: name of the set, a key of SPLITS.
    """
    from sklearn.datasets import load_digits  # these two imports take seconds, and are needed only once

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
    """Write the digits if `root` has no data set."""
    try:
        read_index(root)
    except MissingData:
        write_digits(root, name)
