"""CIFAR-10 as its makers distribute it: the python and the binary archive, as .tar.gz or unpacked.

Krizhevsky 2009. The batches of the python archive are pickles. They are read by an unpickler that knows five names,
and even those stand for objects of this file that merely hold what they are given: no function that a pickle names is
ever called, whatever it names, and nothing but such objects is changed.
"""

import gzip
import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data.sources.arrays import Arrays, ArraySource
from diffusion.data.sources.tar import compression_of, members_of_tar

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PYTHON = {f"data_batch_{n}": "train" for n in range(1, 6)} | {"test_batch": "test"}
BINARY = {f"{name}.bin": split for name, split in PYTHON.items()}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
PIXELS = 3 * 32 * 32
BATCH_BYTES = 1 << 25  # one batch has 31 MB
ARCHIVE_BYTES = 1 << 30  # unpacked; both archives have 184 MB. What has more is another one
STEPS = 1_000_000  # of a batch's pickle, which has about 40,000: each may take memory


def cifar_source(path: Path) -> ArraySource | None:
    """The 50,000 training and 10,000 test images of an archive or a folder; None where there is no batch of them.

    Raises:
        ValueError: a batch is missing or is not what it should be.
    """
    found = _in_folder(path) if path.is_dir() else _in_tar(path)
    if not found:
        return None
    for form, batches, read in (("binary", BINARY, binary_batch), ("python", PYTHON, python_batch)):
        if not batches.keys() & found.keys():
            continue
        missing = sorted(batches.keys() - found.keys())
        if missing:
            raise ValueError(f"source={path}: this {form} archive of CIFAR-10 lacks {', '.join(missing)}.")
        parts = []
        for name, split in batches.items():
            try:
                parts.append(Arrays(split, *read(found[name]), f"{name.removesuffix('.bin')}-"))
            except Exception as error:  # whatever a damaged pickle raises
                raise ValueError(f"source={path}: {name} is no batch of CIFAR-10: {error}.") from error
        return ArraySource(f"CIFAR-10, the {form} archive", CLASSES, parts)
    return None


def _in_folder(path: Path) -> dict[str, bytes]:
    for folder in (path, *(path / name for name in FOLDERS)):
        names = [name for name in PYTHON.keys() | BINARY.keys() if (folder / name).is_file()]
        for name in names:
            if (folder / name).stat().st_size > BATCH_BYTES:
                raise _too_large(path, name)
        if names:
            return {name: (folder / name).read_bytes() for name in names}
    return {}


def _in_tar(path: Path) -> dict[str, bytes]:
    found = {}
    packed = compression_of(path) == "gzip"
    with gzip.open(path) if packed else open(path, "rb") as file:
        for member in members_of_tar(file, ARCHIVE_BYTES if packed else None):
            name = member.name.rpartition("/")[2]
            if member.isreg() and name in PYTHON.keys() | BINARY.keys():
                if member.size > BATCH_BYTES:
                    raise _too_large(path, name)
                file.seek(member.offset_data)
                found[name] = file.read(member.size)
    return found


def _too_large(path: Path, name: str) -> ValueError:
    return ValueError(f"source={path}: {name} is no batch of CIFAR-10: it has more than {BATCH_BYTES:,} bytes.")


def binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a label and 3072 pixels -> uint8 (N, 32, 32, 3) and N labels."""
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(f"{len(data):,} bytes are not rows of {1 + PIXELS}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return _images(rows[:, 1:], rows[:, 0])


def python_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A pickled batch -> uint8 (N, 32, 32, 3) and N labels."""
    for step, _ in enumerate(pickletools.genops(data)):
        if step > STEPS:
            raise ValueError(f"a pickle of more than {STEPS:,} steps")
    content = PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(content, Mapping):
        raise ValueError("it holds no table of data and labels")
    pixels, labels = content.get(b"data"), content.get(b"labels")
    if not isinstance(pixels, HeldArray) or not isinstance(labels, list):
        raise ValueError("it holds no data and labels")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError("a label is outside 0..9")
    return _images(pixels.bytes_of(len(labels), PIXELS), np.array(labels, np.uint8))


def _images(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if labels.max(initial=0) >= len(CLASSES):
        raise ValueError(f"the label {labels.max()} is outside 0..9")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


# ---- pickles without their power ----


class HeldDtype:
    """Stands for numpy.dtype in a pickle: holds the type's name."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment: of no meaning for uint8."""


class HeldArray:
    """Stands for a pickled array: holds its state."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_of(self, rows: int, columns: int) -> np.ndarray:
        """uint8 (rows, columns); ValueError when it is another array."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("the array has no content")
        _, shape, dtype, fortran, data = self.state
        named = isinstance(dtype, HeldDtype) and dtype.name in ("u1", b"u1")
        sized = isinstance(data, bytes) and shape == (rows, columns) and len(data) == rows * columns > 0
        if not named or not sized:
            raise ValueError(f"the array is not uint8 ({rows}, {columns})")
        return np.frombuffer(data, np.uint8).reshape((rows, columns), order="F" if fortran else "C")


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands for _codecs.encode, by which pickles of protocol 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it encodes by {encoding!r}")
    return text.encode("latin1")


class PlainUnpickler(pickle._Unpickler):
    """An unpickler for dicts, lists, numbers, bytes and uint8 arrays. Any name but theirs is refused.

    The one written in Python: the faster one takes as much memory as a pickle of ten bytes asks for.
    """

    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): HeldArray,
        ("numpy._core.multiarray", "_reconstruct"): HeldArray,
        ("numpy", "ndarray"): HeldArray,
        ("numpy", "dtype"): HeldDtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not called") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names an object outside itself")

    def load_build(self) -> None:
        """Give an object its state; pickle's own would also set attributes of a class or a function."""
        state, held = self.stack.pop(), self.stack[-1]
        if not isinstance(held, HeldArray | HeldDtype):
            raise pickle.UnpicklingError(f"it changes a {type(held).__name__}")
        held.__setstate__(state)

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}
