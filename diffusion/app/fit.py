"""The training part of a run: the Trainer and its callbacks, and what becomes of a signal or a failure."""

import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import subprocess_script

from diffusion.app.launcher import ranks, under_srun, under_torchrun
from diffusion.data.remote import Unreachable
from diffusion.data.samples import BadSample
from diffusion.training.callbacks import Look
from diffusion.training.checkpoint import CheckpointWriter, Saver, WriteFailed
from diffusion.training.fingerprint import Fingerprints
from diffusion.training.meter import Bar, Meter
from diffusion.training.nonfinite import Finite, NotFinite
from diffusion.training.signals import Signals
from diffusion.training.watchdog import Watch

if TYPE_CHECKING:
    from diffusion.app.run import Run

# Lightning's own observer kills all processes, at once and without a word, when one has ended other than with status 0,
# as each does that has been stopped by a signal. The watchdog knows better.
subprocess_script._launch_process_observer = lambda processes: None

FAILURES = (BadSample, Unreachable, WriteFailed, NotFinite)  # what can end a training without a bug of ours
NEVER = timedelta(days=30)  # collectives wait; the watchdog ends them


class Fit:
    """The Trainer of a run, ready to go on from the newest sound checkpoint.

    Args:
        run: whose parts are trained. looks: at the run, while it trains. signals: of this process.
    """

    def __init__(self, run: "Run", looks: Sequence[Look], signals: Signals) -> None:
        cfg = run.cfg
        self.run, self.signals, self.failed = run, signals, False
        self.writer, self.meter = CheckpointWriter(), Meter(cfg.log_every, cfg.data.batch_size)
        self.finite = Finite(run.folder, cfg.max_nonfinite)
        self.saver = Saver(
            run.folder,
            self.writer,
            signals,
            cfg.save.every_steps,
            cfg.save.every_minutes,
            cfg.save.keep,
            before=lambda step: any(look.due(step) for look in looks),
            settle=self.finite.settle,
            on_error=cfg.save.on_error,
        )
        self.watch = Watch(cfg.trainer.timeout, last_words=self._write_to_the_end)
        self.trainer = pl.Trainer(
            accelerator=run.place.device.type,
            devices=cfg.trainer.devices,
            num_nodes=cfg.trainer.num_nodes,
            strategy="auto" if ranks(cfg) == 1 else self._strategy(),
            precision="bf16-mixed" if run.place.precision == "bf16-mixed" else "32-true",
            max_steps=cfg.trainer.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=cfg.trainer.accumulate,
            callbacks=[
                run.ema,
                Fingerprints(run.folder.path, run.ema, cfg.fingerprint_every),
                self.meter,
                Bar(self.meter),
                self.watch,
                self.finite,
                self.saver,  # after all that is saved with the step, and before anybody looks at it
                *looks,
            ],
            logger=run.loggers,
            plugins=[self.writer, environment(ranks(cfg))],
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

    def _strategy(self) -> DDPStrategy:
        """DDP. Its buckets are rebuilt after the first step, so that a resumed run would sum in another order than an
        uninterrupted one: where bit-exactness is promised they are not."""
        exact = self.run.cfg.deterministic or self.run.place.device.type == "cpu"
        return DDPStrategy(
            find_unused_parameters=exact, gradient_as_bucket_view=True, static_graph=not exact, timeout=NEVER
        )

    def go(self, path: Any, say: Callable[[str], None]) -> int:
        """Train from this checkpoint, or from the beginning; the exit status: 0, 128 + the signal that stopped it, or 1
        after a failure."""
        try:
            with self.signals.held():
                self.trainer.fit(self.run.module, datamodule=self.run.data, ckpt_path=path, weights_only=True)
                self.saver.finish()
        except Exception as error:
            return self._failed(error)
        finally:
            self.watch.stop()
        if self.meter.stand_ins:
            say(f"Bad samples: {self.meter.stand_ins:,} times so far another image stood in for one that is damaged.")
        if self.finite.skipped:
            say(f"Not finite: {self.finite.skipped:,} steps so far were skipped, see {self.run.folder.path}/nonfinite.")
        number = self.saver.stopped_by or self.signals.number  # the latter: after the last step
        if not number:
            return 0
        say(f"Stopped by signal {number} at step {self.trainer.global_step}; the same command goes on from there.")
        return 128 + number

    def _failed(self, error: Exception) -> int:
        """Say what ended the training; the exit status, 1. Of a bug of ours the whole story, on its own rank."""
        self.failed = True
        cause = self.watch.failed(error)
        self._write_to_the_end()
        own = cause is None or str(error) in cause
        if own and (self.run.cfg.debug or not isinstance(error, FAILURES)):
            traceback.print_exception(error)
        rank = f" of rank {self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        saved = self.run.folder.steps()
        print(
            f"error: {error if own else cause}\nTraining{rank} ended at step {self.trainer.global_step}; the same "
            f"command goes on from step {saved[0] if saved else 0}.",
            file=sys.stderr,
            flush=True,
        )
        return 1

    def _write_to_the_end(self) -> None:
        """Let the checkpoint that is being written be written."""
        try:
            self.writer.wait()
        except Exception as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)


def environment(number: int) -> ClusterEnvironment:
    """Who tells this process its rank among so many."""
    if number > 1 and under_torchrun():
        return TorchElasticEnvironment()
    if number > 1 and under_srun():
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()
