"""How images are made from a model: the same code during training, at its end, and in the commands."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffusion.images import to_uint8
from diffusion.process.schedule import Denoiser, Prediction
from diffusion.samplers.base import Sampler
from diffusion.samplers.generate import default_labels, generate, walk
from diffusion.training.ranks import Ranks


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
    """All that decides the images of a model but their numbers.

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

    def film(self, numbers: Tensor, stages: int) -> tuple[Tensor, Tensor]:
        """How these images come about: x_t and the estimate of x0, uint8 (B, stages, C, H, W), evenly spread over the
        steps, the last stage the image itself."""
        steps = len(self.times) - 1
        wanted = [round(k * (steps - 1) / max(stages - 1, 1)) for k in range(stages)]
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        visits = walk(
            self.denoise, self.sampler, self.times, numbers, self.image_shape, self.labels_of(numbers), self.seed,
            self.device,
        )  # fmt: skip
        for step, visit in enumerate(visits):
            if step in wanted:
                kept[step] = to_uint8(visit.x).cpu(), to_uint8(visit.prediction.x0).cpu()
        noisy, estimates = zip(*(kept[step] for step in wanted), strict=True)
        return torch.stack(noisy, dim=1), torch.stack(estimates, dim=1)

    def record(self) -> dict[str, Any]:
        """What results.jsonl says of the sampling, but for the work it took."""
        steps = len(self.times) - 1
        return {**self.about, "num_steps": steps, "seed": self.seed, "batch_size": self.batch_size}

    def identity(self) -> dict[str, Any]:
        """What, beside the model, decides image k, as JSON."""
        chosen = {"times": [float(t) for t in self.times], "labels": list(self.labels), "shape": list(self.image_shape)}
        return self.record() | chosen


def watched(title: str, total: int, counts: Iterable[int], ranks: Ranks | None = None) -> Iterator[int]:
    """The same numbers, of images done, under a bar at a terminal, or with one line at their end; on rank 0 alone,
    whose share stands for all.

    Args:
        total: images of all ranks. counts: 0 for what was there before.
    """
    ranks = ranks or Ranks()
    if not ranks.main:
        yield from counts
        return
    console, began, done = Console(stderr=True), time.monotonic(), 0
    rate = lambda: done * ranks.size / max(time.monotonic() - began, 1e-9)  # noqa: E731
    if console.is_terminal:
        columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}, left")]
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total, rate="images")
            for count in counts:
                done += count
                bar.update(task, completed=min(done * ranks.size, total), rate=f"images, {rate():,.1f} images/s")
                yield count
        return
    for count in counts:
        done += count
        yield count
    there = max(total - done * ranks.size, 0)
    known = f", {there} of them were there" if there and ranks.size == 1 else ""
    speed = f" ({rate():,.1f} images/s)" if done else ""
    print(f"{title}: {total} images in {time.monotonic() - began:.1f} s{speed}{known}", file=sys.stderr)


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call at each of so many network calls: a bar at a terminal, else one line at their end."""
    console, began, done = Console(stderr=True), time.monotonic(), 0
    columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("network calls, left")]
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def called() -> None:
            nonlocal done
            done += 1
            bar.advance(task)

        yield called
    if not console.is_terminal:
        spent = time.monotonic() - began
        print(f"{title}: {done} network calls in {spent:.1f} s ({done / max(spent, 1e-9):.1f}/s)", file=sys.stderr)
