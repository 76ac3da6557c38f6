"""Metrics of a run while it trains: metrics.csv, the loggers, and the progress bar.

Every `log_every` steps the sums that the module keeps on the device are fetched, averaged over all processes, and
written as one row. Training does not wait for the device at any other time.
"""

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from diffusion.files import STEP, append, keep_damaged, read_csv, write_atomically
from diffusion.progress import Progress
from diffusion.runs.folder import OnError
from diffusion.runs.recorded import Recorded

STAND_INS = "train/stand_ins"  # number of images so far that replaced samples that could not be decoded
NAMES = ("train/loss", "train/loss_q1", "train/loss_q2", "train/loss_q3", "train/loss_q4", STAND_INS, "train/grad_norm")


class RunLogger(Logger):
    """Base class of loggers: Lightning's metrics, and optionally pictures and scores.

    A logger is used from the start of the run until after its last score, which is longer than Lightning's `fit`.
    """

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the configuration is in the run folder before training begins."""

    def start(self, say: Callable[[str], None], record: Recorded) -> None:
        """Called before training, on rank 0. `say` prints a line for the user, such as where the logs are."""

    def log_picture(self, path: Path, step: int) -> None:
        """Log a sample grid that has been saved."""

    def log_scores(self, rows: list[dict[str, Any]], step: int, prefix: str = "eval") -> None:
        """Log rows of results.jsonl, each as a column eval/NAME."""
        self.log_metrics({f"{prefix}/{row['name']}": row["value"] for row in rows}, step)

    def close(self, status: int) -> None:
        """Called after the last score, a stop or a failure, with the exit status. It must not raise."""


class MetricsCsv(RunLogger):
    """metrics.csv: one row per logged step. Columns are added as needed."""

    def __init__(self, path: Path, on_error: OnError | None = None) -> None:
        super().__init__()
        self.path, self.on_error = path, on_error or OnError()
        self._columns: list[str] | None = None  # columns of the file; None: not read yet
        self._last = -1

    name = "csv"
    version = ""

    def rows(self) -> list[dict[str, str]]:
        """The rows of the file, without damaged rows and without a last row that a kill has truncated.

        If there are damaged rows, a copy of the file is kept, because the caller will rewrite it.
        """
        if not self.path.is_file():
            return []
        rows, unread = read_csv(self.path)
        kept = [row for row in rows if STEP.fullmatch(row.get("step", ""))]
        if unread or len(kept) < len(rows):
            keep_damaged(self.path)
        return kept

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(["step", *(k for r in rows for k in r)]))
        self._last = int(rows[-1]["step"]) if rows else -1
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())

    def cut_after(self, step: int) -> None:
        """Delete the rows of steps after `step`, which will be trained again, and a row that a kill has truncated."""
        if self.path.is_file():
            self._write([r for r in self.rows() if int(r["step"]) <= step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of this step. A new column rewrites the file."""
        with self.on_error:
            self._add(metrics, step)

    def _add(self, metrics: dict[str, float], step: int | None) -> None:
        row = {"step": step, **{k: f"{v:.8g}" for k, v in metrics.items()}}
        if self._columns is None:
            self._write(self.rows())
        if set(row) <= set(self._columns) and step > self._last:
            text = io.StringIO()
            csv.DictWriter(text, self._columns, restval="").writerow(row)
            append(self.path, text.getvalue())
            self._last = step
            return
        rows = self.rows()
        old = next((r for r in rows if int(r["step"]) == step), None)
        if old is None:
            rows.append(row)
        else:
            old.update(row)
        self._write(rows)


class Meter(Callback):
    """Sends a row of metrics to all loggers every `every` steps.

    The row has the mean loss, the loss by quartile of t, gradient norm, learning rate and images/s; on several ranks
    the size of the gradients that are summed per step; on a GPU the peak memory. Except for images/s and memory, a row
    does not depend on earlier interruptions.

    Args:
        every: steps between two rows.
        batch_size: images per optimizer step, over all processes.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        if every < 1:
            raise ValueError(f"log_every={every} must be at least 1.")
        self.every, self.batch_size = every, batch_size
        self.latest: dict[str, float] = {}
        self.stand_ins = 0
        self._seen, self._since = 0, (0, 0.0)

    def state_dict(self) -> dict[str, int]:
        return {"stand_ins": self.stand_ins}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stand_ins = state["stand_ins"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen = trainer.global_step
        self._since = (trainer.global_step, time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if step % self.every and step != trainer.max_steps:
            return
        counts = module.take_counts()
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
        values, numbers = counts.cpu()
        now = time.monotonic()
        row = {n: float(v / c) for n, v, c in zip(NAMES, values, numbers, strict=True) if c}
        if STAND_INS in row:
            self.stand_ins += int(values[NAMES.index(STAND_INS)])
            row[STAND_INS] = self.stand_ins
        row["train/lr"] = module.rate
        row["train/images_per_second"] = (step - self._since[0]) * self.batch_size / max(now - self._since[1], 1e-9)
        if trainer.world_size > 1:
            row["train/allreduced_mb"] = allreduced_bytes(trainer.strategy.model) / 1e6
        if module.device.type == "cuda":
            row["train/peak_memory_gb"] = torch.cuda.max_memory_allocated(module.device) / 1e9
        self._since, self.latest = (step, now), row
        for logger in trainer.loggers:
            logger.log_metrics(row, step)


def allreduced_bytes(model: torch.nn.parallel.DistributedDataParallel) -> int:
    """Bytes of gradients that are summed over the ranks in every optimizer step: the size of DDP's buckets."""
    sizes = model._get_ddp_logging_data()
    sizes = sizes.get("rebuilt_bucket_sizes") or sizes["bucket_sizes"]
    return sum(int(size) for size in str(sizes).split(","))


class Bar(Callback):
    """Shows the progress of training, with loss and images/s.

    Args:
        meter: the meter whose latest row is shown.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._progress = Progress("step", trainer.max_steps, "", trainer.global_step, summary=False)
            self._progress.__enter__()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self._progress is None:
            return
        self._progress.to(trainer.global_step, self.figures())
        if trainer.global_step == trainer.max_steps:
            self._progress.line(self.figures())
            self._close()

    def figures(self) -> str:
        row = self.meter.latest
        return f"loss {row['train/loss']:.4f}  {row['train/images_per_second']:,.0f} images/s" if row else ""

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None)
            self._progress = None


def count_parameters(network: torch.nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(p.numel() for p in network.parameters())
