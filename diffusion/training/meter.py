"""What a run reports while it trains: metrics.csv, the loggers, and the progress bar.

Every `log_every` steps the sums that the module kept on the device are fetched, averaged over all processes, and
written as one row. That is the only moment at which training waits for the device.
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

STAND_INS = "train/stand_ins"  # images so far in the place of samples that could not be decoded
NAMES = ("train/loss", "train/loss_q1", "train/loss_q2", "train/loss_q3", "train/loss_q4", STAND_INS, "train/grad_norm")


class RunLogger(Logger):
    """Where the figures of a run go: Lightning's rows of numbers and, unless a logger leaves them out, pictures and
    scores. It lives from the start of the run to after its last score, which is longer than Lightning's `fit`."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is in the run folder before training begins."""

    def start(self, say: Callable[[str], None], record: Recorded) -> None:
        """Before training, on rank 0; `say` tells the user where to look."""

    def log_picture(self, path: Path, step: int) -> None:
        """A grid of samples that has been saved."""

    def log_scores(self, rows: list[dict[str, Any]], step: int, prefix: str = "eval") -> None:
        """Lines of results.jsonl: a column eval/NAME each."""
        self.log_metrics({f"{prefix}/{row['name']}": row["value"] for row in rows}, step)

    def close(self, status: int) -> None:
        """After the last score, or after a stop or a failure, with the exit status; must not raise."""


class MetricsCsv(RunLogger):
    """metrics.csv: one row a step, columns as they come up. A resumed run cuts the rows beyond its checkpoint."""

    def __init__(self, path: Path, on_error: OnError | None = None) -> None:
        super().__init__()
        self.path, self.on_error = path, on_error or OnError()
        self._columns: list[str] | None = None  # as they stand in the file; None: not looked at yet
        self._last = -1

    name = "csv"
    version = ""

    def rows(self) -> list[dict[str, str]]:
        """The rows of the file, to be written again; damaged ones, and one that a kill has cut off, are left out."""
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
        """Drop the rows of steps that will be trained again, and a last row that a kill has cut off."""
        if self.path.is_file():
            self._write([r for r in self.rows() if int(r["step"]) <= step])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of this step; a new column rewrites the file, once."""
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
    """Every `every` steps: mean loss, by quartile of t too, gradient norm, learning rate, images/s, of several ranks
    what each step sends of gradients, and on a GPU the most memory held so far, to all loggers.

    But for images/s and memory, a row is a function of its step alone, wherever the run was interrupted before.

    Args:
        every: steps between two rows.
        batch_size: images per optimizer step, over all processes.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        if every < 1:
            raise ValueError(f"log_every={every} is not at least 1.")
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
    """Bytes of gradients that every optimizer step sums over the ranks: of DDP's buckets."""
    sizes = model._get_ddp_logging_data()
    sizes = sizes.get("rebuilt_bucket_sizes") or sizes["bucket_sizes"]
    return sum(int(size) for size in str(sizes).split(","))


class Bar(Callback):
    """Progress of training, with loss and images/s.

    Args:
        meter: whose latest row is shown.
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
    return sum(p.numel() for p in network.parameters())
