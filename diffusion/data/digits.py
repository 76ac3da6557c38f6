"""The handwritten digits as training takes them; they are made where there are none."""

from pathlib import Path
from typing import ClassVar

from diffusion.data.digit_sets import BYTES, write_missing_digits
from diffusion.data.module import ImageShardsDataModule
from diffusion.files import Room, writing


class DigitsDataModule(ImageShardsDataModule):
    """`ImageShardsDataModule` that writes the digits where `root` has none: all of them in the split train. Arguments
    as there."""

    set_name: ClassVar[str] = "digits"

    def prepare_data(self) -> None:
        """Write the shards unless they are there. Unwritable if the disk does not take them."""
        with writing(Room("data.root", Path(self.root), BYTES, "the digits")):
            write_missing_digits(self.root, self.set_name)


class HeldOutDigitsDataModule(DigitsDataModule):
    """`DigitsDataModule` of which 20 % of the images are in the split test, chosen by a hash of their numbers."""

    set_name = "digits_held_out"
