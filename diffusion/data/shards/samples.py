"""Access to samples by number: they are read by their offset and decoded.

Nothing is unpickled: an image is PNG, JPEG, WebP or a plain .npy array, a label is an integer or JSON. This module
knows the format of a sample. It knows neither the order of the samples nor where shards come from.
"""

import contextlib
import io
import itertools
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Literal, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from xxhash import xxh3_64_intdigest

from diffusion.data.shards.changes import BadSample, DataChanged, shared
from diffusion.data.shards.index import Index, sample_digest
from diffusion.data.shards.readers import CURE, LocalShards, ShardReader, Shards, changed, named, wrong_sample
from diffusion.data.shards.remote import Unreachable
from diffusion.files import Unwritable, shortage
from diffusion.settings import Share, settings

CACHE_BYTES = 1 << 30  # largest cache of decoded images with `auto`, per rank
NPY_HEADER = 1024  # largest header of a .npy file, in bytes
READ_TOGETHER = 32  # samples whose encoded bytes are read before they are decoded
OPEN_SHARDS = 320  # more than 64 lanes with windows of 4 shards; the usual limit of a process is 1024 open files
Allocate = Callable[[tuple[int, ...]], Tensor]  # returns a uint8 tensor of a shape


def _new(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def decode_image(data: bytes, channels: int, image_size: int) -> np.ndarray:
    """Decode PNG, JPEG, WebP, or .npy of uint8 (C, H, W), to uint8 (C, H, W).

    The format is detected from the first bytes. Nothing is unpickled.

    Raises:
        ValueError: the size or type is wrong. For damaged data, PIL and NumPy raise their own errors.
    """
    shape = (channels, image_size, image_size)
    if data.startswith(b"\x93NUMPY"):
        if len(data) > math.prod(shape) + NPY_HEADER:
            raise ValueError(f"an array of {len(data)} bytes, expected {shape} of uint8")
        array = _array(data)
    else:
        try:
            opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        except UnidentifiedImageError:
            raise ValueError("neither PNG, JPEG, WebP nor .npy") from None
        with opened as image:
            if image.size != (image_size, image_size):
                raise ValueError(f"an image of {image.size[0]} x {image.size[1]} pixels, expected {shape}")
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"an image {array.dtype} {array.shape}, expected uint8 {shape}")
    return array


def _array(data: bytes) -> np.ndarray:
    """Decode .npy data. The size in the header is compared with the data first, because it could be terabytes."""
    stream = io.BytesIO(data)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, by_columns, dtype = read_header(stream, max_header_size=NPY_HEADER)
    if dtype != np.uint8 or math.prod(shape) != len(data) - stream.tell():
        raise ValueError(f"its header states {dtype} {shape}, but it has {len(data) - stream.tell()} bytes of data")
    return np.frombuffer(data, np.uint8, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")


def decode_label(data: bytes, classes: int) -> int:
    """Decode a label: the text of an integer (.cls), or JSON with an integer `label`.

    Raises:
        ValueError: it is neither, or is outside [0, classes).
    """
    label = json.loads(data)
    if isinstance(label, dict):
        label = label.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise ValueError(f"its label is {label!r}, expected an integer in [0, {classes})")
    return label


@settings("data")
class Samples(Dataset):
    """The decoded samples of one split, by number in the order of the index: `samples[i] -> (image, label or None)`.

    Args:
        index: the index of the data set.
        split: the split.
        cache: `memory` keeps decoded images in memory, so that each image is decoded only once; `none` does not; `auto`
            does if the whole split takes at most `cache_bytes`. The memory is shared with worker processes that are
            forked later, but not between ranks.
        cache_bytes: the limit of `auto`.
        shards: opens the shards; None means those in the folder of the index.
        on_bad_sample: what `batch` does with a sample that cannot be decoded or does not match its digest. `error`
            raises an error. `skip` uses the next valid sample of the same shard, independent of ranks, workers and
            order. If a shard is missing or replaced, or has changed in a set without digests, it is always an error.
        max_bad_share: largest share of the split that `skip` may skip.

    Raises:
        ValueError: the split does not exist, or a value is not allowed.
    """

    def __init__(
        self,
        index: Index,
        split: str = "train",
        cache: Literal["auto", "memory", "none"] = "none",
        cache_bytes: int = CACHE_BYTES,
        shards: Shards | None = None,
        on_bad_sample: Literal["error", "skip"] = "error",
        max_bad_share: Share = 0.01,
    ) -> None:
        self.index, self.shards = index, index.of_split(split)
        self.on_bad_sample, self.max_bad_share = on_bad_sample, max_bad_share
        self.counts = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self._first, self._count = np.cumsum(self.counts) - self.counts, int(self.counts.sum())
        self._where = shards or LocalShards(index, tolerant=on_bad_sample == "skip")
        self._open: OrderedDict[int, ShardReader] = OrderedDict()  # the least recently used first
        self._bad = shared(np.bool_, len(self))
        self._cache = None
        if cache == "memory" or (cache == "auto" and math.prod(self._shape(len(self))) <= cache_bytes):
            self._cache = _Cache(self._shape(len(self)))

    def __len__(self) -> int:
        return self._count

    def _shape(self, count: int) -> tuple[int, int, int, int]:
        return count, self.index.channels, self.index.image_size, self.index.image_size

    def announce(self, numbers: list[int]) -> None:
        """Announce the shards, by number, that will be read soon, in the order in which they are needed."""
        self._where.announce([self.shards[number] for number in numbers])

    def look(self, unopened: bool = True) -> None:
        """Check that the shards of the split have not changed. Only sets in a local folder are checked.

        Args:
            unopened: also check the shards that have not been opened yet.

        Raises:
            DataChanged: a shard has changed.
        """
        self._where.look(self.shards, unopened)

    # ---- one sample ----

    def __getitem__(self, number: int) -> tuple[np.ndarray, int | None]:
        """The image, uint8 (C, H, W), which must not be written to, and its label; None in a set without labels.

        Raises:
            IndexError: no sample has this number.
            BadSample: it cannot be read or decoded; DataChanged if it has changed since the set was created.
            Unreachable: its remote shard cannot be read.
            Unwritable: there is no space to store its remote shard.
        """
        ((image, label),) = self._decoded(np.array([number]))
        return image, (label if self.index.classes else None)

    def _decoded(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """The image and the label (0 in a set without labels) of each sample, from the cache or the tar.

        READ_TOGETHER samples are read and compared with their digests before they are decoded. This is faster than
        alternating.
        """
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self._count:
            raise IndexError(f"sample numbers from {numbers.min()} to {numbers.max()} are outside [0, {self._count})")
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        where = list(zip(numbers.tolist(), shards.tolist(), (numbers - self._first[shards]).tolist(), strict=True))
        for start in range(0, len(where), READ_TOGETHER):
            encoded = []
            for number, which, place in where[start : start + READ_TOGETHER]:
                try:
                    kept = self._cache is not None and self._cache.known[number]
                    encoded.append(None if kept else self._bytes(which, place))
                except Exception as error:
                    self._fail(which, place, error)
            for (number, which, place), found in zip(where[start:], encoded, strict=False):
                if found is None:
                    yield self._cache.images[number].numpy(), int(self._cache.labels[number])
                    continue
                try:
                    image = decode_image(found[0], self.index.channels, self.index.image_size)
                    label = decode_label(found[1], self.index.classes) if self.index.classes else 0
                except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and others on damaged data
                    self._fail(which, place, error)
                if self._cache is not None:
                    self._cache.keep(number, image, label)
                yield image, label

    def _fail(self, which: int, place: int, error: Exception) -> NoReturn:
        """Raise the error itself, or a BadSample if the sample is the cause."""
        if isinstance(error, (Unreachable, Unwritable, DataChanged)) or shortage(error):
            raise error  # the sample is not the cause
        raise self._complaint(which, place, error) from error

    def _bytes(self, which: int, place: int) -> tuple[bytes, bytes]:
        """The encoded image and label (empty in a set without labels) of a sample, unchanged since the set was created.

        Raises:
            DataChanged: they have changed.
            OSError, ValueError: they cannot be read.
        """
        try:
            reader = self._reader(which)
            image, label = found = self._stored(which, reader, place)
            if reader.digests is None:
                if reader.unchanged():
                    return found
            # sample_digest inline, because the call would cost more than the digest
            elif xxh3_64_intdigest(image + label if label else image) == reader.digests[place]:
                return found
        except (Unreachable, DataChanged):
            raise
        except (OSError, ValueError):
            pass
        return self._bytes_again(which, place)

    def _bytes_again(self, which: int, place: int) -> tuple[bytes, bytes]:
        """`_bytes` after a failure: find what is wrong, or read again if the file was replaced by an identical one."""
        problem: Exception | None = None
        for _ in range(3):  # repeat if the file was replaced by an identical one
            try:
                reader = self._reader(which)
                image, label = self._stored(which, reader, place)
                if reader.digests is None:
                    if reader.unchanged():
                        return image, label
                elif sample_digest(image, label) == reader.digests[place]:
                    return image, label
                elif reader.unchanged() and (wrong := wrong_sample(self.index, self.shards[which], reader, place)):
                    raise wrong
            except (Unreachable, Unwritable, DataChanged):
                raise
            except (OSError, ValueError) as error:
                problem = error
            if wrong := self._where.wrong(self.shards[which]):
                raise wrong
            if which in self._open:
                self._open.pop(which).close()
        raise problem or changed(self.index, self.shards[which].path, "it is being written to")

    def _stored(self, which: int, reader: ShardReader, place: int) -> tuple[bytes, bytes]:
        """The encoded image and label (empty in a set without labels) of a sample, unchecked."""
        at, size, label_at, label_size = reader.offsets[place].tolist()
        image = self._read(which, reader, at, size)
        return image, (self._read(which, reader, label_at, label_size) if self.index.classes else b"")

    def _reader(self, which: int) -> ShardReader:
        if which in self._open:
            self._open.move_to_end(which)
        else:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[which] = self._where.open(self.shards[which])
        return self._open[which]

    def _read(self, which: int, reader: ShardReader, offset: int, size: int) -> bytes:
        if not 0 < size <= self.shards[which].bytes - offset:
            raise ValueError(
                f"its offsets state {size} bytes at {offset}, but the shard has {self.shards[which].bytes} bytes"
            )
        data = reader.read(offset, size)
        if len(data) != size:
            raise ValueError(f"got {len(data)} bytes at offset {offset}, expected {size}")
        return data

    def _complaint(self, which: int, place: int, error: Exception) -> BadSample:
        """The error of a bad sample, which names it; a DataChanged if its shard has changed."""
        name, end, shard = f"sample {place}", "", self.shards[which]
        with contextlib.suppress(OSError, IndexError):
            if reader := self._open.get(which):
                if reader.digests is None and (wrong := self._where.wrong(shard, afresh=True)):
                    return wrong
                name, end = named(shard, reader.offsets, place, reader.read), " The sample has not changed."
        return BadSample(
            f"data.root={self.index.root}: cannot read {name} of shard {shard.path}: "
            f"{str(error) or type(error).__name__}.{end}"
        )

    # ---- many ----

    def batch(self, numbers: np.ndarray, allocate: Allocate = _new) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Read the samples with these numbers.

        Args:
            numbers: int64 (b,).
            allocate: returns the memory for the images; new memory by default.

        Returns:
            Images, uint8 (b, C, H, W) in any memory layout; labels, int64 (b,), or None in a set without labels; and,
            if bad samples are skipped, bool (b,): whether another sample is used, else None.

        Raises:
            BadSample: a sample cannot be decoded and must not be skipped, or too many were skipped.
            DataChanged: a shard is missing or replaced, or a sample has changed and must not be skipped.
            Unreachable: a remote shard cannot be read.
        """
        self._where.glance()
        labels = torch.zeros(len(numbers), dtype=torch.int64)
        stand_ins = torch.zeros(len(numbers), dtype=torch.bool) if self.on_bad_sample == "skip" else None
        if self._cache is not None and self._cache.known[numbers].all():
            chosen, images = torch.from_numpy(numbers), allocate(self._shape(len(numbers)))
            torch.index_select(self._cache.images, 0, chosen, out=images)
            torch.index_select(self._cache.labels, 0, chosen, out=labels)
        else:
            count, channels, height, width = self._shape(len(numbers))
            images = allocate((count, height, width, channels)).permute(0, 3, 1, 2)  # the layout of decoded images
            pixels = images.numpy()
            classes = labels.numpy()
            if stand_ins is None:
                for i, found in enumerate(self._decoded(numbers)):
                    pixels[i], classes[i] = found
            else:
                for i, number in enumerate(numbers.tolist()):
                    image, label, stand_ins[i] = self._readable(number)
                    pixels[i], classes[i] = image, label or 0
        return images, (labels if self.index.classes else None), stand_ins

    def _readable(self, number: int) -> tuple[np.ndarray, int | None, bool]:
        """Image and label of this sample and False, or those of the sample that replaces it and True."""
        which = int(np.searchsorted(self._first, number, side="right")) - 1
        first, count = int(self._first[which]), int(self.counts[which])
        round_its_shard = (first + (number - first + i) % count for i in range(count))
        for other in itertools.chain(round_its_shard, range(first + count, len(self)), range(first)):
            if self._bad[other]:
                continue
            try:
                return *self[other], other != number
            except BadSample as error:
                if isinstance(error, DataChanged) and error.whole:
                    raise
                self._bad[other] = True
                print(f"skipped: {str(error).removesuffix(CURE).rstrip()}", file=sys.stderr, flush=True)
                bad = int(self._bad.sum())
                if bad > self.max_bad_share * len(self):
                    raise BadSample(
                        f"{bad} of {len(self)} samples cannot be decoded, more than data.max_bad_share="
                        f"{self.max_bad_share:g} allows. The last one: {error}"
                    ) from error
        raise BadSample(f"data.root={self.index.root}: no sample can be decoded.")


class _Cache:
    """Decoded images in memory that is shared by all forked workers.

    Two workers may decode the same sample at the same time; both write the same bytes.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.images = torch.from_numpy(shared(np.uint8, math.prod(shape))).view(shape)
        self.labels = torch.from_numpy(shared(np.int64, shape[0]))
        self.known = shared(np.bool_, shape[0])

    def keep(self, number: int, image: np.ndarray, label: int) -> None:
        """Store a sample."""
        self.images[number].numpy()[:] = image
        self.labels[number] = label
        self.known[number] = True  # last, when the content is complete
