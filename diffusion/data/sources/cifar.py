"""The source for CIFAR-10 as it is distributed: the python or the binary archive, as .tar.gz or unpacked.

Krizhevsky 2009. The batches of the python archive are pickles. They are read by an unpickler that knows five names.
Even these are replaced by classes of this file that only store their arguments. So no function that a pickle names is
called, and no other object is changed.
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
ARCHIVE_BYTES = 1 << 30  # largest unpacked archive; both archives have 184 MB
STEPS = 1_000_000  # largest number of opcodes of a pickle, each of which may use memory; a batch has about 40,000


def cifar_source(path: Path) -> ArraySource | None:
    """The 50,000 training images and 10,000 test images of an archive or a folder; None if it has no batch of CIFAR-10.

    Raises:
        ValueError: a batch is missing or damaged.
    """
    found = _in_folder(path) if path.is_dir() else _in_tar(path)
    if not found:
        return None
    for form, batches, read in (("binary", BINARY, binary_batch), ("python", PYTHON, python_batch)):
        if not batches.keys() & found.keys():
            continue
        missing = sorted(batches.keys() - found.keys())
        if missing:
            raise ValueError(
                f"source={path}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in this {form} "
                "archive of CIFAR-10."
            )
        parts = []
        for name, split in batches.items():
            try:
                parts.append(Arrays(split, *read(found[name]), f"{name.removesuffix('.bin')}-"))
            except Exception as error:  # a damaged pickle can raise anything
                raise ValueError(f"source={path}: {name} is not a batch of CIFAR-10: {error}.") from error
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
    return ValueError(f"source={path}: {name} is not a batch of CIFAR-10: it has more than {BATCH_BYTES:,} bytes.")


def binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read rows of a label and 3072 pixels: uint8 (N, 32, 32, 3) and N labels."""
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(f"{len(data):,} bytes are not rows of {1 + PIXELS:,} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return _images(rows[:, 1:], rows[:, 0])


def python_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read a pickled batch: uint8 (N, 32, 32, 3) and N labels."""
    for step, _ in enumerate(pickletools.genops(data)):
        if step > STEPS:
            raise ValueError(f"its pickle has more than {STEPS:,} opcodes")
    content = PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    if not isinstance(content, Mapping):
        raise ValueError("it has no table of data and labels")
    pixels, labels = content.get(b"data"), content.get(b"labels")
    if not isinstance(pixels, HeldArray) or not isinstance(labels, list):
        raise ValueError("it has no data and labels")
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ValueError("a label is outside 0..9")
    return _images(pixels.bytes_of(len(labels), PIXELS), np.array(labels, np.uint8))


def _images(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if labels.max(initial=0) >= len(CLASSES):
        raise ValueError(f"the label {labels.max()} is outside 0..9")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


# ---- reading pickles without executing them ----


class HeldDtype:
    """Replaces numpy.dtype in a pickle. It stores the name of the type."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and alignment, which do not matter for uint8."""


class HeldArray:
    """Replaces a pickled array. It stores its state."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_of(self, rows: int, columns: int) -> np.ndarray:
        """The array, uint8 (rows, columns). Raises ValueError if it has another type or shape."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("the array has no content")
        _, shape, dtype, fortran, data = self.state
        named = isinstance(dtype, HeldDtype) and dtype.name in ("u1", b"u1")
        sized = isinstance(data, bytes) and shape == (rows, columns) and len(data) == rows * columns > 0
        if not named or not sized:
            raise ValueError(f"the array is not uint8 ({rows}, {columns})")
        return np.frombuffer(data, np.uint8).reshape((rows, columns), order="F" if fortran else "C")


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """Replaces _codecs.encode, with which pickles of protocol 2 write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it uses the encoding {encoding!r}, expected latin1")
    return text.encode("latin1")


class PlainUnpickler(pickle._Unpickler):
    """An unpickler for dicts, lists, numbers, bytes and uint8 arrays. Any other name is an error.

    It derives from the Python implementation. The faster C implementation would allocate as much memory as a pickle of
    ten bytes requests.
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
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names an external object")

    def load_build(self) -> None:
        """Set the state of an object. pickle's version would also set attributes of a class or a function."""
        state, held = self.stack.pop(), self.stack[-1]
        if not isinstance(held, HeldArray | HeldDtype):
            raise pickle.UnpicklingError(f"it changes a {type(held).__name__}")
        held.__setstate__(state)

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}
