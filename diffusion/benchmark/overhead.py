"""The cost of making a run resumable: handling signals, saving every 500 steps, and checking that gradients are finite.

The digits are trained with and without these, alternating, with the same Trainer otherwise. Each run is long enough to
save at least once. The figure of a run is the mean time per step; the ratio is the median over the alternations. It is
printed with the typical difference between two runs without them, which is the noise of the machine.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from diffusion.benchmark.settings import Overhead
from diffusion.build.extractors import prepare_digits
from diffusion.build.run import parts_of
from diffusion.distributed.ranks import Ranks
from diffusion.distributed.signals import Signals
from diffusion.files import write_atomically
from diffusion.training.checkpoint import Saver
from diffusion.training.fit import Fit
from diffusion.training.nonfinite import Finite

WARM_UP = 20  # steps before the clock starts
LIMIT = 1.01


class Clock(Callback):
    """Measures seconds per step, from the end of step WARM_UP to the end of training."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, 0.0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.began = time.perf_counter()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.seconds = (time.perf_counter() - self.began) / (trainer.global_step - WARM_UP)


def seconds_per_step(steps: int, scratch: Path, data: Path, whole: bool) -> float:
    """Train the digits from the beginning in a new folder, with (`whole`) or without these parts: seconds per step."""
    words = ["+experiment=digits", "trainer=cpu", "callbacks=none", f"data.root={data}", f"run_dir={scratch}"]
    parts = parts_of([*words, f"trainer.max_steps={steps + WARM_UP}", "save.every_steps=500"])
    signals, clock = Signals(), Clock()
    fit = Fit(parts.training, Ranks(), parts.place, signals, [])
    if not whole:
        fit.trainer.callbacks = [c for c in fit.trainer.callbacks if not isinstance(c, Saver | Finite)]
    fit.trainer.callbacks.append(clock)
    with signals if whole else tempfile.TemporaryDirectory():
        assert fit.go(None, lambda _: None) == 0
    return clock.seconds


def main(asked: Overhead, out: Path | None, say: Callable[[str], None]) -> int:
    """The task `overhead` of `diffusion.benchmark`. Returns the exit status, 0 if the limit is met."""
    steps, rounds = asked.steps, asked.rounds
    say(f"Training the digits for {steps} steps, {2 * rounds} times: with signals, saving and checks, and without")
    found: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="overhead_") as folder:
        data, number = Path(folder) / "digits", itertools.count()
        prepare_digits(data)
        for turn in range(rounds):
            for whole in (True, False) if turn % 2 else (False, True):
                found[whole].append(seconds_per_step(steps, Path(folder) / f"run_{next(number)}", data, whole))
            say(f"  {1e3 * found[True][-1]:.2f} ms with, {1e3 * found[False][-1]:.2f} ms without")
    ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
    itself = [b / a for a, b in itertools.pairwise(found[False])] or [1.0]
    spread = statistics.median(abs(ratio - 1) for ratio in itself)
    ratio = statistics.median(ratios)
    holds = ratio <= max(LIMIT, 1 + 2 * spread)
    say(
        f"with / without: {ratio:.4f} ({min(ratios):.4f} .. {max(ratios):.4f}). Runs without differ by {spread:.4f}. "
        f"Limit: {LIMIT:g}, or 1 plus twice that difference: {'passed' if holds else 'FAILED'}"
    )
    if out is not None:
        figures = {"with": found[True], "without": found[False], "ratio": ratio, "spread": spread, "holds": holds}
        write_atomically(out, json.dumps(figures, indent=1) + "\n")
    return 0 if holds else 1
