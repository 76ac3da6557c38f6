"""The contact sheet of a data set: an image that shows some of its images."""

import io

from PIL import Image, ImageDraw

from diffusion.data.shards.index import Index
from diffusion.data.sources.source import shown

TILES, TILE = 64, 128  # number of images on the contact sheet, and their largest side in pixels


def contact_sheet(index: Index, classes: list[str]) -> bytes:
    """A PNG of up to 64 images, spread evenly over the training shards, with their class names below them."""
    shards = index.of_split("train")
    total = index.count("train")
    chosen = sorted({place * total // min(TILES, total) for place in range(min(TILES, total))})
    columns, side = min(8, len(chosen)), min(index.image_size, TILE)
    side *= max(1, 64 // side)  # enlarge small images by an integer factor
    foot = 14 if classes else 0
    sheet = Image.new("RGB", (columns * (side + 2), -(-len(chosen) // columns) * (side + foot + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    first, which = 0, 0
    for tile, place in enumerate(chosen):
        while place >= first + shards[which].samples:
            first, which = first + shards[which].samples, which + 1
        at, size, label_at, label_size = (int(x) for x in index.offsets(shards[which])[place - first])
        with open(index.path(shards[which]), "rb") as file:
            file.seek(at)
            picture = Image.open(io.BytesIO(file.read(size)), formats=("PNG", "JPEG", "WEBP")).convert("RGB")
            file.seek(label_at)
            label = file.read(label_size)
        if picture.size != (side, side):
            enlarging = picture.width < side
            picture = picture.resize((side, side), Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)
        left, top = tile % columns * (side + 2) + 1, tile // columns * (side + foot + 2) + 1
        sheet.paste(picture, (left, top))
        if classes:
            draw.text((left, top + side), shown(classes[int(label)])[: max(1, side // 6)], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
