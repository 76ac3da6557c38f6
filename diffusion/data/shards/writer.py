"""Writing of data sets: samples -> WebDataset tars, their offsets and digests, and finally the index.

The bytes depend on the samples only (fixed times and owners, sorted members). So writing the same samples twice, or
from two processes at once, gives the same files. Files are written atomically. This module knows the format; it does
not know where the images come from.
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
_BLOCK = 512  # bytes per block of a tar: each member has one header block, and its data are padded to whole blocks


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 (C, H, W), C = 1 or 3, as PNG, which is lossless. Returns the bytes."""
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3), (image.dtype, image.shape)
    encoded = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(encoded, "PNG")
    return encoded.getvalue()


class ShardFile:
    """Context that writes one tar, its offsets file and its digests file. They appear when it ends without an error.

    Args:
        root: folder of the data set, which must exist.
        name: file name of the tar.
        split: the split of its samples.
    """

    def __init__(self, root: Path, name: str, split: str) -> None:
        self.root, self.name, self.split = root, name, split
        self._rows: list[tuple[int, ...]] = []
        self._digests: list[int] = []
        self._end = 0  # bytes of the tar so far
        self._keys: set[str] = set()

    @property
    def samples(self) -> int:
        """Number of samples written so far."""
        return len(self._rows)

    @property
    def bytes(self) -> int:
        """Size of the tar so far in bytes, without its final blocks."""
        return self._end

    def write(self, key: str, extension: str, image: bytes, label: int | None = None) -> None:
        """Append one sample: `key.extension` and, with a label, `key.cls`.

        Raises:
            ValueError: the extension is unknown, or the key contains a dot or occurs twice in this shard.
        """
        if extension not in IMAGE_EXTENSIONS:
            raise ValueError(
                f"{self.name}: sample {key}: the extension {extension!r} must be one of {', '.join(IMAGE_EXTENSIONS)}."
            )
        if "." in key or key in self._keys:
            raise ValueError(f"{self.name}: the sample key {key!r} contains a dot or occurs twice.")
        members = {extension: image} | ({} if label is None else {"cls": b"%d" % label})
        self._keys.add(key)
        self._tar.write({"__key__": key} | members)
        where = {"cls": (0, 0)}
        for member in sorted(members):  # TarWriter writes them in this order
            size = len(members[member])
            where[member] = (self._end + _BLOCK, size)
            self._end += _BLOCK + -(-size // _BLOCK) * _BLOCK
        assert self._tar.tarstream.offset == self._end, f"tarfile did not write {key} in whole blocks"
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
        """The entry of this shard in the index. Call it after the context has ended."""
        digests = (file.hash.hexdigest() for file in (self._file, *self._tables))
        return Shard(self.name, self.split, len(self._rows), self._file.size, *digests)


class _Hashed:
    """A file to write to that computes the sha256 and the number of its bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


class ShardWriter:
    """Writes a data set. It starts a new shard when one is full or the split changes, and writes the index at the end.

        with ShardWriter(root, "digits", image_size=8, channels=1, classes=10) as writer:
            writer.write(pixels, label)

    After an error no files are left. An existing index in the folder is removed first, because its shards are replaced.

    Args:
        root: folder to write to; it is created if it is missing.
        name: name of the data set.
        image_size: side of the square images in pixels.
        channels: 1 or 3.
        classes: number of classes; 0 for images without labels.
        max_samples: largest number of samples per shard.
        max_bytes: size in bytes at which a shard is closed.
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
        self._written: dict[str, int] = {}  # number of samples by split

    def write(
        self, image: np.ndarray | bytes, label: int | None = None, split: str = "train", extension: str = "png"
    ) -> None:
        """Append a sample: pixels uint8 (C, H, W), which are stored as PNG, or an encoded image with its extension.

        Raises:
            ValueError: the pixels have the wrong shape or type, or the label is outside [0, classes).
        """
        if isinstance(image, np.ndarray):
            shape = (self.channels, self.image_size, self.image_size)
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(f"{self.name}: got an image {image.dtype} {image.shape}, expected uint8 {shape}.")
            image, extension = encode_png(image), "png"
        if (label is None) != (self.classes == 0) or (label is not None and not 0 <= label < self.classes):
            expected = f"an integer from 0 to {self.classes - 1}" if self.classes else "None, because classes=0"
            raise ValueError(f"{self.name}: got label={label}, expected {expected}.")
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
