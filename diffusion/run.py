"""A training run from its first line to its report.

`Run(parts)` is made when every part is built and sound; `go` takes the run folder, trains from the newest sound
checkpoint, and makes what is missing of pictures, scores and report.
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
from diffusion.distributed.ranks import Abandoned, Ranks, got_on
from diffusion.distributed.signals import BATCH, Signals
from diffusion.files import Room, reason, size_of, told_by_disk, writing
from diffusion.metrics.metric import Metric
from diffusion.metrics.published import table_text
from diffusion.metrics.reference import Reference
from diffusion.page import told, write_report
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

FAILURES = (BadSample, Unreachable, OSError, NotFinite, ValueError)  # what can end a run without a bug of ours

warnings.filterwarnings("ignore", message="This DataLoader will create")  # data.num_workers is the user's to choose
warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning)\..*")


class NotOfThisRun(ValueError):
    """The checkpoints of the folder belong to another run."""

    exit_status = 2


class Run:
    """A run, ready to start.

    Args:
        parts: of it. signals: of this process; None where nobody handles any. say: tells the user something.
    """

    def __init__(
        self, parts: Parts, signals: Signals | None = None, say: Callable[[str], None] = lambda message: None
    ) -> None:
        self.parts, self.signals, self.say = parts, signals or Signals(), say
        self.folder, self.training, self.place = parts.training.folder, parts.training, parts.place
        self.extractor, self._reference = parts.ready, None
        self.ranks = Ranks()
        self.failure = 0  # exit status of what has ended the run

    # ---- the whole ----

    def go(self) -> int:
        """Train and finish; the exit status: 0, or 128 + the signal that stopped it.

        Raises:
            ValueError: the folder is another run's, in use, or has no room. Nothing has been written then.
        """
        if not self.parts.compute.main:
            status = self.work()
            self.part()
            return status
        room = self.room()
        with writing(room):
            if self.training.saving.on_error == "stop":
                room.check()
            elif room.lack:
                print(f"warning: {room.lack}", file=sys.stderr, flush=True)
            lock = self.folder.locked()
            lock.__enter__()
        status = 1  # a failure, unless what follows says otherwise
        try:
            with writing(room):
                self.begin()
            status = self.work()
            return status
        except SystemExit as end:  # by a signal outside of training
            status = end.code
            raise
        finally:
            with self.signals.held():
                for logger in self.training.loggers:
                    logger.close(status)
            lock.__exit__(None, None, None)
            self.part()

    def begin(self) -> None:
        """Write what the run is recorded as, and start the loggers; the folder is locked."""
        data, module = self.training.data, self.training.module
        self.folder.refuse_other(module.record)  # again, now that nobody else can write here
        module.record = module.record.replaced("data", lanes=data.lanes, digest=data.index.digest)
        self.folder.write_config(module.record)
        for logger in self.training.loggers:
            logger.start(self.say, module.record)

    def work(self) -> int:
        """What all ranks do: train, then look for a last time; the exit status. Signals are held: each part asks."""
        with self.signals.held():
            parts = self.parts
            self.ranks, self.place = together(parts.compute, self.place, self.signals, self._write_to_the_end)
            return self.train() or self.finish()

    def train(self) -> int:
        """From the newest sound checkpoint to max_steps; the exit status."""
        fit = None
        try:
            step, path = self._newest_sound()
            if step < self.training.length.max_steps:
                fit = Fit(self.training, self.ranks, self.place, self.signals, self.looks())
            number = self.ranks.signal()
        except Exception as error:
            return self.failed(error, "Training ended before its first step")
        if fit is None:
            return 0  # also after a signal: the report alone may be missing, and sampling stops by itself
        if number:
            self.say(f"Stopped by signal {number} before the first step; the same command goes on from step {step}.")
            return 128 + number
        try:
            return fit.go(path, self.say)
        except Exception as error:
            return self.failed(error, f"Training ended at step {fit.trainer.global_step}")

    def _newest_sound(self) -> tuple[int, Path | None]:
        """The newest sound checkpoint, its step and file, and the folder without what came after it."""
        folder = self.folder
        aside = distrust_noted(folder) if self.ranks.main else []
        step, path, complaints = self.ranks.from_main(self._newest() if self.ranks.main else None)
        for complaint in aside + complaints:
            self.say(complaint)
        if step == 0 and (others := [c for c in complaints if OF_ANOTHER_RUN in c]):
            raise NotOfThisRun(
                f"run_dir={folder.path}: no checkpoint is of this configuration, and nothing is changed. "
                f"{others[0]} Start the run as it was, or give another run_dir."
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
        """The newest checkpoint that is sound and of this run, with weights of this network."""
        network = self.parts.denoiser.network
        shapes = {f"network.{name}": tuple(t.shape) for name, t in network.state_dict().items()}
        return self.folder.latest_valid(self.training.module.record, shapes)

    def introduction(self, step: int) -> str:
        """What is about to happen, in a few lines."""
        parts, data, length = self.parts, self.training.data, self.training.length
        network, size = parts.denoiser.network, self.training.data.image_size
        epochs = length.max_steps * data.batch_size / data.num_images
        classes = f", {data.num_classes} classes" if data.num_classes else ""
        lines = [
            f"Training {parts.name} in {self.folder.path}" + (f", going on from step {step}" if step else ""),
            f"  data    {parts.described.name}: {data.num_images:,} images of {size}x{size}, {data.channels} channel(s)"
            + classes,
            f"  model   {count_parameters(network):,} parameters, predicts {parts.denoiser.prediction}",
            f"  steps   {length.max_steps:,} of {data.batch_size} images ({epochs:,.1f} epochs), "
            f"on {self.place.device.type} in {'float32' if self.place.precision == '32' else 'bf16'}",
        ]
        if (held_out := self.held_out) is not None:
            number, every = f"{len(held_out.numbers):,}", f"every {parts.held_out.every_steps:,} steps"
            lines.append(f"  loss    also of {number} images of split {held_out.split}, not trained on, {every}")
        if modules := foreign(parts.record):
            lines.append(f"  own     to load this model, sample, evaluate and lab need trust=[{','.join(modules)}]")
        return "\n".join(lines)

    # ---- pictures and scores ----

    def looks(self) -> list[Look]:
        """The callbacks that look at the run while it trains."""
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
        """The loss on images that are not trained on, if it is measured; asked for when the ranks are together."""
        return held_out_loss(self.parts.held_out, self.training.module, self.training.data, self.place, self.ranks)

    def measure_held_out(self, step: int) -> None:
        """A row held_out/... in metrics.csv and the loggers."""
        with self.signals.held(finishing=BATCH):
            row = self.held_out.measure()
        if self.ranks.main:
            for logger in self.training.loggers:
                logger.log_metrics(row, step)

    def _held_out_missing(self, step: int) -> bool:
        rows = self.training.loggers[0].rows()
        return not any(row["step"] == str(step) and row.get(COLUMNS[0]) for row in rows)

    def sampling(self, recipe: Recipe, batch_size: int) -> Sampling:
        """How the run's images are made, by all ranks."""
        data = self.training.data
        shape = data.channels, data.image_size, data.image_size
        return recipe.batched(batch_size).sampling(self.parts.denoiser, self.place, shape, self.ranks.attend)

    def gallery(self, name: str, sampling: Sampling, number: int, step: int) -> Gallery:
        """The images of a look at a step, made by all ranks; kept until they have been looked at."""
        return Gallery(self.folder.evaluations / name, sampling, number, {"step": step, "weights": "ema"}, self.ranks)

    def look(self, step: int) -> None:
        """A grid of samples, on disk and in the loggers."""
        grid = self.parts.looks.grid
        sampling = self.sampling(self.parts.recipe, grid.batch_size)
        with self.gallery(f"grid_{step:08d}", sampling, grid.num_images, step) as gallery:
            with self.signals.held(finishing=BATCH):
                gallery.make()
            if self.ranks.main:
                path = save_grid(self.folder, step, gallery)
                got_on()
                for logger in self.training.loggers:
                    logger.log_picture(path, step)

    def score(
        self, step: int, metrics: Mapping[str, Metric] | None = None, final: bool = False
    ) -> list[dict[str, Any]]:
        """Sample, score, and add to results.jsonl and to the loggers; the rows, on rank 0.

        While the run trains, by the settings of callbacks.score.during; at its end by its own sampler.
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
            got_on()
            gallery.remove()
        prefix = "final" if final and scored.every_steps and scored.otherwise else "eval"
        for logger in self.training.loggers:
            logger.log_scores(rows, step, prefix)
        return rows

    def reference(self) -> Reference | None:
        """What the run is scored against, on rank 0; extractor and reference are made when first asked for."""
        if self.extractor is None:
            if self.ranks.main:
                self.extractor = self.parts.extractor()
            self.ranks.largest()  # which may have trained it
            self.extractor = self.extractor or self.parts.extractor()
        self.extractor.network.to(self.place.device)
        if not self.ranks.from_main(self._reference is not None):
            self._reference = extractors.reference(self.training.data, self.extractor, self.ranks)
        return self._reference

    def finish(self) -> int:
        """What is missing of the final grid and scores, from the last checkpoint's averaged weights; the report. The
        exit status: 0, 128 + the signal that stopped it, or that of `failed`."""
        try:
            self._look_finally()
        except Abandoned:
            number = self.ranks.signal()
            self.say(f"Stopped by signal {number} after training; the same command goes on with what is missing.")
            return 128 + number
        except Exception as error:
            return self.failed(error, "Sampling and scoring after training ended")
        return 0

    def _look_finally(self) -> None:
        parts, main, folder = self.parts, self.ranks.main, self.folder
        step, path, _ = self.ranks.from_main(self._newest() if main else None)
        if step < self.training.length.max_steps:  # and training has gone on, as save.on_error=warn says
            raise WriteFailed(f"The weights of step {self.training.length.max_steps} are not on disk.")
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
                if text := table_text([told(row, self.training.module.record) for row in rows]):
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

    # ---- how it ends ----

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
        if own and (self.parts.debug or not isinstance(error, FAILURES)):
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

    def _write_to_the_end(self) -> None:
        """Let the checkpoint that is being written be written."""
        try:
            self.training.writer.wait()
        except Exception as error:
            print(f"warning: {reason(error)}", file=sys.stderr, flush=True)

    def room(self) -> Room:
        """What the run folder has yet to take: checkpoints, of which a new one is written before an old one goes, and
        the images that are scored."""
        parts, there, saving = self.parts, self.folder.steps(), self.training.saving
        last, data, looks = self.training.length.max_steps, self.training.data, parts.looks
        left, every = last - (there[0] if there else 0), saving.every_steps
        kept = saving.keep + 1 + (1 if looks.enabled and looks.score.every_steps else 0)
        saves = -(-left // every) if every else kept if saving.every_minutes else 1
        number = max(min(kept, len(there) + saves) - len(there), 1) if left > 0 else 0
        one = parts.checkpoint_bytes
        what = [f"{number} checkpoint{'s' if number > 1 else ''} of {size_of(one)}"] if number else []
        wanted = looks.enabled and parts.metrics.keys() - self.folder.own_scores(last)
        scored = looks.score.num_images if wanted else 0
        images = scored * data.channels * data.image_size**2
        made = self.folder.evaluations / f"score_{last:08d}_final"
        images -= sum(path.stat().st_size for path in made.glob("images_*.npz")) if scored else 0
        what += [f"{scored:,} images to score"] if images > 0 else []
        return Room("run_dir", self.folder.path, number * one + max(images, 0), " and ".join(what))
