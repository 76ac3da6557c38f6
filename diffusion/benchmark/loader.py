"""Comparison of our loader with others on this machine.

Photos are JPEGs in shards, decoded by worker processes. The peers are torch's DataLoader that decodes the same bytes
from memory, a plain webdataset pipeline, and MosaicML streaming if `loader.peers_python` has it. Small images are a set
that is kept decoded in memory, without workers. The peer is rows of one uint8 tensor.

All loaders run equally often, alternating and in alternating order, because the speed of a machine drifts. A figure is
the median over the alternations of our rate or cost divided by that of the peer in the same alternation. An alternation
of the photos consists of short turns, so that all loaders have the same disturbances. After every third alternation all
processes are restarted, because the memory layout of a process changes the cost of a loader by a few per cent.
loader_peers.py describes what is measured.

The files are read from the page cache, because they have just been written or read.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from diffusion.benchmark import loader_peers
from diffusion.benchmark.loader_images import write_photos, write_small
from diffusion.benchmark.loader_sides import SIDES, stream_loader, subset
from diffusion.benchmark.settings import Loader
from diffusion.config.composer import PACKAGE
from diffusion.data.shards.index import Index
from diffusion.errors import Refusal
from diffusion.files import write_atomically
from diffusion.progress import counted
from diffusion.scoring.scores import commit

SMALL_BATCH = 128
TURN, LIFE = 8, 3  # batches per turn of a loader; alternations after which the processes are restarted
PEERS = {
    "memory": "torch's DataLoader, bytes in memory",
    "webdataset": "webdataset",
    "mosaicml": "MosaicML streaming",
    "tensor": "rows of a tensor",
}


class Bar(NamedTuple):
    """A figure and its limit: the largest or the smallest allowed ratio of ours to the peer's."""

    figure: str
    unit: str
    measure: str
    peer: str
    limit: float
    at_most: bool = False

    def text(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}"


BARS = (
    Bar("photos, CPU time per image", "ms", "cpu_ms", "memory", 1.08, at_most=True),
    Bar("photos", "images/s", "images_per_second", "memory", 0.9),
    Bar("photos", "images/s", "images_per_second", "webdataset", 1.0),
    Bar("photos", "images/s", "images_per_second", "mosaicml", 1.0),
    Bar("small, cached, no workers", "images/s", "images_per_second", "tensor", 0.5),
)


class Comparison(NamedTuple):
    """A limit and the measurements: medians of both loaders, and the median, minimum and maximum of their ratio."""

    bar: Bar
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.ratio <= self.bar.limit if self.bar.at_most else self.ratio >= self.bar.limit  # false for nan

    def line(self) -> str:
        title, digits = f"{self.bar.figure}, {self.bar.unit}; {PEERS[self.bar.peer]}", 2 if self.bar.unit == "ms" else 0
        numbers = f"{self.ours:11,.{digits}f} {self.theirs:11,.{digits}f} {self.ratio:6.2f} {self.spread():>15}"
        return f"  {title:66}{numbers}   {self.bar.text():16}{'' if self.holds else 'FAILED'}".rstrip()

    def spread(self) -> str:
        return f"{self.low:.2f} .. {self.high:.2f}"

    def row(self) -> dict[str, Any]:
        figures = {"figure": self.bar.figure, "unit": self.bar.unit, "peer": PEERS[self.bar.peer]}
        figures |= {"ours": self.ours, "theirs": self.theirs, "ratio": self.ratio, "ratios": [self.low, self.high]}
        return figures | {"bar": self.bar.text(), "holds": self.holds}


Measured = dict[str, list[dict[str, float]]]  # loader -> one measurement per alternation


def compare(bar: Bar, measured: Measured) -> Comparison:
    """Compare our measurements with those of the peer, for each alternation."""
    ours, theirs = ([m[bar.measure] for m in measured[side]] for side in ("ours", bar.peer))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    median = statistics.median
    return Comparison(bar, median(ours), median(theirs), median(ratios), min(ratios), max(ratios))


# ---- photos ----


class Side:
    """A loader in its own process, which is queried for measurements.

    Args:
        command: the command that starts it. It must answer like loader_peers.serve.
        log: file for its other output.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log = command, log
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(log, "wb") as complaints:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )

    def ask(self, question: str = "") -> Any:
        """The answer of the process to a question. Without a question: its description, when it is ready.

        Raises:
            RuntimeError: the process has failed; the message contains its output.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{question}\n" if question else "")
            self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or "null")
        if answer is None or "error" in answer:
            how = answer["error"] if answer else f"exit {self.process.wait()}"
            said = self.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{' '.join(self.command)}: {how}\n{said}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process. It ends when its input is closed; after a failure it is killed."""
        if kind is not None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def sides(index: Index, loader: Loader, scratch: Path) -> Iterator[dict[str, Side]]:
    """Context with the loaders of the photos, each in its own process, started at the same time."""
    settings = {
        "root": str(index.root),
        "tars": [str(Path(index.root) / shard.path) for shard in index.shards],
        "images": loader.images,
        "channels": index.channels,
        "image_size": index.image_size,
        "batch_size": loader.batch_size,
        "num_workers": loader.num_workers,
        "seed": 0,
        "folder": tempfile.mkdtemp(prefix="mds_", dir=scratch),
    }
    ahead = loader_peers.PREFETCH * loader.num_workers
    each = sum(ahead + batches for batches in turns(loader.batches))
    settings["total"] = (1 + 2 * ahead + LIFE * each) * loader.batch_size
    commands = {side: [sys.executable, "-m", "diffusion.benchmark.loader_sides"] for side in SIDES}
    if loader.peers_python is not None:
        commands["mosaicml"] = [str(loader.peers_python), "-I", loader_peers.__file__]
    with contextlib.ExitStack() as stack:
        started = {}
        for name, command in commands.items():
            side = Side([*command, json.dumps(settings | {"side": name})], scratch / f"{name}.log")
            started[name] = stack.enter_context(side)
        yield started


def measured_photos(index: Index, loader: Loader, scratch: Path) -> tuple[Measured, dict[str, Any]]:
    """The measurements by loader, and the description of each loader with the memory of its workers."""
    measured: Measured = {}
    for begin in range(0, loader.rounds, LIFE):
        with sides(index, loader, scratch) as started:
            about = {name: side.ask() for name, side in started.items()}
            check_same_work(about, [loader.batch_size, index.channels, index.image_size, index.image_size])
            for _ in range(begin, min(begin + LIFE, loader.rounds)):
                sums = {name: Counter() for name in started}
                for number, batches in enumerate(turns(loader.batches)):
                    for name in in_turn(list(started), number):
                        sums[name].update(started[name].ask(str(batches)))
                for name, sum_of in sums.items():
                    measured.setdefault(name, []).append(figures(sum_of))
            for name, side in started.items():
                about[name]["workers"] = side.ask("memory")
    return measured, about


def check_same_work(about: dict[str, Any], shape: list[int]) -> None:
    """Raise RuntimeError unless all loaders return uint8 batches of this shape."""
    for name, said in about.items():
        if (said["shape"], said["dtype"]) != (shape, "torch.uint8"):
            raise RuntimeError(f"{name} returns {said['dtype']} {said['shape']}, expected torch.uint8 {shape}.")


def turns(batches: int) -> list[int]:
    """The numbers of batches of the turns of an alternation."""
    return [min(TURN, batches - done) for done in range(0, batches, TURN)]


def in_turn(names: list[str], number: int) -> list[str]:
    """The names in alternating order: forwards for even numbers, backwards for odd ones."""
    return names if number % 2 == 0 else names[::-1]


def figures(sums: dict[str, float]) -> dict[str, float]:
    """Images/s, and milliseconds of CPU time per image, from sums of the results of Stopwatch.measure."""
    return {
        "images_per_second": sums["images"] / sums["seconds"],
        "cpu_ms": 1e3 * sums["cpu_seconds"] / sums["decoded"],
    }


# ---- small images ----


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch uses one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured_small(index: Index, rounds: int) -> Measured:
    """Time an epoch of batches of 128 in each alternation, in this process, without workers, with one thread.

    The loaders are ours, which has decoded all images before, and rows of one tensor (n, C, H, W) in random order.
    """
    total = index.count("train")
    batches = iter(stream_loader(index, SMALL_BATCH, seed=0, cache="memory"))
    first = [next(batches)["image"] for _ in range(-(-total // SMALL_BATCH) + 1)]
    images, steps = torch.cat(first)[:total].clone(), total // SMALL_BATCH
    del first

    def ours() -> None:
        for _ in range(steps):
            next(batches)

    def tensor() -> None:
        order = torch.randperm(total)
        for step in range(steps):
            images[order[step * SMALL_BATCH : (step + 1) * SMALL_BATCH]]

    measured: Measured = {"ours": [], "tensor": []}
    with one_thread():
        for take in (ours, tensor):
            take()
        for alternation in range(rounds):
            for name in in_turn(["ours", "tensor"], alternation):
                began = time.perf_counter()
                (ours if name == "ours" else tensor)()
                rate = steps * SMALL_BATCH / (time.perf_counter() - began)
                measured[name].append({"images_per_second": rate})
    return measured


# ---- the task ----


def check_loader(loader: Loader) -> None:
    """Check the settings of the task.

    Raises:
        Refusal: a data set is missing or too small, or the interpreter does not have MosaicML streaming.
    """
    for key, images in (("root", loader.images), ("cifar_root", loader.cifar_images)):
        root = getattr(loader, key)
        if root is not None:
            try:
                index = subset(root, images)
            except ValueError as e:
                raise Refusal(str(e).replace("data.root", f"loader.{key}")) from e
            found = index.count("train")
            if key == "cifar_root" and found < SMALL_BATCH:
                raise Refusal(
                    f"loader.{key}={root} has {counted(found, 'training image', 'training images')}, but at least "
                    f"{SMALL_BATCH} are needed."
                )
    python = loader.peers_python
    if python is None:
        return
    cure = "Create an environment that has it with bash launch/loader_peers.sh, or leave the setting out."
    question = "import importlib.metadata as m; print(m.version('mosaicml-streaming'))"
    try:
        done = subprocess.run([str(python), "-I", "-c", question], capture_output=True, text=True)
    except OSError as e:
        raise Refusal(f"loader.peers_python={python} cannot be run ({e.strerror}). {cure}") from e
    if done.returncode:
        raise Refusal(f"loader.peers_python={python} does not have MosaicML streaming. {cure}")


def introduction(index: Index, loader: Loader) -> str:
    """A line that describes the measurement of the photos."""
    images, size = index.count("train"), sum(shard.bytes for shard in index.shards)
    shards = counted(len(index.shards), "shard", "shards")
    return (
        f"Photos: {images:,} of {index.image_size}x{index.image_size} in {shards}, "
        f"{size / images / 1e3:.1f} kB per image; {counted(loader.num_workers, 'worker', 'workers')}, batch "
        f"{loader.batch_size}, {counted(loader.rounds, 'alternation', 'alternations')} of "
        f"{counted(loader.batches, 'batch', 'batches')}"
    )


def memory_line(about: dict[str, Any]) -> str:
    """A line with PSS and RSS of the largest worker of each loader."""
    largest = {name: max(said["workers"], key=lambda w: w["pss"]) for name, said in about.items() if said["workers"]}
    if not largest:
        return "Memory per worker: not measured, as no workers are used"
    parts = [f"{name} {memory['pss']:,.0f} ({memory['rss']:,.0f})" for name, memory in largest.items()]
    return f"Memory per worker, MB PSS (RSS): {', '.join(parts)}"


def main(loader: Loader, out: Path | None, say: Callable[[str], None]) -> int:
    """Measure, print the figures and write them to `out`. Returns 0 if all limits are met, 1 if one is not."""
    with tempfile.TemporaryDirectory(prefix="loader_benchmark_") as scratch:
        photos, about = run_photos(loader, Path(scratch), say)
        small = run_small(loader, Path(scratch), say)
    comparisons = [compare(bar, found) for found in (photos, small) for bar in BARS if bar.peer in found]
    say(f"  {'':66}{'ours':>11} {'theirs':>11} {'ratio':>6} {'min .. max':>15}   limit")
    for comparison in comparisons:
        say(comparison.line())
    if "mosaicml" not in about:
        say(f"  Left out: {PEERS['mosaicml']}. Create its environment with bash launch/loader_peers.sh, and give")
        say("  loader.peers_python=.venv-peers/bin/python.")
    say(memory_line(about))
    holds = all(comparison.holds for comparison in comparisons)
    if out is not None:
        found = {"machine": machine(), "settings": asdict(loader), "holds": holds}
        found |= {"rows": [c.row() for c in comparisons], "left_out": [] if "mosaicml" in about else ["mosaicml"]}
        found |= {"sides": about, "photos": photos, "small": small}
        write_atomically(out, json.dumps(found, indent=2) + "\n")
        say(f"Figures: {out}")
    say("All limits are met." if holds else "Not all limits are met.")
    return 0 if holds else 1


def run_photos(loader: Loader, scratch: Path, say: Callable[[str], None]) -> tuple[Measured, dict[str, Any]]:
    """Measure the photos."""
    if loader.root is None:
        write_photos(scratch / "photos", loader.images, loader.image_size)
    index = subset(str(loader.root or scratch / "photos"), loader.images)
    say(introduction(index, loader))
    return measured_photos(index, loader, scratch)


def run_small(loader: Loader, scratch: Path, say: Callable[[str], None]) -> Measured:
    """Measure the small images."""
    if loader.cifar_root is None:
        write_small(scratch / "small", loader.cifar_images)
    index = subset(str(loader.cifar_root or scratch / "small"), loader.cifar_images)
    images, size = index.count("train"), index.image_size
    rounds = counted(loader.rounds, "alternation", "alternations")
    say(f"Small: {images:,} images of {size}x{size}, batch {SMALL_BATCH}, {rounds} of one epoch")
    return measured_small(index, loader.rounds)


def machine() -> dict[str, Any]:
    """The processor, its load average, and the commit."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    about = {"cpu": models[0].partition(":")[2].strip() if models else "unknown", "cpus": os.cpu_count()}
    return about | {"load_average": os.getloadavg()[0], "commit": commit()}
