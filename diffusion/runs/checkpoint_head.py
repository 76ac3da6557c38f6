"""The head of a checkpoint, read without loading it: its step, its configuration, and the shapes of its weights.

A .ckpt is a zip archive. Its data.pkl describes everything except the numbers of the tensors. Here it is read by an
unpickler that replaces every class and function by a placeholder. So reading a head executes nothing, needs no torch,
and takes milliseconds.
"""

import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.runs.recorded import Recorded

MOST_BYTES = 1 << 24  # largest data.pkl; that of the largest network of the papers is 1 MB
MOST_NAMES = 1000  # largest number of classes and functions that a file may name; a checkpoint names three
SAFE_MODULES = ("torch", "torch._utils", "torch.storage", "torch._tensor", "torch.serialization", "torch.nn.parameter")


REFUSED = [code[0] for code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET)]


class Head(NamedTuple):
    """The head of a checkpoint.

    step: number of optimizer steps trained.
    config: configuration of the run.
    shapes, ema_shapes: shapes of the tensors of `state_dict` and of `ema`, by name.
    unsafe: functions and classes, such as `posix.system`, that loading would call and no valid checkpoint contains.
    """

    step: int
    config: Recorded
    shapes: dict[str, tuple[int, ...]]
    ema_shapes: dict[str, tuple[int, ...]]
    unsafe: tuple[str, ...]


class _Placeholder:
    """Replaces any object of a pickle. It accepts every argument and does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict(dict):
    """Replaces an ordered dict. It starts empty, whatever its arguments are."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()


class _Reader(pickle._Unpickler):
    """An unpickler in which every class and function is a placeholder. `named` are the names that the file uses.

    It derives from the Python implementation, because the C implementation allocates memory for any memo index in a
    file.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.named: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        if len(self.named) >= MOST_NAMES:
            raise pickle.UnpicklingError("too many names")
        self.named[f"{module}.{name}"[:200]] = None
        return _Dict if (module, name) == ("collections", "OrderedDict") else _Placeholder

    def persistent_load(self, pid: Any) -> Any:
        return _Placeholder()

    def refuse(self) -> None:
        raise pickle.UnpicklingError("an operation that no checkpoint needs")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def _check_keys(self, keys: list[Any]) -> None:
        """Allow text and integers only: hashing a key of nested tuples can take for ever."""
        if not all(isinstance(key, str | int) for key in keys):
            raise pickle.UnpicklingError("a key that is neither text nor a number")

    # Byte arrays would allocate the size that the file states before reading it; sets would hash their members.
    dispatch = pickle._Unpickler.dispatch | {
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict,
        **dict.fromkeys(REFUSED, refuse),
    }  # fmt: skip


def read_head(path: Path) -> Head:
    """Read the head of a checkpoint file.

    Raises:
        ValueError: it is not a checkpoint of this program. The message is a clause without the path.
    """
    if not path.is_file():  # also for a pipe, which would block
        raise ValueError("file not found")
    reader = _Reader(_pickle_of(path))
    try:
        content = reader.load()
    except Exception as error:  # damaged bytes can raise anything, also RecursionError and MemoryError
        if unsafe := unsafe_names(reader.named):
            return Head(0, Recorded({}, ""), {}, {}, unsafe)
        raise ValueError(f"it cannot be read as a checkpoint ({type(error).__name__})") from error
    unsafe = unsafe_names(reader.named)
    if unsafe:
        return Head(0, Recorded({}, ""), {}, {}, unsafe)
    wanted = ("global_step", "state_dict", "ema", "config")
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"it is not a checkpoint of this program: it has no {', '.join(sorted(missing))}")
    step = content["global_step"]
    if type(step) is not int or not 0 <= step < 1 << 62:
        raise ValueError("it is not a checkpoint of this program: its global_step is not a valid number of steps")
    try:
        config = Recorded(content["config"], "its configuration")
    except ValueError as error:
        raise ValueError(str(error).removesuffix(".")) from error
    return Head(step, config, _shapes(content["state_dict"]), _shapes(content["ema"]), ())


def unsafe_names(named: Iterable[str]) -> tuple[str, ...]:
    """The names that no valid checkpoint contains: all except torch's tensors and storages, and ordered dicts."""
    found = {}
    for name in named:
        module, _, _ = name.rpartition(".")
        if name != "collections.OrderedDict" and module not in SAFE_MODULES:
            found[name[:100]] = None
    return tuple(found)


def _pickle_of(path: Path) -> bytes:
    """The bytes of data.pkl; for an unsafe pickle that is not in a zip archive, the beginning of the file.

    Raises:
        ValueError: the file is truncated or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ValueError("it is a zip archive, but not a checkpoint")
            with archive.open(names[0]) as member:
                data = member.read(MOST_BYTES + 1)
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES)
        if unsafe_names(_named_in(data)):
            return data
        raise ValueError(f"it is truncated or not a checkpoint ({error})") from error
    except ValueError:
        raise
    except Exception as error:  # each compression method has its own errors
        raise ValueError(f"it is truncated or not a checkpoint ({error})") from error
    if len(data) > MOST_BYTES:
        raise ValueError(f"its data.pkl is larger than {MOST_BYTES >> 20} MB, so it is not a checkpoint")
    return data


def _named_in(data: bytes) -> Iterable[str]:
    """The names in the beginning of a pickle; nothing if the bytes are not a pickle."""
    reader = _Reader(data)
    try:
        reader.load()
    except Exception:  # as in read_head
        pass
    return reader.named


def _shapes(content: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a dict; (-1,) for other values; {} if it is not a dict."""
    found = {}
    for name, tensor in content.items() if isinstance(content, dict) else ():
        arguments = getattr(tensor, "arguments", ())
        size = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], tuple) else (-1,)
        found[str(name)] = size
    return found
