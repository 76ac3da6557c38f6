"""Images as arrays: uint8 pixels in memory or mapped from an .npz, in their own order."""

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from diffusion.data.sources.members import opened_zip, unpacked
from diffusion.data.sources.source import MOST_CLASSES, Entry

HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MOST_HELD = 1 << 33  # bytes of a compressed array, which is held in memory
CHUNK = 1 << 22


class Arrays(NamedTuple):
    """One split: uint8 (N, H, W, C), a label each or None, and what its keys begin with."""

    split: str
    images: np.ndarray
    labels: np.ndarray | None
    key: str


class ArraySource:
    """A `Source` over arrays. `kind` and `classes` as there."""

    def __init__(self, kind: str, classes: tuple[str, ...], parts: Sequence[Arrays]) -> None:
        self.kind, self.classes, self.parts = kind, classes, parts
        self.ignored: list[str] = []

    def entries(self, start: int | None = None) -> Iterator[Entry]:
        """The images, part after part."""
        first = 0
        for part in self.parts:
            for row in range(max((start or 0) - first, 0), len(part.images)):
                label = None if part.labels is None else int(part.labels[row])
                yield Entry(first + row, f"{part.key}{row:08d}", part.split, label, lambda p=part, r=row: p.images[r])
            first += len(part.images)


def npz_arrays(path: Path) -> tuple[str, tuple[str, ...], list[Arrays]] | None:
    """The arguments of `ArraySource` for an .npz in the layout of ADM's samples; None for any other zip.

    `arr_0` is uint8 (N, H, W, C); `arr_1`, if there, N integer labels. What np.savez stored is mapped, not read;
    what np.savez_compressed stored is held in memory.

    Raises:
        ValueError: the arrays are of another kind.
    """
    with opened_zip(path) as archive:
        names = archive.namelist()
        if not names or not all(name.endswith(".npy") for name in names):
            return None
        if "arr_0.npy" not in names:
            raise ValueError(f"source={path}: an .npz with {', '.join(names[:4])}; arr_0 is needed.")
        images = _array(path, archive, "arr_0.npy")
        labels = _array(path, archive, "arr_1.npy") if "arr_1.npy" in names else None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"source={path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (N, H, W, C) with C = 1 or 3."
        )
    classes: tuple[str, ...] = ()
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0:
            raise ValueError(
                f"source={path}: arr_1 is {labels.dtype} {labels.shape}, expected {len(images)} integers from 0 on."
            )
        if labels.max() >= MOST_CLASSES:
            raise ValueError(f"source={path}: arr_1 has the label {labels.max()}; 0 is the first.")
        classes = tuple(str(n) for n in range(int(labels.max()) + 1))
    return f".npz of {len(images):,} images", classes, [Arrays("train", images, labels, "")]


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        member = archive.getinfo(name)
        if member.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, archive, member)
        if member.file_size > MOST_HELD:
            raise ValueError(f"{member.file_size:,} compressed bytes: save it by np.savez, which can be mapped")
        data = unpacked(archive, member)
        shape, order, dtype, start = _head(io.BytesIO(data), len(data))
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
    except Exception as error:  # on a damaged head numpy raises ValueError, and what Python's own parser raises
        what = str(error) or type(error).__name__
        raise ValueError(f"source={path}: {name.removesuffix('.npy')} cannot be read: {what}.") from error


def _mapped(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array of a stored member, mapped from the file after its CRC was found to be right."""
    with archive.open(member) as file:
        while file.read(CHUNK):  # to the end, where zipfile compares the CRC
            pass
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        begin = member.header_offset + 30 + sum(struct.unpack("<26x2H", file.read(30)))  # name and extra field
        file.seek(begin)
        shape, order, dtype, start = _head(file, member.file_size)
    return np.memmap(path, dtype, "r", begin + start, shape, order)


def _head(file: BinaryIO, size: int) -> tuple[tuple[int, ...], str, np.dtype, int]:
    """(shape, order, dtype, bytes of the head) of an .npy of `size` bytes; ValueError unless they hold just that."""
    begin = file.tell()
    version = np.lib.format.read_magic(file)
    if version not in HEADS:
        raise ValueError(f"an .npy of version {version}")
    shape, fortran, dtype = HEADS[version](file)
    head = file.tell() - begin
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - head:
        raise ValueError(f"{dtype} {shape} in {size - head:,} bytes")
    return shape, "F" if fortran else "C", dtype, head
