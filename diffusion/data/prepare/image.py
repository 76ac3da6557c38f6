"""Conversion of one image of a source to the encoded image of a sample: checked, rotated, cropped, resized, encoded.

Crops, from the published pipelines:

    centre   the centred square of the short side s, left = (w - s) // 2, top = (h - s) // 2; then resized (Ho et al.
             2020 with StyleGAN's dataset tool and Lanczos; Song et al. 2021, score SDE, with bicubic)
    celeba   128 x 128 around (89, 121) of the aligned 178 x 218 image; then resized (Song et al. 2021, DDIM)
    adm      the short side is resized to the size, the long side is rounded; then the centre, rounded down (Dhariwal
             and Nichol 2021, with box)
    ddim     the short side is resized to the size, the long side is rounded down; then the centre, rounded
             (torchvision's Resize and CenterCrop, as in the code of DDIM, with bilinear)
    none     no crop: the image must be a square

An image that already has the size, colours and depth of the data set is stored with its original bytes. These images
are errors: more than `max_pixels`, 16 bits per channel, CMYK and other colour spaces, colours in a data set of one
channel, transparency without a `background`, animations, and formats other than PNG, JPEG, WebP and BMP. The EXIF
orientation is applied. Grey images become three equal channels, palettes are replaced by their colours, and colour
profiles are ignored. This module knows one image. It does not know where it comes from or where it is written.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from diffusion.data.sources.source import BadEntry

READ = ("PNG", "JPEG", "WEBP", "BMP")
Stored = Literal["png", "webp", "jpeg"]
STORED = {"png": "png", "jpeg": "jpg", "webp": "webp"}  # format -> extension
Crop = Literal["centre", "celeba", "adm", "ddim", "none"]
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING,
}  # fmt: skip
Resize = Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "none"]
Background = Literal["white", "black"]
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
CELEBA_SIZE, CELEBA_BOX = (178, 218), (89 - 64, 121 - 64, 89 + 64, 121 + 64)


class BadImage(BadEntry):
    """An image cannot be converted to a sample. The message says why."""


@dataclass(frozen=True)
class Rule:
    """How every image of a data set is converted.

    Args:
        image_size: side of the square samples in pixels.
        channels: 3 or 1.
        crop: how images are cropped (see above).
        resize: the filter, or `none`: the cropped image must already have the size.
        format: format of images that are re-encoded: png, webp or jpeg.
        quality: 1..100 for webp and jpeg; None means lossless.
        background: white or black, behind transparent images; None means that they are errors.
        max_pixels: largest number of pixels of an image before cropping.
    """

    image_size: int
    channels: int = 3
    crop: Crop = "centre"
    resize: Resize = "lanczos"
    format: Stored = "png"
    quality: int | None = None
    background: Background | None = None
    max_pixels: int = 100_000_000

    @property
    def max_bytes(self) -> int:
        """Largest size of an encoded image of max_pixels, in bytes."""
        return most_bytes(self.max_pixels)


class Made(NamedTuple):
    """A converted image.

    data: the encoded bytes. extension: its file extension. original: whether these are the original bytes. enlarged:
    whether the image was smaller than the samples.
    """

    data: bytes
    extension: str
    original: bool
    enlarged: bool


def most_bytes(max_pixels: int) -> int:
    """Largest size in bytes of an encoded image of max_pixels: four per pixel, and 1 MiB for metadata."""
    return 4 * max_pixels + (1 << 20)


def make(data: bytes | np.ndarray, rule: Rule) -> Made:
    """Convert an encoded image, or pixels uint8 (H, W, C), by the rule.

    Raises:
        BadImage: it cannot be decoded, or is not allowed (see above).
    """
    if isinstance(data, np.ndarray):
        _within(data.shape[1], data.shape[0], rule.max_pixels)
        picture = Image.fromarray(data[..., 0] if data.shape[2] == 1 else np.ascontiguousarray(data))
        square, enlarged = squared(coloured(picture, rule), rule)
        return Made(encoded(square, rule), STORED[rule.format], False, enlarged)
    with opened(data, rule.max_pixels) as image:
        size, mode = (rule.image_size, rule.image_size), ("L" if rule.channels == 1 else "RGB")
        plain = image.format in ("PNG", "JPEG", "WEBP") and image.mode == mode and "transparency" not in image.info
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others for damaged data
            raise BadImage(f"it cannot be decoded: {str(error) or type(error).__name__}") from error
        if plain and image.size == size and image.getexif().get(0x0112, 1) == 1:
            return Made(data, STORED[image.format.lower()], True, False)
        square, enlarged = squared(coloured(upright, rule), rule)
    return Made(encoded(square, rule), STORED[rule.format], False, enlarged)


def look(data: bytes | np.ndarray, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the image after rotation, read from its header. Raises BadImage as `make`."""
    if isinstance(data, np.ndarray):
        _within(data.shape[1], data.shape[0], max_pixels)
        return data.shape[1], data.shape[0]
    with opened(data, max_pixels) as image:
        try:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception as error:
            raise BadImage(f"its EXIF data are damaged: {error}") from error
        return image.size[::-1] if turned else image.size


@contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Context that yields the image with its header read and checked. Its pixels are not decoded."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # max_pixels is the limit here
    try:
        try:
            image = Image.open(io.BytesIO(data), formats=READ)
        except Exception as error:
            if not data:
                raise BadImage("it is empty") from error
            raise BadImage("it is not a PNG, JPEG, WebP or BMP, or its header is damaged") from error
        with image:
            width, height = image.size
            _within(width, height, max_pixels)
            if image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile):
                raise BadImage("16 bits per channel: convert it to 8 bits")
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise BadImage(f"an animation of {image.n_frames} frames")
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _within(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than max_pixels={max_pixels:,}")


def coloured(image: Image.Image, rule: Rule) -> Image.Image:
    """Convert the image to mode L or RGB, by the channels of the rule. Raises BadImage if that is not possible."""
    mode, target = image.mode, "L" if rule.channels == 1 else "RGB"
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        raise BadImage(f"colours of mode {mode}: convert it to RGB")
    grey = mode in ("1", "L", "LA", "La")
    if rule.channels == 1 and not grey:
        raise BadImage("colours, but the data set has one channel: give channels=3")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            if rule.background is None:
                raise BadImage("transparent pixels: give background=white or background=black")
            ground = Image.new("RGBA", image.size, (*BACKGROUNDS[rule.background], 255))
            image = Image.alpha_composite(ground, image)
        image = image.convert("RGB")
    return image.convert(target)


def squared(image: Image.Image, rule: Rule) -> tuple[Image.Image, bool]:
    """Crop and resize the image to a square of the rule's size. Also returns whether it was enlarged.

    An image that already has this size is not changed.
    """
    (width, height), size = image.size, rule.image_size
    if (width, height) == (size, size):
        return image, False
    short = min(width, height)
    if rule.crop in ("adm", "ddim"):
        if rule.resize == "none":
            raise BadImage(f"{width} x {height} pixels, but resize=none needs {size} x {size}")
        long = round(max(width, height) * (size / short)) if rule.crop == "adm" else size * max(width, height) // short
        new = (size, long) if width == short else (long, size)
        if size * long > max(rule.max_pixels, size * size):
            raise BadImage(
                f"{width} x {height} pixels, which resized to a short side of {size} has more than "
                f"max_pixels={rule.max_pixels:,}"
            )
        image, (width, height) = image.resize(new, FILTERS[rule.resize]), new
        if rule.crop == "adm":
            left, top = (width - size) // 2, (height - size) // 2
        else:
            left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size)), short < size
    if rule.crop == "centre":
        left, top = (width - short) // 2, (height - short) // 2
        image = image.crop((left, top, left + short, top + short))
    elif rule.crop == "celeba":
        if (width, height) != CELEBA_SIZE:
            raise BadImage(f"{width} x {height} pixels, but crop=celeba needs the aligned images of 178 x 218")
        image = image.crop(CELEBA_BOX)
    elif width != height:
        raise BadImage(f"{width} x {height} pixels, not a square: give crop=centre")
    if image.size != (size, size):
        if rule.resize == "none":
            raise BadImage(f"{width} x {height} pixels, but resize=none needs {size} x {size}")
        return image.resize((size, size), FILTERS[rule.resize]), image.size[0] < size
    return image, False


def encoded(image: Image.Image, rule: Rule) -> bytes:
    """Encode the pixels in the format of the rule, without colour profile and EXIF data."""
    image.info = {}
    options: dict[str, object] = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": rule.quality}}[rule.format]
    if rule.format == "webp" and rule.quality is not None:
        options = {"quality": rule.quality}
    if rule.format == "jpeg":
        options["subsampling"] = 0  # no chroma subsampling
    buffer = io.BytesIO()
    image.save(buffer, rule.format.upper(), **options)
    return buffer.getvalue()
