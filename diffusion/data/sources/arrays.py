"""Sources of image arrays: uint8 pixels in memory, or memory-mapped from an .npz, in their order in the array."""

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
from diffusion.progress import counted

HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MOST_HELD = 1 << 33  # largest compressed array in bytes, which has to be in memory
CHUNK = 1 << 22


class Arrays(NamedTuple):
    """One split: uint8 (N, H, W, C), labels (N,) or None, and the prefix of its keys."""

    split: str
    images: np.ndarray
    labels: np.ndarray | None
    key: str


class ArraySource:
    """A `Source` over arrays. `kind` and `classes` are as in `Source`."""

    def __init__(self, kind: str, classes: tuple[str, ...], parts: Sequence[Arrays]) -> None:
        self.kind, self.classes, self.parts = kind, classes, parts
        self.ignored: list[str] = []

    def entries(self, start: int | None = None) -> Iterator[Entry]:
        """The images, one part after the other."""
        first = 0
        for part in self.parts:
            for row in range(max((start or 0) - first, 0), len(part.images)):
                label = None if part.labels is None else int(part.labels[row])
                yield Entry(first + row, f"{part.key}{row:08d}", part.split, label, lambda p=part, r=row: p.images[r])
            first += len(part.images)


def npz_arrays(path: Path) -> tuple[str, tuple[str, ...], list[Arrays]] | None:
    """The arguments of `ArraySource` for an .npz in the format of ADM's samples; None for any other zip.

    `arr_0` is uint8 (N, H, W, C). The optional `arr_1` has N integer labels. Files of np.savez are memory-mapped; files
    of np.savez_compressed are read into memory.

    Raises:
        ValueError: the arrays have another type or shape.
    """
    with opened_zip(path) as archive:
        names = archive.namelist()
        if not names or not all(name.endswith(".npy") for name in names):
            return None
        if "arr_0.npy" not in names:
            raise ValueError(f"source={path}: arr_0 is needed, but this .npz has {', '.join(names[:4])}.")
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
            raise ValueError(
                f"source={path}: arr_1 has the label {labels.max()}, expected labels below {MOST_CLASSES}."
            )
        classes = tuple(str(n) for n in range(int(labels.max()) + 1))
    return f".npz of {counted(len(images), 'image', 'images')}", classes, [Arrays("train", images, labels, "")]


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        member = archive.getinfo(name)
        if member.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, archive, member)
        if member.file_size > MOST_HELD:
            raise ValueError(f"{member.file_size:,} compressed bytes: save it by np.savez, which can be memory-mapped")
        data = unpacked(archive, member)
        shape, order, dtype, start = _head(io.BytesIO(data), len(data))
        return np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
    except Exception as error:  # for a damaged header numpy raises ValueError and errors of Python's parser
        what = str(error) or type(error).__name__
        raise ValueError(f"source={path}: {name.removesuffix('.npy')} cannot be read: {what}.") from error


def _mapped(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array of an uncompressed member, memory-mapped after its CRC has been checked."""
    with archive.open(member) as file:
        while file.read(CHUNK):  # zipfile compares the CRC at the end
            pass
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        begin = member.header_offset + 30 + sum(struct.unpack("<26x2H", file.read(30)))  # name and extra field
        file.seek(begin)
        shape, order, dtype, start = _head(file, member.file_size)
    return np.memmap(path, dtype, "r", begin + start, shape, order)


def _head(file: BinaryIO, size: int) -> tuple[tuple[int, ...], str, np.dtype, int]:
    """Shape, order, dtype and header size of an .npy of `size` bytes. Raises ValueError if they are inconsistent."""
    begin = file.tell()
    version = np.lib.format.read_magic(file)
    if version not in HEADS:
        raise ValueError(f".npy version {version} is not supported")
    shape, fortran, dtype = HEADS[version](file)
    head = file.tell() - begin
    if dtype.hasobject:
        raise ValueError("it contains Python objects, which are not loaded")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - head:
        raise ValueError(f"its header states {dtype} {shape}, but it has {size - head:,} bytes of data")
    return shape, "F" if fortran else "C", dtype, head
