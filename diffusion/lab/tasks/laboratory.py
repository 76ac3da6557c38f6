"""What the tasks of the laboratory measure with: schedule, data, denoiser, samplers; and where it all goes.

    page = lab.page(title, lead)
    ...
    lab.finish(page)              page.json, report.html

What a task does is in errors.py, images.py, plane.py, modes.py and equivalence.py, each with `main(lab)`.
"""

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.data.module import ImageShardsDataModule
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.files import csv_text, write_atomically
from diffusion.lab.page import Charts, Page, write_page
from diffusion.lab.settings import Asked
from diffusion.lab.verdict import Walk
from diffusion.noise import Stream, seed63
from diffusion.page.chart import Chart, save
from diffusion.process.grids import even, geometric, steps_of
from diffusion.process.schedule import Denoiser, Prediction, Schedule
from diffusion.process.toy import Mixture
from diffusion.samplers.base import Sampler
from diffusion.scoring.recipe import Recipe
from diffusion.scoring.trained import Trained

SHADES = ("q3", "q1", "q4", "q2", "paper", "ink", "q5")  # of the samplers that are held against each other
LOWEST = 1.0  # time at which walks end whose law is compared: below it a table's noise falls to nothing in one step


class Named(NamedTuple):
    """A sampler of the list `samplers`: its words, how it is made, and its steps at each level.

    plain: it stays at the lowest level, as plain Langevin dynamics do. anneals: it stays at each level for a while.
    """

    words: str
    make: Callable[[Schedule], Sampler]
    visits: int
    plain: bool
    anneals: bool

    def times(self, schedule: Schedule, num_steps: int, stop: float = 0.0, widest: float = math.inf) -> list[float]:
        """Of a walk of so many steps in all from T to `stop`, even in t; or, if it anneals, in lambda: a geometric
        ladder, which begins at sigma / alpha = widest if T is noisier."""
        if self.plain:
            return [LOWEST] * num_steps + [stop]
        if num_steps < self.visits:
            raise Refusal(
                f"samplers: {self.words!r} takes {self.visits} steps at a level, here are {num_steps} in all."
            )
        levels, last = max(num_steps // self.visits, 1), [] if stop else [0.0]
        levels, stop = (levels, stop) if stop else (levels - 1, LOWEST)
        top = float(schedule.num_timesteps)
        if self.anneals and -math.log(widest) > float(schedule.log_ratio(top)):
            top = schedule.time_of(-math.log(widest))
        if levels == 0:
            grid = [top]
        else:
            grid = geometric(schedule, top, stop, levels) if self.anneals else even(top, stop, levels)
        grid = [*grid, *last]
        return [t for t in grid[:-1] for _ in range(self.visits)] + grid[-1:]


class Subject(NamedTuple):
    """What is looked at.

    toy: the data, if their score is known, else None. model: of a checkpoint, None without one.
    """

    schedule: Schedule
    schedule_name: str
    toy: Mixture | None
    toy_name: str
    model: Trained | None = None
    data: Callable[[str | None], ImageShardsDataModule] | None = None  # split -> the model's data set, for reading


@dataclass(frozen=True)
class Laboratory:
    """What the tasks share; nothing written yet.

    Args:
        task: its name. asked: its settings. subject: what is looked at. place: the model runs on.
        samplers: that are held against each other. recipe: of the walk whose errors are measured.
        folder: for a folder of each task and report.html. fitted_on: points that a Gaussian denoiser knows.
        say: tells the user something.
    """

    task: str
    asked: Asked
    subject: Subject
    place: Place
    samplers: Sequence[Named]
    recipe: Recipe
    folder: Path
    seed: int
    batch_size: int
    say: Callable[[str], None]
    fitted_on: int | None = None

    @property
    def schedule(self) -> Schedule:
        return self.subject.schedule

    @property
    def schedule_name(self) -> str:
        return self.subject.schedule_name

    @property
    def toy(self) -> Mixture | None:
        return self.subject.toy

    @property
    def toy_name(self) -> str:
        return self.subject.toy_name

    @property
    def model(self) -> Trained | None:
        return self.subject.model

    @cached_property
    def sampler_and_times(self) -> tuple[Sampler, list[float]]:
        """The sampler whose errors are measured, and the times that its walk visits."""
        return self.recipe.sampler_of(self.schedule)

    @property
    def sampler(self) -> Sampler:
        return self.sampler_and_times[0]

    @property
    def times(self) -> list[float]:
        return self.sampler_and_times[1]

    @property
    def walk(self) -> Walk:
        """What there is to be said of the walk of `sampler`."""
        return Walk(self.times[0], steps_of(self.times), self.schedule.num_timesteps, self.model is not None)

    @property
    def dim(self) -> int:
        """Numbers in a point of the toy."""
        return len(self.toy.moments(self.schedule(0))[0])

    def wide(self, t: float) -> bool:
        """Whether the noise at time t is wider than the data by far."""
        return -float(self.schedule.log_ratio(t)) > math.log(self.widest / 2)

    @property
    def widest(self) -> float:
        """sigma / alpha from which a ladder may begin: there the noise is twenty times as wide as the data."""
        return 20 * float(self.toy.spread(self.schedule(0)).max())

    def points(self, number: int) -> Tensor:
        """So many points of the toy, (N, d), float64: a function of the seed."""
        assert self.toy is not None
        return self.toy.sample(number, torch.Generator().manual_seed(seed63(self.seed, Stream.SAMPLES)))

    def trained_on_points(self) -> Denoiser:
        """The checkpoint's denoiser, of points (N, C): what a network sees as images of one pixel."""
        assert self.model is not None
        network = self.model.denoiser

        def denoise(x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
            with torch.no_grad():
                x0, epsilon, _ = network(x_t.float()[..., None, None], t, labels)
            return Prediction(x0[..., 0, 0].to(x_t), epsilon[..., 0, 0].to(x_t))

        return denoise

    # ---- what comes out ----

    def page(self, title: str, lead: str) -> Page:
        return Page(title, lead, shlex.join(["python", "-m", "diffusion.lab", *told(sys.argv[1:])]))

    def path(self, name: str) -> Path:
        """Of a file of this task."""
        return self.folder / self.task / name

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], first: Iterable[str] = ()) -> Path:
        """A CSV file of this task; its path."""
        write_atomically(self.path(name), csv_text(rows, first))
        return self.path(name)

    def drawn(self, **charts: Chart) -> Charts:
        """Charts by the names of their PNG files, which are written; those without a point are left out."""
        shown = {name: chart for name, chart in charts.items() if chart.drawn}
        for name, chart in shown.items():
            save(chart, self.path(f"{name}.png"))
        return Charts(list(shown.values()))

    def finish(self, page: Page) -> None:
        """Write the page, say where things are."""
        report = write_page(page, self.folder / self.task)
        for path in sorted(self.path("").iterdir()):
            if path.suffix in (".csv", ".png", ".gif"):
                self.say(str(path))
        self.say(f"Report: {report}")


def refuse_stays(times: Sequence[float]) -> None:
    """Refuse walks that stay at a level, which cannot share their noise with finer ones."""
    if len(set(times)) < len(times):
        raise Refusal(
            "sampler.visits: walks on shared noise are those of samplers that go down at every step: give "
            "sampler=ddim, ancestral or another one without visits."
        )


def told(words: Sequence[str]) -> list[str]:
    """The words of the command as a user gives them: without the quotes that Hydra's grammar needs."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if len(value) > 1 and value[0] == value[-1] == "'":
            value = value[1:-1].replace("\\'", "'")
        found.append(f"{key}{equals}{value}")
    return found
