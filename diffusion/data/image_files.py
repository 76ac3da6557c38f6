"""Images in a folder, .zip, .tar or .npz, read by number in the order of their names, to be scored.

These are the sources that `prepare` accepts, but nothing is cropped or resized here, so that all images must have the
same size. Nothing is unpickled.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.data.prepare.image import Rule, coloured, most_bytes, opened
from diffusion.data.sources.opening import open_source
from diffusion.data.sources.source import BadEntry
from diffusion.progress import counted

MAX_PIXELS = 100_000_000
GREY = ("1", "L", "LA", "La", "I;16", "I", "F")
LOSSY = ("JPEG", "WEBP")
LOOKED_AT = 64  # number of images that are checked when the path is opened


class Picture(NamedTuple):
    """An image: uint8 (H, W, C), whether the file is grey, and whether its format is lossy."""

    pixels: np.ndarray
    grey: bool
    lossy: bool


class ImageFiles:
    """The images of a path, all of one size.

    Args:
        path: a folder, .zip or .tar of PNG, JPEG, WebP or BMP files; or an .npz with `arr_0`, uint8 (N, H, W, C), and
            optionally labels `arr_1`.
        key: the setting that names the path, for messages.
        channels: 3 or 1. With 3, grey images among coloured ones are converted to RGB.

    Attributes:
        image_size: height and width of all images.
        lossy: whether some of the first 64 are JPEG or WebP.

    Raises:
        ValueError: the path cannot be read or has no images; the first images have several sizes, or all of them are
            grey although channels is 3.
    """

    def __init__(self, path: str | Path, key: str, channels: int) -> None:
        self.path, self.key, self.channels = Path(path), key, channels
        try:
            self._source = open_source(path, labels_from="none", max_bytes=most_bytes(MAX_PIXELS))
            entries = [(entry.key, entry.place, entry.label) for entry in self._source.entries()]
        except ValueError as error:
            raise ValueError(str(error).replace(f"source={path}", f"{key}={path}", 1)) from error
        self._entries = sorted(entries, key=lambda entry: entry[0])
        first = [self._picture(number) for number in range(min(LOOKED_AT, len(self)))]
        self._shape = first[0].pixels.shape
        for number, picture in enumerate(first):
            self._check(number, picture)
        if channels == 3 and all(picture.grey for picture in first):
            raise ValueError(
                f"{key}={path} holds grey images, but the extractor needs RGB. Use an extractor of one channel, or "
                f"save the images as RGB."
            )
        self.lossy = any(picture.lossy for picture in first)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._shape[0], self._shape[1]

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return all(label is not None for _, _, label in self._entries)

    def batch(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None, None]:
        """Read images: uint8 (b, C, H, W), and labels int64 (b,) or None.

        Raises:
            ValueError: an image cannot be decoded or has another size.
        """
        pictures = []
        for number in numbers.tolist():
            picture = self._picture(number)
            self._check(number, picture)
            pictures.append(picture.pixels)
        labels = [self._entries[number][2] for number in numbers.tolist()]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return images, (None if None in labels else torch.tensor(labels)), None

    def _picture(self, number: int) -> Picture:
        name, place, _ = self._entries[number]
        entry = next(self._source.entries(place))
        try:
            data = entry.read()
            if isinstance(data, np.ndarray):
                return Picture(np.array(data), data.shape[2] == 1, False)
            with opened(data, MAX_PIXELS) as image:
                grey, lossy = image.mode in GREY, image.format in LOSSY
                upright = ImageOps.exif_transpose(image)
                return Picture(self._pixels(upright), grey, lossy)
        except (BadEntry, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.key}={self.path}: {name} cannot be used: {error}.") from error

    def _pixels(self, image: Image.Image) -> np.ndarray:
        made = np.array(coloured(image, Rule(image_size=1, channels=self.channels)))
        return made[..., None] if made.ndim == 2 else made

    def _check(self, number: int, picture: Picture) -> None:
        if picture.pixels.shape != self._shape:
            (height, width, channels), (h, w, c) = picture.pixels.shape, self._shape
            raise ValueError(
                f"{self.key}={self.path} holds images of several sizes: {self._entries[number][0]} has "
                f"{width}x{height} pixels and {counted(channels, 'channel', 'channels')}, {self._entries[0][0]} has "
                f"{w}x{h} pixels and {counted(c, 'channel', 'channels')}."
            )
