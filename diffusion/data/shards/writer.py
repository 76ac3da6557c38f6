"""Writing data sets: samples -> WebDataset tars, their offsets and digests, and last of all the index.

The bytes depend on the samples alone (fixed times and owners, members sorted), so writing the same samples twice, or
from two processes at once, gives the same files. A file is there whole or not at all. This module knows the format;
it does not know where the images come from.
"""

import hashlib
import io
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from PIL import Image
from webdataset import TarWriter

from diffusion.data.shards.index import (
    DIGESTS_ROW,
    INDEX_NAME,
    OFFSETS_ROW,
    Index,
    Shard,
    sample_digest,
    shard_files,
    write_index,
)
from diffusion.files import replacing

IMAGE_EXTENSIONS = ("png", "jpg", "webp", "npy")
_BLOCK = 512  # a tar is made of blocks: one of header before each member, whose data are padded to whole blocks


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (C, H, W), C = 1 or 3 -> the bytes of a PNG, without loss."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3), (image.dtype, image.shape)
    encoded = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(encoded, "PNG")
    return encoded.getvalue()


class ShardFile:
    """One tar, its offsets and its digests being written; all are in place when the `with` block ends without an error.

    Args:
        root: the data set's folder, which exists.
        name: file name of the tar.
        split: the split it belongs to.
    """

    def __init__(self, root: Path, name: str, split: str) -> None:
        self.root, self.name, self.split = root, name, split
        self._rows: list[tuple[int, ...]] = []
        self._digests: list[int] = []
        self._end = 0  # bytes of the tar so far
        self._keys: set[str] = set()

    @property
    def samples(self) -> int:
        """Samples written so far."""
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Bytes of the tar so far, without its closing blocks."""
        return self._end

    def write(self, key: str, extension: str, image: bytes, label: int | None = None) -> None:
        """Append one sample: `key.extension` and, with a label, `key.cls`.

        Raises:
            ValueError: an extension that is not an image's, a key with a dot or met before in this shard.
        """
        if extension not in IMAGE_EXTENSIONS:
            raise ValueError(
                f"{self.name}: sample {key}: the extension {extension!r} must be one of {IMAGE_EXTENSIONS}."
            )
        if "." in key or key in self._keys:
            raise ValueError(f"{self.name}: the sample key {key!r} holds a dot or occurs twice.")
        members = {extension: image} | ({} if label is None else {"cls": b"%d" % label})
        self._keys.add(key)
        self._tar.write({"__key__": key} | members)
        where = {"cls": (0, 0)}
        for member in sorted(members):  # the order TarWriter writes them in
            size = len(members[member])
            where[member] = (self._end + _BLOCK, size)
            self._end += _BLOCK + -(-size // _BLOCK) * _BLOCK
        assert self._tar.tarstream.offset == self._end, f"tarfile did not lay out {key} in whole blocks"
        self._rows.append(where[extension] + where["cls"])
        self._digests.append(sample_digest(image, members.get("cls", b"")))

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        tar, *tables = (replacing(self.root / name) for name in shard_files(self.name))
        self._tables = [_Hashed(self._stack.enter_context(table)) for table in tables]
        self._file = _Hashed(self._stack.enter_context(tar))
        self._tar = self._stack.enter_context(TarWriter(self._file, encoder=False, compress=False, mtime=0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            assert self._rows, f"{self.name} would be empty"
            for table, rows, row in zip(
                self._tables, (self._rows, self._digests), (OFFSETS_ROW, DIGESTS_ROW), strict=True
            ):
                table.write(np.array(rows, dtype=row.base).tobytes())
        self._stack.__exit__(kind, error, trace)

    def entry(self) -> Shard:
        """What the index says of it, once it is written."""
        digests = (file.hash.hexdigest() for file in (self._file, *self._tables))
        return Shard(self.name, self.split, len(self._rows), self._file.size, *digests)


class _Hashed:
    """A file to write to that knows the sha256 and the number of the bytes it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


class ShardWriter:
    """Writes a data set: a new shard whenever one is full or the split changes, and at the end the index.

        with ShardWriter(root, "digits", image_size=8, channels=1, classes=10) as writer:
            writer.write(pixels, label)

    After an error nothing of it is left. An index found in the folder is removed first: its shards are replaced.

    Args:
        root: the folder to write into, made when absent.
        name: name of the data set.
        image_size: side of the square images, in pixels.
        channels: 1 or 3.
        classes: number of classes; 0 for images without labels.
        max_samples: samples in a shard, at most.
        max_bytes: bytes of a shard; a shard that has reached them is closed.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        name: str,
        image_size: int,
        channels: int,
        classes: int,
        max_samples: int = 10_000,
        max_bytes: int = 1 << 28,
    ) -> None:
        assert image_size > 0 and channels in (1, 3) and classes >= 0 and max_samples > 0 and max_bytes > 0
        self.root, self.name = Path(root), name
        self.image_size, self.channels, self.classes = image_size, channels, classes
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self._shards: list[Shard] = []
        self._current: ShardFile | None = None
        self._written: dict[str, int] = {}  # samples by split

    def write(
        self, image: np.ndarray | bytes, label: int | None = None, split: str = "train", extension: str = "png"
    ) -> None:
        """Append a sample: pixels uint8 (C, H, W), stored as PNG, or an encoded image and its extension.

        Raises:
            ValueError: pixels of another shape than the data set's, or a label outside [0, classes).
        """
        if isinstance(image, np.ndarray):
            shape = (self.channels, self.image_size, self.image_size)
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"{self.name}: met an image {image.dtype} {image.shape}, expected uint8 {shape}.")
            image, extension = encode_png(image), "png"
        if (label is None) != (self.classes == 0) or (label is not None and not 0 <= label < self.classes):
            raise ValueError(f"{self.name}: met the label {label} in a data set of {self.classes} classes.")
        shard = self._current
        if shard and (shard.split != split or shard.samples >= self.max_samples or shard.bytes >= self.max_bytes):
            self._close_shard()
        if self._current is None:
            number = sum(shard.split == split for shard in self._shards)
            self._current = ShardFile(self.root, f"{split}-{number:05d}.tar", split).__enter__()
        key = self._written.get(split, 0)
        self._current.write(f"{key:09d}", extension, image, None if label is None else int(label))
        self._written[split] = key + 1

    def _close_shard(self) -> None:
        shard, self._current = self._current, None
        if shard is not None:
            shard.__exit__(None, None, None)
            self._shards.append(shard.entry())

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / INDEX_NAME).unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as undo:
            undo.callback(self._remove_shards)
            if self._current is not None and error is not None:
                self._current.__exit__(kind, error, trace)
            elif error is None:
                self._close_shard()
                if not self._shards:
                    raise ValueError(f"{self.name}: no sample was written to {self.root}.")
                shards = tuple(self._shards)
                write_index(Index(self.root, self.name, self.image_size, self.channels, self.classes, shards))
                undo.pop_all()

    def _remove_shards(self) -> None:
        for shard in self._shards:
            for name in shard_files(shard.path):
                (self.root / name).unlink(missing_ok=True)
