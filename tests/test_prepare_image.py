"""One image of a source: cropped to the pixel as published, kept where it may be, refused by name where it must be."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from diffusion.data.prepare.image import BadImage, Rule, look, make

RNG = np.random.default_rng(5)


def photo(width, height, channels=3):
    """Smooth colours with some noise: a resize that is off by a pixel changes it."""
    small = RNG.integers(0, 256, (7, 9, channels), dtype=np.uint8)
    image = Image.fromarray(small if channels > 1 else small[..., 0]).resize((width, height), Image.Resampling.BICUBIC)
    noise = RNG.integers(-9, 10, (height, width, channels) if channels > 1 else (height, width))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def coded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def png(width, height, depth, colour, rows=b""):
    """A PNG by hand: Pillow writes none of 16-bit colour, and none that is larger than its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---- the published crops, each against another way to compute it ----


def paper(image, size, kind):
    array = np.asarray(image)
    side = min(array.shape[:2])
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    return Image.fromarray(array[top : top + side, left : left + side]).resize((size, size), kind)


def celeba(image, size):
    x, y = 89, 121
    crop = np.asarray(image)[y - 64 : y + 64, x - 64 : x + 64]
    return Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR)


def adm(image, size):
    scale = size / min(image.size)
    array = np.asarray(image.resize([int(round(scale * n)) for n in image.size], Image.Resampling.BOX))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return Image.fromarray(array[top : top + size, left : left + size])


REFERENCES = {
    "lsun": (("centre", "lanczos"), lambda image, size: paper(image, size, Image.Resampling.LANCZOS)),
    "score sde": (("centre", "bicubic"), lambda image, size: paper(image, size, Image.Resampling.BICUBIC)),
    "adm": (("adm", "box"), adm),
    "ddim": (("ddim", "bilinear"), lambda image, size: Compose([Resize(size), CenterCrop(size)])(image)),
}
SIZES = [(67, 48), (48, 67), (51, 50), (33, 90), (97, 32), (64, 64), (20, 31)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("rule, reference", REFERENCES.values(), ids=REFERENCES)
def test_crop_and_resize_are_the_published_ones(rule, reference, size):
    image = photo(*size)
    made = make(coded(image), Rule(32, 3, *rule))
    assert (pixels(made.data) == np.asarray(reference(image, 32))).all()
    assert not made.original and made.enlarged == (min(size) < 32)


def test_celeba_is_cropped_around_the_face_and_halved():
    image = photo(178, 218)
    assert (pixels(make(coded(image), Rule(64, 3, "celeba", "bilinear")).data) == np.asarray(celeba(image, 64))).all()


@pytest.mark.parametrize("rule", [Rule(24, format="png"), Rule(24, format="webp")], ids=lambda r: r.format)
def test_what_is_encoded_anew_loses_nothing(rule):
    image = photo(24, 24)
    made = make(np.asarray(image), rule)
    assert made.extension == rule.format and (pixels(made.data) == np.asarray(image)).all()


def test_quality_makes_smaller_files():
    array = np.asarray(photo(64, 64))
    sizes = [len(make(array, Rule(64, format=f, quality=q)).data) for f in ("jpeg", "webp") for q in (95, 30)]
    assert sizes[0] > sizes[1] and sizes[2] > sizes[3]
    assert make(array, Rule(64, format="jpeg", quality=95)).extension == "jpg"


# ---- what is kept, and what is made fit ----


@pytest.mark.parametrize("crop", ["centre", "adm", "ddim", "celeba", "none"])
@pytest.mark.parametrize("kind, extension", [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_an_image_that_has_the_size_is_kept_to_the_byte(kind, extension, crop):
    data = coded(photo(32, 32), kind)
    made = make(data, Rule(32, crop=crop, format="png"))
    assert made.data == data and made.extension == extension and made.original


def test_grey_images_are_kept_where_the_set_has_one_channel():
    data = coded(photo(32, 32, 1), "PNG")
    assert make(data, Rule(32, channels=1)).data == data
    three = make(data, Rule(32, channels=3))
    assert not three.original and (pixels(three.data) == pixels(data, "L")[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(32, 32), (40, 32)], ids=str)
def test_exif_orientation_is_applied_before_the_crop(orientation, size):
    image, exif = photo(*size), Image.Exif()
    exif[0x0112] = orientation
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
             5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
             8: np.rot90}  # fmt: skip
    data = coded(image, "PNG", exif=exif)
    upright = Image.fromarray(np.ascontiguousarray(turns[orientation](np.asarray(image))))
    made = make(data, Rule(32))
    assert (pixels(made.data) == np.asarray(paper(upright, 32, Image.Resampling.LANCZOS))).all()
    assert made.original == (orientation == 1 and size == (32, 32))
    assert look(data, 10**6) == upright.size


def test_palettes_and_opaque_alpha_keep_their_colours():
    image = photo(32, 32).quantize(16)
    assert (pixels(make(coded(image), Rule(32)).data) == np.asarray(image.convert("RGB"))).all()
    image = photo(32, 32)
    opaque = image.copy()
    opaque.putalpha(255)
    assert (pixels(make(coded(opaque), Rule(32)).data) == np.asarray(image)).all()


@pytest.mark.parametrize("background, level", [("white", 255), ("black", 0)])
def test_transparency_is_laid_on_the_background_asked_for(background, level):
    image = photo(32, 32)
    half = image.copy()
    half.putalpha(Image.fromarray(np.repeat(np.uint8([[0] * 16 + [255] * 16]), 32, axis=0)))
    made = pixels(make(coded(half), Rule(32, background=background)).data)
    assert (made[:, :16] == level).all() and (made[:, 16:] == np.asarray(image)[:, 16:]).all()
    with pytest.raises(BadImage, match="transparent pixels: give background=white"):
        make(coded(half), Rule(32))
    keyed = coded(Image.fromarray(np.zeros((32, 32, 3), np.uint8)), transparency=(0, 0, 0))
    assert (pixels(make(keyed, Rule(32, background="white")).data) == 255).all()


def test_profiles_and_exif_are_not_carried_into_new_files():
    data = coded(photo(40, 40), "PNG", icc_profile=b"profile" * 9, exif=Image.Exif())
    with Image.open(io.BytesIO(make(data, Rule(32)).data)) as image:
        assert not image.info


# ---- what is refused ----

REFUSED = {
    "16 bits RGB": (png(32, 32, 16, 2, (b"\0" + b"\1\2" * 96) * 32), {}, "16 bits per channel"),
    "16 bits grey": (png(32, 32, 16, 0, (b"\0" + b"\1\2" * 32) * 32), {"channels": 1}, "16 bits per channel"),
    "16 bits grey and alpha": (png(32, 32, 16, 4, (b"\0" + b"\1\2" * 64) * 32), {}, "16 bits per channel"),
    "CMYK": (coded(photo(32, 32).convert("CMYK"), "JPEG"), {}, "mode CMYK"),
    "colour in one channel": (coded(photo(32, 32)), {"channels": 1}, "give channels=3"),
    "bomb": (png(60_000, 60_000, 8, 2), {}, r"60000 x 60000 pixels, more than max_pixels=100,000,000"),
    "over the limit": (coded(photo(40, 40)), {"max_pixels": 1599}, "max_pixels=1,599"),
    "GIF": (coded(photo(32, 32), "GIF"), {}, "not a PNG, JPEG, WebP or BMP"),
    "animation": (coded(photo(32, 32), "PNG", save_all=True, append_images=[photo(32, 32)]), {}, "an animation of 2"),
    "text": (b"<html>404</html>", {}, "not a PNG, JPEG"),
    "nothing": (b"", {}, "it is empty"),
    "truncated JPEG": (coded(photo(32, 32), "JPEG")[:-60], {}, "cannot be decoded"),
    "truncated PNG": (coded(photo(32, 32))[:600], {}, "cannot be decoded"),
    "no square": (coded(photo(33, 32)), {"crop": "none"}, "33 x 32 pixels, not a square: give crop=centre"),
    "another size": (coded(photo(40, 40)), {"resize": "none"}, "40 x 40 pixels, but resize=none needs 32 x 32"),
    "no aligned face": (coded(photo(178, 200)), {"crop": "celeba"}, "178 x 200 .* aligned images of 178 x 218"),
}


@pytest.mark.parametrize("data, rule, complaint", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(data, rule, complaint):
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match=complaint):
        make(data, Rule(32, **rule))
    assert Image.MAX_IMAGE_PIXELS == limit


def test_500_mutated_images_are_either_samples_or_refused():
    originals = [coded(photo(24, 20), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")]
    refused = 0
    for number in range(500):
        data = bytearray(originals[number % 4])
        for _ in range(RNG.integers(1, 6)):
            data[RNG.integers(0, min(len(data), 200 if number % 3 else len(data)))] = RNG.integers(0, 256)
        data = bytes(data[: RNG.integers(1, len(data) + 1)]) if number % 5 == 0 else bytes(data)
        try:
            assert pixels(make(data, Rule(16, max_pixels=10**6)).data).shape == (16, 16, 3)
        except BadImage:
            refused += 1
    assert 100 < refused < 500


@pytest.mark.parametrize("crop", ["adm", "ddim"])
def test_a_line_whose_short_side_would_become_the_size_is_refused_before_it_is_resized(crop):
    """5,000 x 1 pixels at a short side of 32 are 160,000 x 32."""
    line = coded(Image.new("RGB", (5000, 1)))
    with pytest.raises(BadImage, match="5000 x 1 pixels, which resized to .* more than max_pixels=1,000,000"):
        make(line, Rule(32, crop=crop, max_pixels=1_000_000))
    with pytest.raises(BadImage, match="5000 x 1 pixels, more than max_pixels=4,999"):
        make(np.zeros((1, 5000, 3), np.uint8), Rule(32, crop=crop, max_pixels=4999))
    assert make(line, Rule(32, crop="centre")).enlarged
