"""A training run from its configuration to its report.

`Run(...)` builds every part, so that whatever is wrong is said before anything is written; `go` takes the run folder,
trains from the newest sound checkpoint, and makes what is missing of pictures, scores and report.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion.build import early
from diffusion.build import parts as build
from diffusion.config.compose import refusing
from diffusion.data.shards.remote import Unreachable
from diffusion.data.shards.samples import BadSample
from diffusion.denoiser import NetworkDenoiser
from diffusion.distributed.launcher import main_rank
from diffusion.distributed.processes import together
from diffusion.distributed.ranks import Abandoned, Ranks, got_on
from diffusion.distributed.signals import BATCH, Signals
from diffusion.files import Room, reason, size_of, told_by_disk, writing
from diffusion.metrics.extractors import Extractor
from diffusion.metrics.published import table_text
from diffusion.metrics.reference import Reference
from diffusion.page import told, write_report
from diffusion.runs.folder import OF_ANOTHER_RUN, RECORDED, OnError, RunFolder
from diffusion.scoring.gallery import Gallery
from diffusion.scoring.sampling import Sampling
from diffusion.scoring.scores import describe, score
from diffusion.training.callbacks import Look, film_path, grid_path, save_film, save_grid
from diffusion.training.changed_data import distrust, distrust_noted
from diffusion.training.checkpoint import CheckpointWriter, WriteFailed, load
from diffusion.training.ema import EMA, load_average
from diffusion.training.fingerprint_log import cut_after
from diffusion.training.fit import Fit
from diffusion.training.logger import loggers
from diffusion.training.meter import MetricsCsv, RunLogger, count_parameters
from diffusion.training.module import DiffusionModule
from diffusion.training.nonfinite import NotFinite

FAILURES = (BadSample, Unreachable, OSError, NotFinite, ValueError)  # what can end a run without a bug of ours

warnings.filterwarnings("ignore", message="This DataLoader will create")  # data.num_workers is the user's to choose
warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning)\..*")


class NotOfThisRun(ValueError):
    """The checkpoints of the folder belong to another run."""

    exit_status = 2


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
            known = {k: recorded.at(f"data.{k}") for k in RECORDED if cfg.data[k] is None}
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
        self.extractor: Extractor | None = None
        if cfg.callbacks.enabled and cfg.metrics and cfg.extractor.name != "digits":
            self.extractor = build.extractor(cfg)
        self._reference: Reference | None = None
        self.writer, self.ranks = CheckpointWriter(), Ranks()
        self.failure = 0  # exit status of what has ended the run
        self.on_error = OnError(cfg.save.on_error)
        self.csv = MetricsCsv(folder.metrics_path, self.on_error)
        if main_rank(cfg):
            early.look(self)
        self.loggers: list[RunLogger] = [self.csv, *loggers(cfg.logger, folder, config)]

    # ---- the whole ----

    def go(self, say: Callable[[str], None], main_rank: bool) -> int:
        """Train and finish; the exit status: 0, or 128 + the signal that stopped it."""
        if not main_rank:
            status = self.work(say)
            self.part()
            return status
        room = self.room()
        with refusing(self.cfg.debug), writing(room):
            if self.cfg.save.on_error == "stop":
                room.check()
            elif room.lack:
                print(f"warning: {room.lack}", file=sys.stderr, flush=True)
            lock = self.folder.locked()
            lock.__enter__()
        status = 1  # a failure, unless what follows says otherwise
        try:
            with refusing(self.cfg.debug), writing(room):
                self.folder.refuse_other(self.config)  # again, now that nobody else can write here
                self.config["data"] |= {"lanes": self.data.lanes, "digest": self.data.index.digest}
                self.folder.write_config(self.config)
                for logger in self.loggers:
                    logger.start(say)
            status = self.work(say)
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

    def work(self, say: Callable[[str], None]) -> int:
        """What all ranks do: train, then look for a last time; the exit status. Signals are held: each part asks."""
        with self.signals.held():
            self.ranks, self.place = together(self.cfg, self.place, self.signals, self._write_to_the_end)
            return self.train(say) or self.finish(say)

    def part(self) -> None:
        """The ranks of a run end together; one of a run that has failed ends here, as the end of its process would wait
        for the collectives it is in, and these for other ranks that do the same."""
        if not self.failure:
            self.ranks.part()
            return
        self.ranks.leave()
        if self.ranks.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.failure)

    def failed(self, error: Exception, where: str) -> int:
        """Say what ended the run; the exit status: 1, or 2 if the same command cannot go on before the user has done
        something. Of a bug of ours the whole story, on its own rank."""
        self.failure = 1
        cause, self.failure = self.ranks.failed(error)
        self._write_to_the_end()
        aside = self._distrusted(error)
        own = cause is None or str(error) in cause
        if own and (self.cfg.debug or not isinstance(error, FAILURES)):
            traceback.print_exception(error)
        if self.ranks.size > 1:
            where = where.replace(" ", f" of rank {self.ranks.rank} ", 1)
        saved, disk = self.folder.steps(), told_by_disk(error, self.room()) if own else None
        last = f"{where}; the same command goes on from step {saved[0] if saved else 0}."
        said = [f"error: {reason(error) if own else cause}", *([disk] if disk else []), *aside, last]
        print(*said, sep="\n", file=sys.stderr, flush=True)
        return self.failure

    def _distrusted(self, error: Exception) -> list[str]:
        """What rank 0 has set aside after a change of the data; the others leave a note of it for the next start."""
        try:
            return distrust(self.folder, error, aside=self.ranks.main)
        except OSError as problem:
            return [f"warning: {reason(problem)}"]

    def room(self) -> Room:
        """What the run folder has yet to take: checkpoints, of which a new one is written before an old one goes, and
        the images that are scored."""
        cfg, there = self.cfg, self.folder.steps()
        left, every = cfg.trainer.max_steps - (there[0] if there else 0), cfg.save.every_steps
        kept = cfg.save.keep + 1 + (1 if cfg.callbacks.enabled and cfg.callbacks.score.every_steps else 0)
        saves = -(-left // every) if every else kept if cfg.save.every_minutes else 1
        number = max(min(kept, len(there) + saves) - len(there), 1) if left > 0 else 0
        parameters, states = count_parameters(self.denoiser.network), states_of(build.optimizer(cfg))
        one = 4 * parameters * (2 + states)  # the weights, their average, and what the optimizer keeps of each
        what = [f"{number} checkpoint{'s' if number > 1 else ''} of {size_of(one)}"] if number else []
        wanted = set(cfg.metrics) - self.folder.own_scores(cfg.trainer.max_steps) if cfg.callbacks.enabled else set()
        scored = cfg.callbacks.score.num_images if wanted else 0
        images = scored * cfg.data.channels * cfg.data.image_size**2
        made = self.folder.evaluations / f"score_{cfg.trainer.max_steps:08d}_final"
        images -= sum(path.stat().st_size for path in made.glob("images_*.npz")) if scored else 0
        what += [f"{scored:,} images to score"] if images > 0 else []
        return Room("run_dir", self.folder.path, number * one + max(images, 0), " and ".join(what))

    def _write_to_the_end(self) -> None:
        """Let the checkpoint that is being written be written."""
        try:
            self.writer.wait()
        except Exception as error:
            print(f"warning: {reason(error)}", file=sys.stderr, flush=True)

    def train(self, say: Callable[[str], None]) -> int:
        """From the newest sound checkpoint to max_steps; the exit status."""
        try:
            step, path = self._begin(say)
            fit = Fit(self, self.looks(), self.signals) if step < self.cfg.trainer.max_steps else None
            number = self.ranks.signal()
        except Exception as error:
            return self.failed(error, "Training ended before its first step")
        if fit is None:
            return 0  # also after a signal: the report alone may be missing, and sampling stops by itself
        if number:
            say(f"Stopped by signal {number} before the first step; the same command goes on from step {step}.")
            return 128 + number
        return fit.go(path, say)

    def _begin(self, say: Callable[[str], None]) -> tuple[int, Path | None]:
        """The newest sound checkpoint, its step and file, and the folder without what came after it."""
        aside = distrust_noted(self.folder) if self.ranks.main else []
        step, path, complaints = self.ranks.from_main(self._newest() if self.ranks.main else None)
        for complaint in aside + complaints:
            say(complaint)
        if step == 0 and (others := [c for c in complaints if OF_ANOTHER_RUN in c]):
            raise NotOfThisRun(
                f"run_dir={self.folder.path}: no checkpoint is of this configuration, and nothing is changed. "
                f"{others[0]} Start the run as it was, or give another run_dir."
            )
        if self.ranks.main:
            for damaged in [s for s in self.folder.steps() if s > step]:
                self.folder.set_aside(damaged)
        if step < self.cfg.trainer.max_steps:
            say(self.introduction(step))
            if self.ranks.main:
                self.csv.cut_after(step)
                self.folder.cut_results_after(step)
                self.folder.cut_evaluations_after(step)
                cut_after(self.folder.path, step)
        return step, path

    def _newest(self) -> tuple[int, Path | None, list[str]]:
        """The newest checkpoint that is sound and of this run, with weights of this network."""
        shapes = {f"network.{name}": tuple(t.shape) for name, t in self.denoiser.network.state_dict().items()}
        return self.folder.latest_valid(self.config, shapes)

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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.data.channels, self.data.image_size, self.data.image_size

    def gallery(self, name: str, sampling: Sampling, number: int, step: int) -> Gallery:
        """The images of a look at a step, made by all ranks; kept until they have been looked at."""
        return Gallery(self.folder.evaluations / name, sampling, number, {"step": step, "weights": "ema"}, self.ranks)

    def looks(self) -> list[Look]:
        """The callbacks that look at the run while it trains."""
        cfg, found = self.cfg.callbacks, []
        if cfg.enabled and cfg.grid.every_steps:
            missing = lambda step: not grid_path(self.folder, step).is_file()  # noqa: E731
            found.append(Look(cfg.grid.every_steps, self.ema, self.ranks, self.look, missing))
        if cfg.enabled and cfg.score.every_steps and self.cfg.metrics:
            missing = lambda step: not set(self.cfg.metrics) <= self.folder.own_scores(step)  # noqa: E731
            found.append(Look(cfg.score.every_steps, self.ema, self.ranks, self.score, missing))
        return found

    def look(self, step: int) -> None:
        """A grid of samples, on disk and in the loggers."""
        cfg = self.cfg.callbacks.grid
        sampling = build.sampling(self.cfg, self.denoiser, self.place, self.image_shape, cfg.batch_size, self.ranks)
        with self.gallery(f"grid_{step:08d}", sampling, cfg.num_images, step) as gallery:
            with self.signals.held(finishing=BATCH):
                gallery.make()
            if self.ranks.main:
                path = save_grid(self.folder, step, gallery)
                got_on()
                for logger in self.loggers:
                    logger.log_picture(path, step)

    def score(self, step: int, metrics: Sequence[str] | None = None, final: bool = False) -> list[dict[str, Any]]:
        """Sample, score, and add to results.jsonl and to the loggers; the rows, on rank 0.

        While the run trains, by the settings of callbacks.score.during; at its end by its own sampler.
        """
        cfg, scored = self.cfg, self.cfg.callbacks.score
        number = scored.num_images
        if not final:
            number = scored.during.num_images or number
            if scored.during.num_steps is not None:
                cfg = build.with_fast_sampler(cfg, scored.during.num_steps)
        sampling = build.sampling(cfg, self.denoiser, self.place, self.image_shape, scored.batch_size, self.ranks)
        reference = self.reference()
        assert self.extractor is not None
        with self.gallery(f"score_{step:08d}{'_final' if final else ''}", sampling, number, step) as gallery:
            with self.signals.held(finishing=BATCH):
                gallery.make(self.extractor)
            if not self.ranks.main:
                return []
            about = {"by": "train", "step": step, "weights": "ema", "data": cfg.data.name, "split": cfg.data.split}
            about |= {"parameters": count_parameters(self.denoiser.network)}
            rows = score(
                gallery.features(self.extractor),
                self.extractor,
                reference,
                list(cfg.metrics) if metrics is None else metrics,
                {**gallery.record(), **about},
                dict(cfg.paper),
                working=self.ranks.working,
            )
            self.folder.add_results(rows)
            got_on()
            gallery.remove()
        prefix = "final" if final and scored.every_steps and self._looked_otherwise() else "eval"
        for logger in self.loggers:
            logger.log_scores(rows, step, prefix)
        return rows

    def _looked_otherwise(self) -> bool:
        """Whether the scores while training are of another number of images or another sampler than the final ones."""
        during = self.cfg.callbacks.score.during
        return during.num_steps is not None or during.num_images not in (None, self.cfg.callbacks.score.num_images)

    def reference(self) -> Reference | None:
        """What the run is scored against, on rank 0; extractor and reference are made when first asked for."""
        if self.extractor is None:
            if self.ranks.main:
                self.extractor = build.extractor(self.cfg, self.data)
            self.ranks.largest()  # which may have trained it
            self.extractor = self.extractor or build.extractor(self.cfg, self.data)
        self.extractor.network.to(self.place.device)
        if not self.ranks.from_main(self._reference is not None):
            self._reference = build.reference(self.data, self.extractor, self.ranks)
        return self._reference

    def finish(self, say: Callable[[str], None]) -> int:
        """What is missing of the final grid and scores, from the last checkpoint's averaged weights; the report. The
        exit status: 0, 128 + the signal that stopped it, or that of `failed`."""
        try:
            self._look_finally(say)
        except Abandoned:
            number = self.ranks.signal()
            say(f"Stopped by signal {number} after training; the same command goes on with what is missing.")
            return 128 + number
        except Exception as error:
            return self.failed(error, "Sampling and scoring after training ended")
        return 0

    def _look_finally(self, say: Callable[[str], None]) -> None:
        cfg, main = self.cfg, self.ranks.main
        step, path, _ = self.ranks.from_main(self._newest() if main else None)
        if step < cfg.trainer.max_steps:  # and training has gone on, as save.on_error=warn says
            raise WriteFailed(f"The weights of step {cfg.trainer.max_steps} are not on disk.")
        network = self.denoiser.network.to(self.place.device).eval().requires_grad_(False)
        with torch.no_grad():
            load_average(network, load(path).ema, [p.data for p in network.parameters()])
        if cfg.callbacks.enabled and self.ranks.from_main(not grid_path(self.folder, step).is_file()):
            self.look(step)
            say(f"Samples: {grid_path(self.folder, step)}")
        with self.ranks.together():
            if cfg.callbacks.enabled and main and not film_path(self.folder, step).is_file():
                one = build.sampling(cfg, self.denoiser, self.place, self.image_shape, ranks=self.ranks)
                save_film(self.folder, step, one)
        missing = self.ranks.from_main([m for m in cfg.metrics if m not in self.folder.own_scores(step)])
        if cfg.callbacks.enabled and missing:
            rows = self.score(step, missing, final=True)
            for row in rows:
                say(describe(row))
            if text := table_text([told(row, self.config) for row in rows]):
                say(text)
        if main:
            self.folder.point_best()
            write_report(self.folder)
            say(f"Report: {self.folder.report_path}")


def states_of(optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> int:
    """Tensors of a parameter's size that an optimizer keeps of it: two of Adam."""
    one = torch.nn.Parameter(torch.zeros(2))
    made, one.grad = optimizer([one]), torch.zeros(2)
    made.step()
    return sum(isinstance(value, torch.Tensor) and value.shape == one.shape for value in made.state[one].values())
