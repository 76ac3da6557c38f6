"""PNG files of a run as data: URIs that a page carries in itself."""

import base64
import io
import re
from pathlib import Path
from typing import Any

from diffusion.files import read_regular

MAX_THUMBNAILS = 12
THUMBNAIL_PIXELS = 320
MAX_FILE = 1 << 28  # bytes of a picture
MAX_EMBEDDED = 4_000_000  # bytes of a file that goes into the page as it is; a larger one is recoded as JPEG


def pictures(samples: Path) -> tuple[dict | None, list[dict], list[str]]:
    """The newest grid, thumbnails over training from the first to the newest (none if it is the only one), and the
    names of files that could not be read. A picture has `step`, `address` (a data: URI), `width`, `height`."""
    found = sorted((int(m[1]), p) for p in samples.glob("step_*.png") if (m := re.fullmatch(r"step_(\d+)", p.stem)))
    thumbnails, unread, newest = [], [], None
    while found and newest is None:
        step, path = found[-1]
        newest = picture(path, step)
        if newest is None:
            unread.append(path.name)
            found.pop()
    if len(found) > 1:
        for step, path in evenly(found, MAX_THUMBNAILS):
            small = picture(path, step, THUMBNAIL_PIXELS)
            thumbnails += [small] if small else []
            unread += [] if small else [path.name]
    return newest, thumbnails, unread


def evenly(items: list, number: int) -> list:
    """At most `number` of the items, the first and the last among them."""
    if len(items) <= number:
        return items
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def picture(path: Path, step: int, limit: int | None = None) -> dict[str, Any] | None:
    """A PNG or GIF file for the page, no larger than `limit` pixels on its longer side; None if it cannot be read."""
    from PIL import Image

    try:
        content = read_regular(path, MAX_FILE)
        image = Image.open(io.BytesIO(content), formats=("PNG", "GIF"))  # others run programs, or are none of ours
        image.load()
    except Exception:  # Pillow raises many kinds for a file that is cut off, too large or no picture
        return None
    shrink = limit is not None and max(image.size) > limit
    if shrink:
        image = image.convert("RGB")
        image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    if shrink or len(content) > MAX_EMBEDDED:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
        content = buffer.getvalue()
    kind = "png" if content.startswith(b"\x89PNG") else "gif" if content.startswith(b"GIF8") else "jpeg"
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"step": step, "address": address, "width": image.width, "height": image.height}


def newest_picture(folder: Path, stem: str, unread: list[str]) -> dict[str, Any] | None:
    """The picture `stem`*.png with the highest number at the end of its name that can be read; None if there is none.
    The names of those that cannot are added to `unread`."""
    files = [(numbered(p), p.name, p) for p in folder.glob(f"{stem}*.png")]
    for step, name, path in sorted(files, reverse=True):
        found = picture(path, step)
        if found is not None:
            return found
        unread.append(f"{folder.name}/{name}")
    return None


def numbered(path: Path) -> int:
    """The last number in a file's name, 0 if there is none."""
    found = re.findall(r"\d+", path.stem)
    return int(found[-1]) if found else 0
