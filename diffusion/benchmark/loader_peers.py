"""Measurement of one loader in its own process: the seconds, CPU time and memory that its batches take.

    python -I diffusion/benchmark/loader_peers.py JSON        MosaicML streaming, in an environment that has it

This file runs without the rest of the package, because MosaicML streaming needs an older numpy. It imports only torch,
NumPy, Pillow, the peer and the standard library. The other loaders (loader_sides.py) are measured by the same
functions:

- A loader is idle when its workers have decoded all batches that they may decode ahead. The measurement waits until it
is
  idle, takes `ahead` + `batches` batches, and waits until it is idle again. In this time as many batches are decoded as
  were taken. The CPU time per image is that of this process and its workers, user and system, divided by the images of
  all these batches. So every decoded image is counted exactly once.
- The clock runs during the last `batches` batches. The first `ahead` batches, which were decoded before, are taken
before
  it starts, which takes milliseconds. When it stops, the workers have decoded as little ahead as when it started.
- Before the first measurement, processes are started, files are opened and the first batches are taken.
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

PREFETCH = 2  # batches decoded ahead by each worker, the default of torch's DataLoader
LOOK_SECONDS, REST_SHARE, REST_SECONDS = 0.05, 0.1, 60.0
IMAGE_EXTENSIONS = ("png", "jpg", "webp", "npy")


# ---- reading the tars ----


def stored(tars: Iterable[str | os.PathLike]) -> Iterator[tuple[bytes, int]]:
    """The bytes of the image, and the label or 0, of every sample in the tars, in their order."""
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
    """Decode an image to uint8 (C, H, W). A copy of `decode_image` for an environment without the package."""
    if data.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(data), allow_pickle=False)
    else:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    assert array.shape == (channels, image_size, image_size), array.shape
    return array


# ---- measuring a loader ----


def cpu_seconds(process: int) -> float:
    """User and system time of a running process, with all its threads, to the nanosecond.

    Raises:
        OSError: there is no such process.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock))
    if error:
        raise OSError(error, f"process {process}: {os.strerror(error)}")
    return time.clock_gettime(clock.value)


def memory_mb(process: int) -> dict[str, float]:
    """RSS and PSS of a process in MB of 10^6 bytes. PSS divides each shared page among the processes that use it."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name.rstrip(":"): int(number) for name, number, *_ in map(str.split, lines)}
    return {"rss": kib["Rss"] * 1024 / 1e6, "pss": kib["Pss"] * 1024 / 1e6}


class Stopwatch:
    """Takes batches from a loader and measures what they cost, as described above.

    Args:
        batches: an iterable of dictionaries with `image`, endless or long enough.
        ahead: number of batches that may be decoded ahead; 0 without workers.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], ahead: int) -> None:
        others = {process.pid for process in multiprocessing.active_children()}  # not workers of the loader
        self.ahead, self._iterator = ahead, iter(batches)
        first = next(self._iterator)["image"]
        self.shape, self.dtype = tuple(first.shape), str(first.dtype)
        for _ in range(ahead):  # then every worker has returned a batch and opened its files
            next(self._iterator)
        self._workers = [p.pid for p in multiprocessing.active_children() if p.pid not in others]
        self.rest()

    def _cpu(self) -> float:
        return time.process_time() + sum(map(cpu_seconds, self._workers))

    def rest(self) -> None:
        """Wait until the workers are idle: until all of them use almost no CPU time.

        Raises:
            RuntimeError: they do not become idle within REST_SECONDS.
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
        """Take batches, and return `images` and their `seconds`, `decoded` images and their `cpu_seconds`."""
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
        """Shape and dtype of the batches, and versions of the libraries."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow")}
        versions |= {"python": platform.python_version(), "libjpeg": features.version("libjpeg_turbo")}
        return {"shape": self.shape, "dtype": self.dtype, "versions": versions}

    def memory(self) -> list[dict[str, float]]:
        """The memory of each idle worker."""
        self.rest()
        return [memory_mb(worker) for worker in self._workers]


def serve(make: Callable[[], tuple[Stopwatch, str]]) -> None:
    """Answer each line of the standard input with a line of JSON, until the input ends.

    The first line of output describes the loader. Then "N" is answered with the cost of N batches, and "memory" with
    the memory of the workers. A failure is answered with {"error": ...}, and ends the process. All other output goes to
    the standard error.

    Args:
        make: builds the loader; returns its Stopwatch, and its name and version.
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
        except Exception:  # the caller waits for an answer, and this process may wait for its workers
            answer({"error": traceback.format_exc()})


# ---- MosaicML streaming ----


def write_mds(tars: list[str], folder: str) -> None:
    """Write the same samples in the format of MosaicML."""
    streaming = importlib.import_module("streaming")  # by name, because it is not a dependency of the package
    with streaming.MDSWriter(out=folder, columns={"image": "bytes", "label": "int"}) as writer:
        for image, label in stored(tars):
            writer.write({"image": image, "label": label})


def mosaicml(settings: dict[str, Any]) -> DataLoader:
    """Its shuffled dataset with torch's DataLoader. One long epoch, so that no pause between epochs is measured."""
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
    """The arguments of the DataLoader that are the same for all peers."""
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
