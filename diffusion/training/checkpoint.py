"""When and how a run is saved: whole files only, each with its digest, the newest under last.ckpt.

The file is a Lightning checkpoint that `torch.load(weights_only=True)` reads: `global_step`, `state_dict` (raw
weights), `ema` (float32), `optimizer_states`, `config` (plain), and Lightning's own counters.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from diffusion.files import replacing, sha256_of, write_atomically
from diffusion.training.run_folder import RunFolder, damage

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed. ValueError if it is missing, damaged or no checkpoint of ours."""
    path = Path(path)
    wrong = damage(path)
    if wrong is not None:
        raise ValueError(f"checkpoint={path}: {wrong}.")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torch raises many kinds for files that are zip archives but hold something else
        raise ValueError(f"checkpoint={path} cannot be read as a checkpoint ({str(e).splitlines()[0]}).") from e
    missing = {"global_step", "state_dict", "ema", "config"} - set(checkpoint)
    if missing:
        raise ValueError(f"checkpoint={path} is no checkpoint of this program: it lacks {', '.join(sorted(missing))}.")
    return checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the goal, syncs, records the digest, renames: a kill at any moment leaves whole files only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with replacing(path) as f:
            torch.save(checkpoint, f)
            f.flush()
            write_atomically(path.with_suffix(".sha256"), sha256_of(f.name) + "\n")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).with_suffix(".sha256").unlink(missing_ok=True)


class Saver(Checkpoint):
    """Saves after every other callback has run: every N steps, every M minutes, at a signal, and at the last step.

    A signal only sets a flag; the step that is under way is finished, saved, and the run ends with `stopped_by` set.

    Args:
        folder: of the run.
        every_steps, every_minutes: 0 switches one of them off.
        keep: newest checkpoints that stay.
    """

    def __init__(self, folder: RunFolder, every_steps: int, every_minutes: float, keep: int) -> None:
        self.folder, self.every_steps, self.every_minutes, self.keep = folder, every_steps, every_minutes, keep
        self.stopped_by: int | None = None
        self._seen, self._saved_at = 0, 0.0

    @contextmanager
    def signals(self, trainer: Trainer) -> Iterator[None]:
        """Around `fit`: the signals are ours, whatever stage it is in, and afterwards what they were before.

        Lightning's own handlers, which act in the middle of a step and leave with status 0, are not installed.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen, self._saved_at = trainer.global_step, time.monotonic()

    def _note(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped_by = number

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if trainer.world_size > 1:
            # Rank 0's clock and any rank's signal decide for all; at the steps where the ranks meet anyway.
            if step % trainer.log_every_n_steps and step != trainer.max_steps:
                due = bool(self.every_steps) and step % self.every_steps == 0
                if due:
                    self.save(trainer, step)
                return
            self.stopped_by = self._agree(trainer, self.stopped_by or 0) or None
            late = self._agree(trainer, int(self._minutes_are_up()))
        else:
            late = self._minutes_are_up()
        due = bool(self.every_steps) and step % self.every_steps == 0
        if self.stopped_by is not None:
            trainer.should_stop = True
        if due or late or self.stopped_by is not None or step >= trainer.max_steps:
            self.save(trainer, step)

    def _minutes_are_up(self) -> bool:
        return bool(self.every_minutes) and time.monotonic() - self._saved_at > 60 * self.every_minutes

    @staticmethod
    def _agree(trainer: Trainer, number: int) -> int:
        word = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(word, reduce_op="max"))

    def save(self, trainer: Trainer, step: int) -> None:
        """Save this step, point last.ckpt to it, remove what is older than the newest `keep`."""
        path = self.folder.checkpoint_path(step)
        trainer.save_checkpoint(path)
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            self.folder.point_last_to(path)
            for old in self.folder.steps()[self.keep :]:
                trainer.strategy.remove_checkpoint(self.folder.checkpoint_path(old))

    def exit_status(self) -> int:
        """0, or 128 + the number of the signal that stopped the run."""
        return 128 + self.stopped_by if self.stopped_by else 0

