"""Reading and writing of checkpoints, and the callback that decides when a run is saved.

Checkpoints are written in the background, atomically, each with its digest. last.ckpt points to the newest and
best.ckpt to the best. The file is a Lightning checkpoint that `torch.load(weights_only=True)` can read: `global_step`,
`state_dict` (raw weights), `ema` (float32), `optimizer_states`, `config` (plain values), and Lightning's counters.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion.distributed.agreement import Agreement
from diffusion.distributed.ranks import mark_progress
from diffusion.distributed.signals import Signals
from diffusion.files import reason, replacing, sha256_of, write_atomically
from diffusion.runs.folder import OnError, RunFolder, fault
from diffusion.runs.recorded import Recorded
from diffusion.settings import AtLeast, Count, Number, settings


class Checkpoint(NamedTuple):
    """The content of a checkpoint that is needed for sampling.

    step: number of optimizer steps trained.
    state_dict: raw weights, by `network.NAME`.
    ema: averaged weights, by NAME, float32.
    emas: further averages, by their decays.
    config: configuration of the run that wrote the file.
    """

    step: int
    state_dict: dict[str, Tensor]
    ema: dict[str, Tensor]
    emas: dict[str, dict[str, Tensor]]
    config: Recorded


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint without executing anything that it contains.

    Raises:
        ValueError: the file is missing or damaged, is not a checkpoint of this program, or would call functions on
            loading.
    """
    content = contents(path)
    where = f"checkpoint={path}"
    emas = content.get("emas", {})
    if not isinstance(emas, dict):
        raise ValueError(f"{where} is damaged: its emas must map decays to averages.")
    groups = {"state_dict": content["state_dict"], "ema": content["ema"]}
    for key, group in {**groups, **{f"emas[{decay}]": group for decay, group in emas.items()}}.items():
        if not isinstance(group, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized
            for name, t in group.items()
        ):
            raise ValueError(f"{where} is damaged: its {key} must map names to tensors.")
    config = Recorded(content["config"], f"{where}: its configuration")
    return Checkpoint(content["global_step"], content["state_dict"], content["ema"], emas, config)


def contents(path: str | Path) -> dict[str, Any]:
    """Read the whole content of a checkpoint. Raises the same errors as `load`."""
    path = Path(path)
    wrong = fault(path)
    if wrong is not None:
        raise ValueError(f"checkpoint={path} is not used: {wrong}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for other zip archives
        try:
            unsafe = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # the file is damaged
            unsafe = ""
        wrong = f"it would call {unsafe} on loading" if unsafe else f"torch cannot read it ({type(error).__name__})"
        raise ValueError(f"checkpoint={path} is not used: {wrong}.") from error


class WriteFailed(OSError):
    """A checkpoint could not be written. Earlier checkpoints are not affected."""


class CheckpointWriter(CheckpointIO):
    """Writes checkpoints in a background thread.

    A save returns when everything is copied to the host; the next save waits for the previous one. Each file is written
    under a temporary name, synced and renamed, and its digest is recorded. So a kill at any moment leaves only complete
    files. The process does not end before the current file is written.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Start writing the checkpoint.

        Args:
            storage_options: None, or a function that is called when the file is complete.

        Raises:
            WriteFailed: the previous save has failed.
        """
        self.wait()
        copy = apply_to_collection(checkpoint, torch.Tensor, lambda t: t.detach().to("cpu", copy=True))
        self._thread = threading.Thread(target=self._write, args=(copy, Path(path), storage_options))
        self._thread.start()

    def _write(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], None] | None) -> None:
        try:
            with replacing(path) as f:
                torch.save(checkpoint, f)
                f.flush()
                write_atomically(path.with_suffix(".sha256"), sha256_of(f.name) + "\n")
            if then:
                then()
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            self._failure = WriteFailed(f"{path} cannot be written: {_cause(error)}. Earlier checkpoints are kept.")
            self._failure.__cause__ = error
        except Exception as error:  # a bug: raised in the main thread
            self._failure = error

    def check(self) -> None:
        """Raise WriteFailed if a save has failed since the last call."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait until the current write is complete. Raises WriteFailed if it has failed."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self.check()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return contents(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).with_suffix(".sha256").unlink(missing_ok=True)


def _cause(error: Exception) -> str:
    """The message of the operating system, which torch wraps in its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return reason(error).splitlines()[0]


@settings("save")
@dataclass(frozen=True)
class Saving:
    """When a run is saved, besides the last step and every stop.

    Args:
        every_steps: steps between two saves; 0 means never.
        every_minutes: minutes between two saves; 0 means never.
        keep: number of newest checkpoints to keep, besides the best.
        on_error: what happens if a checkpoint or a log cannot be written.
    """

    every_steps: Number = 5000
    every_minutes: Annotated[float, AtLeast(0)] = 30.0
    keep: Count = 3
    on_error: Literal["stop", "warn"] = "stop"


class Saver(Callback):
    """Saves every N steps, every M minutes, on a signal, at the last step, and before a long look.

    On a signal, the current step is finished and saved, and the run ends with `stopped_by` set.

    Args:
        folder: the run folder.
        writer: writer of the files.
        signals: signals of this process.
        saving: when to save, and which checkpoints to keep.
        before: whether a long look follows a step.
        settle: called before a save, with trainer and module; raises if the step must not be saved.
        on_error: what happens if a checkpoint cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        writer: CheckpointWriter,
        signals: Signals,
        saving: Saving,
        before: Callable[[int], bool] = lambda step: False,
        settle: Callable[[Trainer, LightningModule], None] = lambda trainer, module: None,
        on_error: OnError | None = None,
    ) -> None:
        self.folder, self.writer, self.signals = folder, writer, signals
        self.every_steps, self.every_minutes, self.keep = saving.every_steps, saving.every_minutes, saving.keep
        self.before, self.settle, self.on_error = before, settle, on_error or OnError()
        self.stopped_by: int | None = None
        self._seen, self._saved, self._saved_at = 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen = self._saved = trainer.global_step
        self._saved_at = time.monotonic()
        self._ranks = Agreement(trainer.world_size)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        with self.on_error:
            self.writer.check()
        due = bool(self.every_steps) and step % self.every_steps == 0 or self.before(step) or step >= trainer.max_steps
        # a signal or an elapsed interval on any rank applies to all ranks
        stopped_by, late = self._ranks.exchange(self.signals.number or 0, int(self._minutes_are_up()))
        if stopped_by:
            self.stopped_by = stopped_by
            trainer.should_stop = True
        # the clocks of other ranks are those of the step before; ignore them if that step has been saved
        late = late and not (self._ranks.later and self._saved == step - 1)
        if due or late or stopped_by:
            self.save(trainer, module, step)

    def save_now(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the current step, unless it is saved."""
        if self._saved != trainer.global_step:
            self.save(trainer, module, trainer.global_step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._ranks.settle()

    def _minutes_are_up(self) -> bool:
        return bool(self.every_minutes) and time.monotonic() - self._saved_at > 60 * self.every_minutes

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Save this step. When the file is complete, point last.ckpt to it and remove old checkpoints."""
        self.settle(trainer, module)
        path = self.folder.checkpoint_path(step)
        with self.on_error:
            self.writer.wait()
        trainer.save_checkpoint(path, storage_options=lambda: self._in_place(path))
        self._saved, self._saved_at = step, time.monotonic()

    def _in_place(self, path: Path) -> None:
        mark_progress()
        self.folder.point_last_to(path)
        best = self.folder.point_best()
        for old in self.folder.steps()[self.keep :]:
            if old != best:
                self.writer.remove_checkpoint(self.folder.checkpoint_path(old))

    def finish(self) -> None:
        """Wait for the last write."""
        with self.on_error:
            self.writer.wait()
