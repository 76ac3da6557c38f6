"""A training run: training, sample grids, scores and report.

`Run(parts)` is constructed after all parts are built and checked. `go` locks the run folder, trains from the newest
valid checkpoint, and then creates the missing sample grids, scores and report.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffusion.build import extractors
from diffusion.build.run import Parts
from diffusion.build.trusted import foreign
from diffusion.data.shards.changes import BadSample
from diffusion.data.shards.remote import Unreachable
from diffusion.distributed.processes import together
from diffusion.distributed.ranks import Abandoned, Ranks, mark_progress
from diffusion.distributed.signals import BATCH, Signals
from diffusion.files import Room, describe_disk_error, reason, size_of, writing
from diffusion.metrics.metric import Metric
from diffusion.metrics.published import table_text
from diffusion.metrics.reference import Reference
from diffusion.page import with_model, write_report
from diffusion.progress import counted
from diffusion.runs.folder import OF_ANOTHER_RUN
from diffusion.scoring.gallery import Gallery
from diffusion.scoring.grids import film_path, grid_path, save_film, save_grid
from diffusion.scoring.recipe import Recipe
from diffusion.scoring.sampling import Sampling
from diffusion.scoring.scores import describe, score
from diffusion.training.callbacks import Look
from diffusion.training.changed_data import distrust, distrust_noted
from diffusion.training.checkpoint import WriteFailed, load
from diffusion.training.ema import load_average
from diffusion.training.fingerprint_log import cut_after
from diffusion.training.fit import Fit
from diffusion.training.held_out import COLUMNS, HeldOutLoss, held_out_loss
from diffusion.training.meter import count_parameters
from diffusion.training.nonfinite import NotFinite

FAILURES = (BadSample, Unreachable, OSError, NotFinite, ValueError)  # errors that are not bugs of this program

warnings.filterwarnings("ignore", message="This DataLoader will create")  # the user chooses data.num_workers
warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning)\..*")


class NotOfThisRun(ValueError):
    """The checkpoints of the folder belong to another run."""

    exit_status = 2


class Run:
    """A run, ready to start.

    Args:
        parts: the parts of the run.
        signals: signals of this process; None if none are handled.
        say: prints a message for the user.
    """

    def __init__(
        self, parts: Parts, signals: Signals | None = None, say: Callable[[str], None] = lambda message: None
    ) -> None:
        self.parts, self.signals, self.say = parts, signals or Signals(), say
        self.folder, self.training, self.place = parts.training.folder, parts.training, parts.place
        self.extractor, self._reference = parts.ready, None
        self.ranks = Ranks()
        self.failure = 0  # exit status of the failure that ended the run; 0: no failure

    # ---- the whole ----

    def go(self) -> int:
        """Run everything.

        Returns:
            The exit status: 0, 128 + the number of the signal that stopped the run, or that of a failure.

        Raises:
            ValueError: the folder belongs to another run, is in use, or its disk has too little space. Nothing has been
                written then.
        """
        if not self.parts.compute.main:
            status = self.work()
            self.leave()
            return status
        room = self.room()
        with writing(room):
            if self.training.saving.on_error == "stop":
                room.check()
            elif room.lack:
                print(f"warning: {room.lack}", file=sys.stderr, flush=True)
            lock = self.folder.locked()
            lock.__enter__()
        status = 1  # kept if an exception is raised
        try:
            with writing(room):
                self.begin()
            status = self.work()
            return status
        except SystemExit as end:  # a signal outside of training
            status = end.code
            raise
        finally:
            with self.signals.held():
                for logger in self.training.loggers:
                    logger.close(status)
            lock.__exit__(None, None, None)
            self.leave()

    def begin(self) -> None:
        """Write config.yaml and start the loggers. The folder must be locked."""
        data, module = self.training.data, self.training.module
        self.folder.refuse_other(module.record)  # check again, now that the folder is locked
        module.record = module.record.replaced("data", lanes=data.lanes, digest=data.index.digest)
        self.folder.write_config(module.record)
        for logger in self.training.loggers:
            logger.start(self.say, module.record)

    def work(self) -> int:
        """The work of all ranks: train, then sample and score. Returns the exit status. Signals are held."""
        with self.signals.held():
            parts = self.parts
            self.ranks, self.place = together(parts.compute, self.place, self.signals, self._write_to_the_end)
            return self.train() or self.finish()

    def train(self) -> int:
        """Train from the newest valid checkpoint to max_steps. Returns the exit status."""
        fit = None
        try:
            step, path = self._newest_sound()
            if step < self.training.length.max_steps:
                fit = Fit(self.training, self.ranks, self.place, self.signals, self.looks())
            number = self.ranks.signal()
        except Exception as error:
            return self.failed(error, "Training ended before its first step")
        if fit is None:
            return 0  # even after a signal: only the report may be missing, and sampling stops by itself
        if number:
            self.say(
                f"Stopped by signal {number} before the first step. Run the same command to continue from step {step}."
            )
            return 128 + number
        try:
            return fit.go(path, self.say)
        except Exception as error:
            return self.failed(error, f"Training ended at step {fit.trainer.global_step}")

    def _newest_sound(self) -> tuple[int, Path | None]:
        """Step and path of the newest valid checkpoint. Removes from the folder what is later than this step."""
        folder = self.folder
        aside = distrust_noted(folder) if self.ranks.main else []
        step, path, complaints = self.ranks.from_main(self._newest() if self.ranks.main else None)
        for complaint in aside + complaints:
            self.say(complaint)
        if step == 0 and (others := [c for c in complaints if OF_ANOTHER_RUN in c]):
            raise NotOfThisRun(
                f"run_dir={folder.path}: no checkpoint has this configuration. Nothing was changed. {others[0]} Use "
                f"the original settings, or give another run_dir."
            )
        if self.ranks.main:
            for damaged in [s for s in folder.steps() if s > step]:
                folder.set_aside(damaged)
        if step < self.training.length.max_steps:
            self.say(self.introduction(step))
            if self.ranks.main:
                self.training.loggers[0].cut_after(step)
                folder.cut_results_after(step)
                folder.cut_evaluations_after(step)
                cut_after(folder.path, step)
        return step, path

    def _newest(self) -> tuple[int, Path | None, list[str]]:
        """The newest checkpoint that is valid, belongs to this run and fits this network."""
        network = self.parts.denoiser.network
        shapes = {f"network.{name}": tuple(t.shape) for name, t in network.state_dict().items()}
        return self.folder.latest_valid(self.training.module.record, shapes)

    def introduction(self, step: int) -> str:
        """A summary of the run in a few lines of text."""
        parts, data, length = self.parts, self.training.data, self.training.length
        network, size = parts.denoiser.network, self.training.data.image_size
        epochs = length.max_steps * data.batch_size / data.num_images
        classes = f", {counted(data.num_classes, 'class', 'classes')}" if data.num_classes else ""
        lines = [
            f"Training {parts.name} in {self.folder.path}" + (f", continuing from step {step}" if step else ""),
            f"  data    {parts.described.name}: {counted(data.num_images, 'image', 'images')} of {size}x{size}, "
            f"{counted(data.channels, 'channel', 'channels')}{classes}",
            f"  model   {count_parameters(network):,} parameters, predicts {parts.denoiser.prediction}",
            f"  steps   {length.max_steps:,} of {data.batch_size} images ({epochs:,.1f} epochs), "
            f"on {self.place.device.type} in {'float32' if self.place.precision == '32' else 'bf16'}",
        ]
        if (held_out := self.held_out) is not None:
            number = counted(len(held_out.numbers), "held-out image", "held-out images")
            every = f"every {counted(parts.held_out.every_steps, 'step', 'steps')}"
            lines.append(f"  loss    also on {number} of split {held_out.split}, {every}")
        if modules := foreign(parts.record):
            lines.append(f"  own     sample, evaluate and lab need trust=[{','.join(modules)}] to load this model")
        return "\n".join(lines)

    # ---- sample grids and scores ----

    def looks(self) -> list[Look]:
        """The callbacks that evaluate the run while it trains."""
        looks, found, ema = self.parts.looks, [], self.training.ema
        if looks.enabled and looks.grid.every_steps:
            missing = lambda step: not grid_path(self.folder, step).is_file()  # noqa: E731
            found.append(Look(looks.grid.every_steps, self.ranks, self.look, missing, ema))
        if looks.enabled and looks.score.every_steps and self.parts.metrics:
            missing = lambda step: not self.parts.metrics.keys() <= self.folder.own_scores(step)  # noqa: E731
            found.append(Look(looks.score.every_steps, self.ranks, self.score, missing, ema))
        if self.held_out is not None:
            every, missing = self.parts.held_out.every_steps, self._held_out_missing
            found.insert(0, Look(every, self.ranks, self.measure_held_out, missing, long=False))
        return found

    @cached_property
    def held_out(self) -> HeldOutLoss | None:
        """The held-out loss, if it is measured. Access it only after the ranks are connected."""
        return held_out_loss(self.parts.held_out, self.training.module, self.training.data, self.place, self.ranks)

    def measure_held_out(self, step: int) -> None:
        """Measure the held-out loss and write it to metrics.csv and the loggers."""
        with self.signals.held(finishing=BATCH):
            row = self.held_out.measure()
        if self.ranks.main:
            for logger in self.training.loggers:
                logger.log_metrics(row, step)

    def _held_out_missing(self, step: int) -> bool:
        rows = self.training.loggers[0].rows()
        return not any(row["step"] == str(step) and row.get(COLUMNS[0]) for row in rows)

    def sampling(self, recipe: Recipe, batch_size: int) -> Sampling:
        """The sampling of images with the network of the run, on all ranks."""
        data = self.training.data
        shape = data.channels, data.image_size, data.image_size
        return recipe.batched(batch_size).sampling(self.parts.denoiser, self.place, shape, self.ranks.attend)

    def gallery(self, name: str, sampling: Sampling, number: int, step: int) -> Gallery:
        """The images of a look at a step, sampled by all ranks. They are kept on disk until the look is complete."""
        return Gallery(self.folder.evaluations / name, sampling, number, {"step": step, "weights": "ema"}, self.ranks)

    def look(self, step: int) -> None:
        """Sample a grid, save it and log it."""
        grid = self.parts.looks.grid
        sampling = self.sampling(self.parts.recipe, grid.batch_size)
        with self.gallery(f"grid_{step:08d}", sampling, grid.num_images, step) as gallery:
            with self.signals.held(finishing=BATCH):
                gallery.make()
            if self.ranks.main:
                path = save_grid(self.folder, step, gallery)
                mark_progress()
                for logger in self.training.loggers:
                    logger.log_picture(path, step)

    def score(
        self, step: int, metrics: Mapping[str, Metric] | None = None, final: bool = False
    ) -> list[dict[str, Any]]:
        """Sample and score, and add the rows to results.jsonl and to the loggers.

        During training the settings of callbacks.score.during apply; at the end (`final`) those of the run's sampler.

        Returns:
            The rows, on rank 0; [] on the others.
        """
        parts, scored = self.parts, self.parts.looks.score
        recipe, number = parts.recipe, scored.num_images
        if not final:
            recipe, number = parts.recipe_during, scored.during.num_images or number
        sampling = self.sampling(recipe, scored.batch_size)
        reference = self.reference()
        assert self.extractor is not None
        with self.gallery(f"score_{step:08d}{'_final' if final else ''}", sampling, number, step) as gallery:
            with self.signals.held(finishing=BATCH):
                gallery.make(self.extractor)
            if not self.ranks.main:
                return []
            about = {
                "by": "train",
                "step": step,
                "weights": "ema",
                "data": parts.described.name,
                "split": self.training.data.split,
            }
            about |= {"parameters": count_parameters(parts.denoiser.network)}
            rows = score(
                gallery.features(self.extractor),
                self.extractor,
                reference,
                parts.metrics if metrics is None else metrics,
                {**gallery.record(), **about},
                parts.paper,
                working=self.ranks.working,
            )
            self.folder.add_results(rows)
            mark_progress()
            gallery.remove()
        prefix = "final" if final and scored.every_steps and scored.otherwise else "eval"
        for logger in self.training.loggers:
            logger.log_scores(rows, step, prefix)
        return rows

    def reference(self) -> Reference | None:
        """The reference of the scores, on rank 0. Extractor and reference are created on the first call."""
        if self.extractor is None:
            if self.ranks.main:
                self.extractor = self.parts.extractor()
            self.ranks.largest()  # wait for rank 0, which may have to train the extractor
            self.extractor = self.extractor or self.parts.extractor()
        self.extractor.network.to(self.place.device)
        if not self.ranks.from_main(self._reference is not None):
            self._reference = extractors.reference(self.training.data, self.extractor, self.ranks)
        return self._reference

    def finish(self) -> int:
        """Create the missing final grid and scores, from the averaged weights of the last checkpoint, and the report.

        Returns:
            The exit status: 0, 128 + the number of the signal that stopped it, or that of `failed`.
        """
        try:
            self._look_finally()
        except Abandoned:
            number = self.ranks.signal()
            self.say(f"Stopped by signal {number} after training. Run the same command to create what is missing.")
            return 128 + number
        except Exception as error:
            return self.failed(error, "Sampling and scoring after training ended")
        return 0

    def _look_finally(self) -> None:
        parts, main, folder = self.parts, self.ranks.main, self.folder
        step, path, _ = self.ranks.from_main(self._newest() if main else None)
        if step < self.training.length.max_steps:  # the last save failed, with save.on_error=warn
            raise WriteFailed(f"The checkpoint of step {self.training.length.max_steps} could not be written.")
        network, checkpoint = parts.denoiser.network.to(self.place.device).eval().requires_grad_(False), load(path)
        if self.held_out is not None and self.ranks.from_main(main and self._held_out_missing(step)):
            network.load_state_dict({k.removeprefix("network."): v for k, v in checkpoint.state_dict.items()})
            self.measure_held_out(step)
        with torch.no_grad():
            load_average(network, checkpoint.ema, [p.data for p in network.parameters()])
        if parts.looks.enabled:
            self._pictures_finally(step)
            missing = self.ranks.from_main([m for m in parts.metrics if m not in folder.own_scores(step)])
            if missing:
                rows = self.score(step, {name: parts.metrics[name] for name in missing}, final=True)
                for row in rows:
                    self.say(describe(row))
                if text := table_text([with_model(row, self.training.module.record) for row in rows]):
                    self.say(text)
        if main:
            folder.point_best()
            write_report(folder)
            self.say(f"Report: {folder.report_path}")

    def _pictures_finally(self, step: int) -> None:
        folder, recipe = self.folder, self.parts.recipe
        if self.ranks.from_main(not grid_path(folder, step).is_file()):
            self.look(step)
            self.say(f"Samples: {grid_path(folder, step)}")
        with self.ranks.together():
            if self.ranks.main and not film_path(folder, step).is_file():
                save_film(folder, step, self.sampling(recipe, recipe.batch_size))

    # ---- the end of a run ----

    def leave(self) -> None:
        """Leave the group of ranks, together with the other ranks.

        After a failure this process ends here, if there are several ranks. Otherwise its exit would wait for pending
        collectives, which wait for the other ranks.
        """
        if not self.failure:
            self.ranks.leave_together()
            return
        self.ranks.leave()
        if self.ranks.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.failure)

    def failed(self, error: Exception, where: str) -> int:
        """Print the error that ended the run; for a bug of this program also the traceback, on its own rank.

        Returns:
            The exit status: 1, or 2 if the same command would fail again until the user changes something.
        """
        self.failure = 1
        cause, self.failure = self.ranks.failed(error)
        self._write_to_the_end()
        aside = self._distrusted(error)
        own = cause is None or str(error) in cause
        if own and (self.parts.debug or not isinstance(error, FAILURES)):
            traceback.print_exception(error)
        if self.ranks.size > 1:
            where = where.replace(" ", f" of rank {self.ranks.rank} ", 1)
        saved, disk = self.folder.steps(), describe_disk_error(error, self.room()) if own else None
        last = f"{where}. Run the same command to continue from step {saved[0] if saved else 0}."
        said = [f"error: {reason(error) if own else cause}", *([disk] if disk else []), *aside, last]
        print(*said, sep="\n", file=sys.stderr, flush=True)
        return self.failure

    def _distrusted(self, error: Exception) -> list[str]:
        """Set aside checkpoints after a change of the data, on rank 0 only. Returns a line of text for each."""
        try:
            return distrust(self.folder, error, aside=self.ranks.main)
        except OSError as problem:
            return [f"warning: {reason(problem)}"]

    def _write_to_the_end(self) -> None:
        """Wait until the current checkpoint is written."""
        try:
            self.training.writer.wait()
        except Exception as error:
            print(f"warning: {reason(error)}", file=sys.stderr, flush=True)

    def room(self) -> Room:
        """The disk space that the run still needs: for checkpoints and for the images to score.

        A new checkpoint is written before an old one is removed.
        """
        parts, there, saving = self.parts, self.folder.steps(), self.training.saving
        last, data, looks = self.training.length.max_steps, self.training.data, parts.looks
        left, every = last - (there[0] if there else 0), saving.every_steps
        kept = saving.keep + 1 + (1 if looks.enabled and looks.score.every_steps else 0)
        saves = -(-left // every) if every else kept if saving.every_minutes else 1
        number = max(min(kept, len(there) + saves) - len(there), 1) if left > 0 else 0
        one = parts.checkpoint_bytes
        what = [f"{counted(number, 'checkpoint', 'checkpoints')} of {size_of(one)}"] if number else []
        wanted = looks.enabled and parts.metrics.keys() - self.folder.own_scores(last)
        scored = looks.score.num_images if wanted else 0
        images = scored * data.channels * data.image_size**2
        made = self.folder.evaluations / f"score_{last:08d}_final"
        images -= sum(path.stat().st_size for path in made.glob("images_*.npz")) if scored else 0
        what += [f"{counted(scored, 'image', 'images')} to score"] if images > 0 else []
        return Room("run_dir", self.folder.path, number * one + max(images, 0), " and ".join(what))
