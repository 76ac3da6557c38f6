"""Data modules of the handwritten digits, which are written to disk if they are missing."""

from pathlib import Path
from typing import ClassVar

from diffusion.data.digit_sets import BYTES, write_missing_digits
from diffusion.data.module import ImageShardsDataModule
from diffusion.files import Room, writing


class DigitsDataModule(ImageShardsDataModule):
    """The digits, all in the split train. They are written to `root` if it has no data set.

    Arguments are as in `ImageShardsDataModule`.
    """

    set_name: ClassVar[str] = "digits"

    def prepare_data(self) -> None:
        """Write the shards if they are missing. Raises Unwritable if the folder cannot be written to."""
        with writing(Room("data.root", Path(self.root), BYTES, "the digits")):
            write_missing_digits(self.root, self.set_name)


class HeldOutDigitsDataModule(DigitsDataModule):
    """The digits, with about 20 % of the images in the split test, chosen by a hash of their numbers."""

    set_name = "digits_held_out"
