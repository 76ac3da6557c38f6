"""The training part of a run: the Trainer, its callbacks, and the handling of signals and failures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy

from diffusion.distributed.place import Place
from diffusion.distributed.processes import environment
from diffusion.distributed.ranks import NEVER, Ranks
from diffusion.distributed.signals import STEP, Signals
from diffusion.progress import counted
from diffusion.runs.folder import OnError, RunFolder
from diffusion.settings import Count, settings
from diffusion.training.callbacks import Look
from diffusion.training.changed_data import look_together
from diffusion.training.checkpoint import CheckpointWriter, Saver, Saving
from diffusion.training.ema import EMA
from diffusion.training.fingerprint import Fingerprints
from diffusion.training.meter import Bar, Meter, RunLogger
from diffusion.training.module import DiffusionModule
from diffusion.training.nonfinite import Finite


@settings("trainer")
@dataclass(frozen=True)
class Length:
    """The length of a run, and the number of micro-batches.

    Args:
        max_steps: optimizer steps.
        accumulate: micro-batches per optimizer step; the batch size does not change.
    """

    max_steps: Count
    accumulate: Count = 1


@dataclass(frozen=True)
class Training:
    """The parts and settings of training.

    Args:
        devices: processes per machine.
        num_nodes: machines.
        log_every: steps between two rows of metrics.csv.
        fingerprint_every: steps between two fingerprints; 0 means none.
        max_nonfinite: steps that may be skipped.
        deterministic: make training reproducible to the bit on a GPU and on several processes too.
        callbacks: further callbacks of the user.
        arguments: further arguments of Lightning's Trainer.
    """

    module: DiffusionModule
    data: LightningDataModule
    ema: EMA
    folder: RunFolder
    writer: CheckpointWriter
    loggers: Sequence[RunLogger]
    length: Length
    saving: Saving
    on_error: OnError
    devices: int = 1
    num_nodes: int = 1
    log_every: int = 50
    fingerprint_every: int = 0
    max_nonfinite: int = 10
    deterministic: bool = False
    callbacks: Sequence[Callback] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Steps(Callback):
    """Reports the steps of this rank to the other ranks. begun: whether everything is restored and training began."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.begun = ranks, False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.begun = True
        self.ranks.step(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        self.ranks.step(trainer.global_step)


class NotRestored(ValueError):
    """The states in a checkpoint do not fit the run."""

    exit_status = 2  # the same command would fail again


class Fit:
    """The Trainer of a run.

    Args:
        training: parts and settings of training.
        ranks, place, signals: ranks, device and signals of this process.
        looks: evaluations of the run while it trains.
    """

    def __init__(self, training: Training, ranks: Ranks, place: Place, signals: Signals, looks: Sequence[Look]) -> None:
        self.training, self.ranks, self.place, self.signals = training, ranks, place, signals
        self.meter = Meter(training.log_every, training.data.batch_size)
        self.finite, self.steps = Finite(training.folder, training.max_nonfinite), Steps(ranks)
        self.saver = Saver(
            training.folder,
            training.writer,
            signals,
            training.saving,
            before=lambda step: any(look.due(step) for look in looks if look.long),
            settle=self._settle,
            on_error=training.on_error,
        )
        for look in looks:
            look.keep = self.saver.save_now
        self.trainer = pl.Trainer(
            accelerator=place.device.type,
            devices=training.devices,
            num_nodes=training.num_nodes,
            strategy="auto" if ranks.size == 1 else self._strategy(),
            precision="bf16-mixed" if place.precision == "bf16-mixed" else "32-true",
            max_steps=training.length.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=training.length.accumulate,
            callbacks=[
                training.ema,
                Fingerprints(training.folder.path, training.ema, training.fingerprint_every, training.on_error),
                self.meter,
                Bar(self.meter),
                self.steps,
                self.finite,
                *training.callbacks,
                self.saver,  # after the callbacks whose state is saved, and before the looks
                *looks,
            ],
            logger=list(training.loggers),
            plugins=[training.writer, environment(ranks.size)],
            enable_checkpointing=False,  # Saver replaces Lightning's
            log_every_n_steps=training.log_every,
            enable_progress_bar=False,
            **{"enable_model_summary": False, **training.arguments},
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            deterministic=training.deterministic,
            default_root_dir=training.folder.path,
        )
        # Lightning would broadcast a flag and wait for it on every batch, and handle signals in the middle of a step.
        self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self.trainer._signal_connector.register_signal_handlers = lambda: None

    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Before a save: check that the data have not changed and that the gradient of the step is finite."""
        look_together(lambda: self.training.data.look(unopened=self.ranks.main), self.ranks)
        self.finite.settle(trainer, module)

    def _strategy(self) -> DDPStrategy:
        """The DDP strategy.

        DDP rebuilds its buckets after the first step, so that a resumed run would sum in another order than an
        uninterrupted one. Where bit-exact results are promised, this is switched off. Torch does not support a static
        graph if some backward passes do not sum gradients, as with accumulation.
        """
        exact = self.training.deterministic or self.place.device.type == "cpu"
        static = not exact and self.training.length.accumulate == 1
        return DDPStrategy(
            find_unused_parameters=exact, gradient_as_bucket_view=True, static_graph=static, timeout=NEVER
        )

    def go(self, path: Path | None, say: Callable[[str], None]) -> int:
        """Train from this checkpoint, or from the beginning if None.

        Returns:
            The exit status: 0, or 128 + the number of the signal that stopped training.

        Raises:
            NotRestored: the states in the checkpoint do not fit the run.
            Exception: any error that ended training.
        """
        try:
            with self.signals.held(finishing=STEP):
                self.trainer.fit(self.training.module, datamodule=self.training.data, ckpt_path=path, weights_only=True)
                self.saver.finish()
        except Exception as error:
            if path is None or self.steps.begun or isinstance(error, OSError | ValueError):
                raise
            first = (str(error).splitlines() or [""])[0]
            raise NotRestored(
                f"{path} cannot be restored: its states do not fit this run ({type(error).__name__}: {first}). To "
                f"train from the checkpoint before it, move this file away."
            ) from error
        folder = self.training.folder.path
        if self.meter.stand_ins:
            replaced = counted(self.meter.stand_ins, "damaged image was", "damaged images were")
            say(f"Bad samples: {replaced} replaced by another image so far.")
        if self.finite.skipped:
            skipped = counted(self.finite.skipped, "step was", "steps were")
            say(f"Not finite: {skipped} skipped so far, see {folder}/nonfinite.")
        number = self.saver.stopped_by or self.ranks.signal()  # a signal may come after the last step
        if not number:
            return 0
        say(f"Stopped by signal {number} at step {self.trainer.global_step}. Run the same command to continue.")
        return 128 + number
