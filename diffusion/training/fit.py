"""The training part of a run: the Trainer and its callbacks, and what becomes of a signal or a failure."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy

from diffusion.distributed.processes import environment
from diffusion.distributed.ranks import NEVER, Ranks
from diffusion.distributed.signals import STEP, Signals
from diffusion.training.callbacks import Look
from diffusion.training.changed_data import look_together
from diffusion.training.checkpoint import Saver
from diffusion.training.fingerprint import Fingerprints
from diffusion.training.meter import Bar, Meter
from diffusion.training.nonfinite import Finite

if TYPE_CHECKING:
    from diffusion.run import Run


class Steps(Callback):
    """Tells the other ranks how far this one has come. begun: whether all is restored, and training has begun."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.begun = ranks, False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.begun = True
        self.ranks.step(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.ranks.step(trainer.global_step)


class NotRestored(ValueError):
    """A checkpoint holds states that are not those of the run."""

    exit_status = 2  # the same command ends the same way


class Fit:
    """The Trainer of a run, ready to go on from the newest sound checkpoint.

    Args:
        run: whose parts are trained. looks: at the run, while it trains. signals: of this process.
    """

    def __init__(self, run: "Run", looks: Sequence[Look], signals: Signals) -> None:
        cfg = run.cfg
        self.run, self.signals, self.meter = run, signals, Meter(cfg.log_every, cfg.data.batch_size)
        self.finite, self.steps = Finite(run.folder, cfg.max_nonfinite), Steps(run.ranks)
        self.saver = Saver(
            run.folder,
            run.writer,
            signals,
            cfg.save.every_steps,
            cfg.save.every_minutes,
            cfg.save.keep,
            before=lambda step: any(look.due(step) for look in looks),
            settle=self._settle,
            on_error=run.on_error,
        )
        self.trainer = pl.Trainer(
            accelerator=run.place.device.type,
            devices=cfg.trainer.devices,
            num_nodes=cfg.trainer.num_nodes,
            strategy="auto" if run.ranks.size == 1 else self._strategy(),
            precision="bf16-mixed" if run.place.precision == "bf16-mixed" else "32-true",
            max_steps=cfg.trainer.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=cfg.trainer.accumulate,
            callbacks=[
                run.ema,
                Fingerprints(run.folder.path, run.ema, cfg.fingerprint_every, run.on_error),
                self.meter,
                Bar(self.meter),
                self.steps,
                self.finite,
                self.saver,  # after all that is saved with the step, and before anybody looks at it
                *looks,
            ],
            logger=run.loggers,
            plugins=[run.writer, environment(run.ranks.size)],
            enable_checkpointing=False,  # Lightning's own
            log_every_n_steps=cfg.log_every,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            deterministic=cfg.deterministic,
            default_root_dir=run.folder.path,
        )
        # Lightning would broadcast a flag and look at it on every batch, and act on signals in the middle of a step.
        self.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self.trainer._signal_connector.register_signal_handlers = lambda: None

    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Before a save: look whether the data are what they were, and at the step itself."""
        ranks, data = self.run.ranks, self.run.data
        look_together(lambda: data.look(unopened=ranks.main), ranks)
        self.finite.settle(trainer, module)

    def _strategy(self) -> DDPStrategy:
        """DDP. Its buckets are rebuilt after the first step, so that a resumed run would sum in another order than an
        uninterrupted one: where bit-exactness is promised they are not. A static graph is refused by torch where not
        every backward pass sums gradients, as with accumulation."""
        cfg = self.run.cfg
        exact = cfg.deterministic or self.run.place.device.type == "cpu"
        static = not exact and cfg.trainer.accumulate == 1
        return DDPStrategy(
            find_unused_parameters=exact, gradient_as_bucket_view=True, static_graph=static, timeout=NEVER
        )

    def go(self, path: Any, say: Callable[[str], None]) -> int:
        """Train from this checkpoint, or from the beginning; the exit status: 0, 128 + the signal that stopped it, or
        that of `Run.failed`."""
        try:
            with self.signals.held(finishing=STEP):
                self.trainer.fit(self.run.module, datamodule=self.run.data, ckpt_path=path, weights_only=True)
                self.saver.finish()
        except Exception as error:
            if path is not None and not self.steps.begun and not isinstance(error, OSError | ValueError):
                first = (str(error).splitlines() or [""])[0]
                error = NotRestored(
                    f"{path} cannot be restored: its states are not those of this run ({type(error).__name__}: "
                    f"{first}). Move it away to train from the checkpoint before it."
                )
            return self.run.failed(error, f"Training ended at step {self.trainer.global_step}")
        if self.meter.stand_ins:
            say(f"Bad samples: {self.meter.stand_ins:,} times so far another image stood in for one that is damaged.")
        if self.finite.skipped:
            say(f"Not finite: {self.finite.skipped:,} steps so far were skipped, see {self.run.folder.path}/nonfinite.")
        number = self.saver.stopped_by or self.run.ranks.signal()  # the latter: after the last step
        if not number:
            return 0
        say(f"Stopped by signal {number} at step {self.trainer.global_step}; the same command goes on from there.")
        return 128 + number
