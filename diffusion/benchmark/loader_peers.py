"""One loader in a process of its own: its batches, and what they cost in seconds, in CPU time and in memory.

    python -I diffusion/benchmark/loader_peers.py JSON        MosaicML streaming, in an environment that has it

Runs without the rest of the package, because MosaicML streaming needs an older numpy than it: of what is imported here
only torch, NumPy, Pillow and the peer itself are not in the standard library. The other loaders (loader_sides.py) are
measured by the same functions:

- A loader is at rest when its workers have decoded ahead what they may and wait. It is brought to rest, and from there
  `ahead` + `batches` batches are taken and it is brought to rest again. As many batches are decoded between the two
  rests as were taken, so CPU time is that of this process and of its workers, user and system, from rest to rest, over
  the images of all of these batches: nothing is decoded for free, and nothing is counted that is not handed out.
- The clock runs over the last `batches` of them. The first `ahead`, which were decoded before, are taken before it
  starts, which takes milliseconds; when it stops the workers have as little of the next ones as when it started.
- Processes are started, files opened and the first batches taken before the first rest.
"""

import ctypes
import importlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import platform
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from torch.utils.data import DataLoader

PREFETCH = 2  # batches decoded ahead by each worker: the default of torch's DataLoader
LOOK_SECONDS, REST_SHARE, REST_SECONDS = 0.05, 0.1, 60.0
IMAGE_EXTENSIONS = ("png", "jpg", "webp", "npy")


# ---- what is in the tars ----


def stored(tars: Iterable[str | os.PathLike]) -> Iterator[tuple[bytes, int]]:
    """(bytes of the image, label or 0) of every sample in the tars, in their order."""
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            members = ((*m.name.partition(".")[::2], tar.extractfile(m).read()) for m in tar if m.isfile())
            for _, sample in itertools.groupby(members, key=lambda member: member[0]):
                found = {extension: data for _, extension, data in sample}
                image = next(found[extension] for extension in IMAGE_EXTENSIONS if extension in found)
                yield image, label_of(found)


def label_of(sample: dict[str, Any]) -> int:
    """The integer of `cls`, or `label` in `json`; 0 for a sample that has neither."""
    label = json.loads(sample.get("cls", sample.get("json", b"0")))
    return label["label"] if isinstance(label, dict) else label


def decode(data: bytes, channels: int, image_size: int) -> np.ndarray:
    """What `diffusion.data`'s decode_image does, for an environment without it: -> uint8 (C, H, W)."""
    if data.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    assert array.shape == (channels, image_size, image_size), array.shape
    return array


# ---- what a loader costs ----


def cpu_seconds(process: int) -> float:
    """User and system time of a running process and of all of its threads so far, to the nanosecond.

    Raises:
        OSError: there is no such process.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock))
    if error:
        raise OSError(error, f"process {process}: {os.strerror(error)}")
    return time.clock_gettime(clock.value)


def memory_mb(process: int) -> dict[str, float]:
    """RSS and PSS of a process in MB of 10^6 bytes. PSS shares each page out among all processes that have it."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name.rstrip(":"): int(number) for name, number, *_ in map(str.split, lines)}
    return {"rss": kib["Rss"] * 1024 / 1e6, "pss": kib["Pss"] * 1024 / 1e6}


class Stopwatch:
    """Takes a loader's batches and says what they cost; how is in the head of this module.

    Args:
        batches: an iterable of dictionaries with `image`, without end or long enough.
        ahead: batches that may be decoded ahead; 0 without workers.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], ahead: int) -> None:
        others = {process.pid for process in multiprocessing.active_children()}  # none of the loader's
        self.ahead, self._iterator = ahead, iter(batches)
        first = next(self._iterator)["image"]
        self.shape, self.dtype = tuple(first.shape), str(first.dtype)
        for _ in range(ahead):  # every worker has handed out a batch, and opened its files
            next(self._iterator)
        self._workers = [p.pid for p in multiprocessing.active_children() if p.pid not in others]
        self.rest()

    def _cpu(self) -> float:
        return time.process_time() + sum(map(cpu_seconds, self._workers))

    def rest(self) -> None:
        """Wait until the workers have nothing left to do: until all of them take next to no CPU time.

        Raises:
            RuntimeError: they do not come to rest.
        """
        workers, give_up = self._workers, time.monotonic() + REST_SECONDS
        before, busy = {w: cpu_seconds(w) for w in workers}, bool(workers)
        while busy:
            if time.monotonic() > give_up:
                raise RuntimeError(f"The workers still compute, {REST_SECONDS:.0f} s after the last batch was taken.")
            time.sleep(LOOK_SECONDS)
            now = {w: cpu_seconds(w) for w in workers}
            runs = any(Path(f"/proc/{w}/stat").read_text().rpartition(")")[2].split()[0] == "R" for w in workers)
            busy = runs or any(now[w] - before[w] > REST_SHARE * LOOK_SECONDS for w in workers)
            before = now

    def measure(self, batches: int) -> dict[str, float]:
        """Take this many batches: `images` and the `seconds` they took; `decoded` images and their `cpu_seconds`."""
        self.rest()
        cpu, ahead, images = self._cpu(), 0, 0
        for _ in range(self.ahead):
            ahead += len(next(self._iterator)["image"])
        began = time.perf_counter()
        for _ in range(batches):
            images += len(next(self._iterator)["image"])
        seconds = time.perf_counter() - began
        self.rest()
        return {
            "images": images,
            "seconds": seconds,
            "decoded": ahead + images,
            "cpu_seconds": self._cpu() - cpu,
        }

    def about(self) -> dict[str, Any]:
        """What it hands out, and what with."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow")}
        versions |= {"python": platform.python_version(), "libjpeg": features.version("libjpeg_turbo")}
        return {"shape": self.shape, "dtype": self.dtype, "versions": versions}

    def memory(self) -> list[dict[str, float]]:
        """Of each worker, at rest."""
        self.rest()
        return [memory_mb(worker) for worker in self._workers]


def serve(make: Callable[[], tuple[Stopwatch, str]]) -> None:
    """Answer the lines of the standard input, a line of JSON each, until it ends.

    First comes what is measured; then "N" is answered with the cost of N batches, and "memory" with that of the
    workers. A failure is answered with {"error": ...}, and ends it. What else prints goes to the standard error.

    Args:
        make: builds the loader: its watch, and its name and version.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def answer(content: Any) -> None:
            print(json.dumps(content), file=out, flush=True)

        try:
            watch, peer = make()
            answer(watch.about() | {"peer": peer})
            for line in sys.stdin:
                answer(watch.memory() if line.strip() == "memory" else watch.measure(int(line)))
        except Exception:  # whoever asked waits for an answer: this process may outlive its failure, for its workers
            answer({"error": traceback.format_exc()})


# ---- MosaicML streaming ----


def write_mds(tars: list[str], folder: str) -> None:
    """The same bytes in MosaicML's own format."""
    streaming = importlib.import_module("streaming")  # by name: measured here, no part of the package
    with streaming.MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as writer:
        for image, label in stored(tars):
            writer.write({"image": image, "label": label})


def mosaicml(settings: dict[str, Any]) -> DataLoader:
    """Its shuffling dataset under torch's DataLoader; one long epoch, so that no pause between two is measured."""
    streaming = importlib.import_module("streaming")
    channels, image_size = settings["channels"], settings["image_size"]

    class Decoded(streaming.StreamingDataset):
        def __getitem__(self, number: int) -> dict[str, Any]:
            sample = super().__getitem__(number)
            return {"image": decode(sample["image"], channels, image_size), "label": sample["label"]}

    samples = Decoded(
        local=settings["folder"],
        batch_size=settings["batch_size"],
        shuffle=True,
        shuffle_seed=settings["seed"],
        epoch_size=settings["total"],
    )
    return DataLoader(samples, **loader_settings(settings))


def loader_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What all peers' DataLoaders are given."""
    workers = {"num_workers": settings["num_workers"]}
    if workers["num_workers"]:
        workers |= {"multiprocessing_context": "fork", "prefetch_factor": PREFETCH}
    return {"batch_size": settings["batch_size"]} | workers


def main() -> None:
    settings = json.loads(sys.argv[1])

    def make() -> tuple[Stopwatch, str]:
        write_mds(settings["tars"], settings["folder"])
        peer = f"mosaicml-streaming {importlib.metadata.version('mosaicml-streaming')}"
        return Stopwatch(mosaicml(settings), ahead=PREFETCH * settings["num_workers"]), peer

    serve(make)


if __name__ == "__main__":
    main()
