"""Pictures and scores of a model: the same code during training, at its end, and in the commands.

`Sampling` turns image numbers into images; `score` turns images into lines of results.jsonl that say what was measured.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffusion.metrics.extractors import Extractor, Features
from diffusion.metrics.scores import METRICS
from diffusion.process.schedule import Denoiser, Prediction
from diffusion.samplers.base import Sampler
from diffusion.samplers.generate import default_labels, generate

VERSIONED = ("torch", "pytorch-lightning", "torchmetrics", "torch-fidelity", "numpy")


class Counted:
    """A denoiser that counts the images it has seen, from which nfe follows, guidance included.

    Args:
        denoiser: what is called.
        attend: called before it, each time; may raise to end the sampling.
    """

    def __init__(self, denoiser: Denoiser, attend: Callable[[], None] = lambda: None) -> None:
        self.denoiser, self.attend, self.rows = denoiser, attend, 0

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
        self.attend()
        self.rows += len(x_t)
        return self.denoiser(x_t, t, labels)


@dataclass
class Sampling:
    """How images are made from a model: all that decides them but their numbers.

    denoise: what the sampler calls, guided and clipped. counted: the network inside it. num_classes: 0 for an
    unconditional model. labels: chosen ones, in turn; none for k mod classes. about: sampler's name, eta and the like,
    for the record.
    """

    denoise: Denoiser
    counted: Counted
    sampler: Sampler
    times: Sequence[float]
    image_shape: tuple[int, int, int]
    num_classes: int
    seed: int
    device: torch.device
    batch_size: int = 256
    labels: Sequence[int] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def labels_of(self, numbers: Tensor) -> Tensor | None:
        return default_labels(numbers, self.num_classes, self.labels)

    def batches(self, numbers: Tensor) -> Iterator[Tensor]:
        """uint8 (b, C, H, W) for these image numbers, on the CPU, batch by batch."""
        return generate(
            self.denoise, self.sampler, self.times, numbers, self.image_shape, self.labels_of(numbers), self.seed,
            self.batch_size, self.device,
        )  # fmt: skip

    def images(self, numbers: Tensor) -> Tensor:
        """All of them at once: uint8 (N, C, H, W)."""
        return torch.cat(list(self.batches(numbers)))

    def record(self, num_images: int) -> dict[str, Any]:
        """What results.jsonl says of the sampling; nfe as counted since the last call."""
        nfe, self.counted.rows = self.counted.rows / max(num_images, 1), 0
        return {**self.about, "num_steps": len(self.times) - 1, "nfe": nfe, "seed": self.seed}


def watched(title: str, total: int, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same batches, under a bar at a terminal, or with one line at their end."""
    console = Console(stderr=True)
    began = time.monotonic()
    if console.is_terminal:
        columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}, left")]
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task, done = bar.add_task("", total=total, rate="images"), 0
            for batch in batches:
                done += len(batch)
                rate = done / (time.monotonic() - began)
                bar.update(task, completed=done, rate=f"images, {rate:,.1f} images/s")
                yield batch
        return
    yield from batches
    seconds = time.monotonic() - began
    print(f"{title}: {total} images in {seconds:.1f} s ({total / max(seconds, 1e-9):,.1f} images/s)", file=sys.stderr)


def stored(samples: Any, size: int = 256) -> Iterator[Tensor]:
    """A split in the order of its index, as batches uint8 (size, C, H, W): of `samples.batch`."""
    for first in range(0, len(samples), size):
        yield samples.batch(np.arange(first, min(first + size, len(samples))))[0]


def commit() -> str | None:
    """The commit of the checkout this package lies in, with + where files differ from it; None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *a], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")) != folder:
            return None
        return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def score(
    images: Iterable[Tensor],
    extractor: Extractor,
    reference: Features,
    metrics: Sequence[str],
    record: Callable[[int], dict[str, Any]],
    paper: dict[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """Lines of results.jsonl, one a metric: value, the paper's value, number of images, and how all was made.

    Args:
        images: batches of uint8 (b, C, H, W).
        reference: features of the real images.
        metrics: names out of METRICS.
        record: number of images -> what is known of them: sampler, steps, nfe, seed, step of training, weights.
        paper: published values by metric.
    """
    features = extractor(images)
    known, rows = record(len(features.pooled)), []
    for name in metrics:
        values = METRICS[name](features, reference)
        extra = {k: v for k, v in values.items() if k != name}
        rows.append(
            {
                "metric": extractor.title(name), "name": name, "value": values[name], **extra,
                "reference": (paper or {}).get(name), "num_images": len(features.pooled),
                "num_reference": len(reference.pooled), **known,
                "extractor": extractor.name, "extractor_sha256": extractor.digest, "commit": commit(),
                "versions": {p: version(p) for p in VERSIONED},
            }
        )  # fmt: skip
    return rows


def describe(row: dict[str, Any]) -> str:
    """One line for a person: digits-FID 3.21 (500 images, ddim, 50 steps)."""
    value = f"{row['value']:.4g}" + (f" ± {row['is_std']:.2g}" if "is_std" in row else "")
    paper = f", paper {row['reference']}" if row.get("reference") is not None else ""
    how = f", {row['sampler']}, {row['num_steps']} steps" if "sampler" in row else ""
    return f"{row['metric']} {value} ({row['num_images']} images{how}{paper})"
