"""A training run from its configuration to its report.

`Run(...)` builds every part, so that whatever is wrong is said before anything is written; `go` takes the run folder,
trains from the newest sound checkpoint, and makes what is missing of pictures, scores and report.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion.app import build
from diffusion.app.compose import refusing
from diffusion.app.fit import Fit
from diffusion.denoiser import NetworkDenoiser
from diffusion.metrics.extractors import Features
from diffusion.page import write_report
from diffusion.training.callbacks import Abandoned, Look, grid_path, save_grid
from diffusion.training.checkpoint import load
from diffusion.training.ema import EMA, load_average
from diffusion.training.fingerprint_log import cut_after
from diffusion.training.logger import loggers
from diffusion.training.meter import MetricsCsv, RunLogger, count_parameters
from diffusion.training.module import DiffusionModule
from diffusion.training.run_folder import RECORDED, RunFolder
from diffusion.training.scoring import Sampling, describe, score, stored, watched
from diffusion.training.signals import Signals

for quiet in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
    logging.getLogger(quiet).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="This DataLoader will create")  # data.num_workers is the user's to choose
warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning)\..*")


class Run:
    """All parts of a run, built and checked; nothing written yet.

    Args:
        cfg: composed and checked. config: the same, plain, for the folder and the checkpoints. folder: the run's.
        signals: of this process; None where nobody handles any.
    """

    def __init__(
        self, cfg: DictConfig, config: dict[str, Any], folder: RunFolder, signals: Signals | None = None
    ) -> None:
        recorded = folder.config()
        if recorded is not None:  # what was left open was found out when the run began
            known = {k: recorded["data"].get(k) for k in RECORDED if cfg.data[k] is None}
            cfg = OmegaConf.merge(cfg, {"data": known})
        self.cfg, self.config, self.folder, self.signals = cfg, config, folder, signals or Signals()
        self.place = build.place(cfg.trainer)
        self.data = build.data(cfg)
        levels = build.schedule(cfg)
        network = build.network(cfg, cfg.seed).to(memory_format=self.place.memory_format)
        self.denoiser = NetworkDenoiser(network, levels, cfg.objective.prediction)
        self.module = DiffusionModule(
            self.denoiser,
            build.objective(cfg, levels),
            build.optimizer(cfg),
            warmup_steps=cfg.optimizer.warmup_steps,
            gradient_clip=cfg.optimizer.gradient_clip,
            label_dropout=cfg.objective.label_dropout,
            flip=cfg.data.flip,
            seed=cfg.seed,
            memory_format=self.place.memory_format,
            config=config,
            skip_not_finite=cfg.on_nonfinite == "skip",
        )
        build.sampler(cfg, levels)
        self.ema = EMA(cfg.ema.decay, cfg.ema.warmup)
        self.extractor = None
        if cfg.callbacks.enabled and cfg.metrics and cfg.extractor.name != "digits":
            self.extractor = build.extractor(cfg, self.place)
        self._reference: Features | None = None
        self.fit: Fit | None = None
        self.csv = MetricsCsv(folder.metrics_path)
        self.loggers: list[RunLogger] = [self.csv, *loggers(cfg.logger, folder, config)]

    # ---- the whole ----

    def go(self, say: Callable[[str], None], main_rank: bool) -> int:
        """Train and finish; the exit status: 0, or 128 + the signal that stopped it."""
        if not main_rank:
            status = self.train(say, main_rank)
            self.part()
            return status
        with refusing(self.cfg.debug):
            lock = self.folder.locked()
            lock.__enter__()
        status = 1  # a failure, unless what follows says otherwise
        try:
            with refusing(self.cfg.debug):
                self.folder.refuse_other(self.config)  # again, now that nobody else can write here
            self.config["data"] |= {"lanes": self.data.lanes, "digest": self.data.index.digest}
            self.folder.write_config(self.config)
            for logger in self.loggers:
                logger.start(say)
            status = self.train(say, main_rank) or self.finish(say)
            return status
        except SystemExit as end:  # by a signal outside of training
            status = end.code
            raise
        finally:
            with self.signals.held():
                for logger in self.loggers:
                    logger.close(status)
            lock.__exit__(None, None, None)
            self.part()

    def part(self) -> None:
        """The ranks of a run that was stopped end together; one of a run that has failed ends here, as the end of its
        process would wait for the collectives it is in, and these for other ranks that do the same."""
        if self.fit is None:
            return
        self.fit.saver.part()
        if self.fit.failed and self.fit.trainer.world_size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def train(self, say: Callable[[str], None], main_rank: bool) -> int:
        """From the newest sound checkpoint to max_steps; the exit status."""
        cfg = self.cfg
        step, path, complaints = self.folder.latest_valid()
        for complaint in complaints:
            say(complaint)
        if main_rank:
            for damaged in [s for s in self.folder.steps() if s > step]:
                self.folder.set_aside(damaged)
        if step >= cfg.trainer.max_steps:
            return 0
        say(self.introduction(step))
        if main_rank:
            self.csv.cut_after(step)
            self.folder.cut_results_after(step)
            cut_after(self.folder.path, step)
        self.fit = Fit(self, self.looks(), self.signals)
        return self.fit.go(path, say)

    def introduction(self, step: int) -> str:
        """What is about to happen, in a few lines."""
        cfg, per_step = self.cfg, self.cfg.data.batch_size
        lines = [
            f"Training {cfg.name} in {self.folder.path}" + (f", going on from step {step}" if step else ""),
            f"  data    {cfg.data.name}: {self.data.num_images:,} images of {self.data.image_size}x"
            f"{self.data.image_size}, {self.data.channels} channel(s)"
            + (f", {self.data.num_classes} classes" if self.data.num_classes else ""),
            f"  model   {count_parameters(self.denoiser.network):,} parameters, predicts {self.denoiser.prediction}",
            f"  steps   {cfg.trainer.max_steps:,} of {per_step} images "
            f"({cfg.trainer.max_steps * per_step / self.data.num_images:,.1f} epochs), "
            f"on {self.place.device.type} in {'float32' if self.place.precision == '32' else 'bf16'}",
        ]
        return "\n".join(lines)

    # ---- pictures and scores ----

    def sampling(self, batch_size: int = 256) -> Sampling:
        return build.sampling(self.cfg, self.denoiser, self.place, self.image_shape, batch_size, attend=self.attend)

    def attend(self) -> None:
        """Called whenever the network is evaluated for a look: a signal that training holds ends the look."""
        if self.fit is not None:
            self.fit.watch.working()
        if self.signals.number is not None:
            raise Abandoned

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.data.channels, self.data.image_size, self.data.image_size

    def looks(self) -> list[Look]:
        """The callbacks that look at the run while it trains."""
        cfg, found = self.cfg.callbacks, []
        if cfg.enabled and cfg.grid.every_steps:
            missing = lambda step: not grid_path(self.folder, step).is_file()  # noqa: E731
            found.append(Look(cfg.grid.every_steps, self.ema, self.look, missing))
        if cfg.enabled and cfg.score.every_steps and self.cfg.metrics:
            missing = lambda step: not set(self.cfg.metrics) <= self.folder.own_scores(step)  # noqa: E731
            found.append(Look(cfg.score.every_steps, self.ema, self.score, missing))
        return found

    def look(self, step: int) -> None:
        """A grid of samples, on disk and in the loggers."""
        path = save_grid(self.folder, step, self.sampling(), self.cfg.callbacks.grid.num_images)
        for logger in self.loggers:
            logger.log_picture(path, step)

    def score(self, step: int, metrics: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Sample, score, and add to results.jsonl and to the loggers."""
        number = self.cfg.callbacks.score.num_images
        if self.extractor is None:
            self.extractor = build.extractor(self.cfg, self.place, self.data)
        if self._reference is None:
            self._reference = self.extractor(stored(self.data.samples))
        sampling = self.sampling(self.cfg.callbacks.score.batch_size)
        about = {
            "by": "train",
            "step": step,
            "weights": "ema",
            "data": self.cfg.data.name,
            "parameters": count_parameters(self.denoiser.network),
        }
        rows = score(
            watched("sampling", number, sampling.batches(torch.arange(number))),
            self.extractor,
            self._reference,
            list(self.cfg.metrics) if metrics is None else metrics,
            lambda n: {**sampling.record(n), **about},
            dict(self.cfg.paper),
        )
        self.folder.add_results(rows)
        for logger in self.loggers:
            logger.log_scores(rows, step)
        return rows

    def finish(self, say: Callable[[str], None]) -> int:
        """What is missing of the final grid and scores, from the last checkpoint's averaged weights; the report.
        Returns the exit status, 0."""
        cfg = self.cfg
        step, path, _ = self.folder.latest_valid()
        network = self.denoiser.network.to(self.place.device).eval().requires_grad_(False)
        with torch.no_grad():
            ema = load(path)["ema"]
            load_average(network, ema, [p.data for p in network.parameters()])
        if cfg.callbacks.enabled and not grid_path(self.folder, step).is_file():
            self.look(step)
            say(f"Samples: {grid_path(self.folder, step)}")
        missing = [m for m in cfg.metrics if m not in self.folder.own_scores(step)]
        if cfg.callbacks.enabled and missing:
            for row in self.score(step, missing):
                say(describe(row))
        self.folder.point_best()
        write_report(self.folder)
        say(f"Report: {self.folder.report_path}")
        return 0
