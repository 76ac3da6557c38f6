"""Data modules for the data sets of the papers. Each checks the channels and classes of its set."""

from typing import ClassVar

from diffusion.data.module import ImageShardsDataModule


class LSUNDataModule(ImageShardsDataModule):
    """A category of LSUN: photographs without labels, 256 x 256 in the papers."""

    holds: ClassVar[dict[str, int]] = {"channels": 3, "classes": 0}


class CelebAHQDataModule(ImageShardsDataModule):
    """CelebA-HQ: 30,000 faces without labels, 256 x 256 in the papers."""

    holds: ClassVar[dict[str, int]] = {"channels": 3, "classes": 0}


class CIFAR10DataModule(ImageShardsDataModule):
    """CIFAR-10: 32 x 32 RGB images, ten classes."""

    holds: ClassVar[dict[str, int]] = {"image_size": 32, "channels": 3, "classes": 10}
