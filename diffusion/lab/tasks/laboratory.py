"""From the settings of `lab` to what its tasks measure with: schedule, data, denoiser, samplers, and where it all goes.

    lab = Laboratory(cfg, say)
    page = lab.page("errors", title, lead)
    ...
    lab.finish(page)              page.json, report.html

What a task does is in lab_errors.py, lab_images.py, lab_plane.py, lab_modes.py and lab_equivalence.py, each with
`main(lab)`.
"""

import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion.build import door
from diffusion.build import parts as build
from diffusion.config.check import check
from diffusion.config.compose import check_kind, conf_dir, groups, lookup, nearest, parse, plain, typed, unknown
from diffusion.config.effect import OF_IMAGES, OF_POINTS, refuse_idle
from diffusion.errors import Refusal
from diffusion.files import csv_text, write_atomically
from diffusion.lab.page import Charts, Page, write_page
from diffusion.lab.verdict import Walk
from diffusion.noise import Stream, seed63
from diffusion.page.chart import Chart, save
from diffusion.process.grids import even, geometric
from diffusion.process.schedule import Denoiser, Prediction, Schedule
from diffusion.process.toy import SETS, Gaussian, Mixture
from diffusion.runs.folder import RunFolder
from diffusion.samplers.base import Sampler

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


class Laboratory:
    """What the tasks share, built and checked; nothing written yet.

    model: of the checkpoint, None without one. toy: the data, if their score is known, else None.

    Raises:
        Refusal: what is asked for cannot be.
    """

    def __init__(self, cfg: DictConfig, say: Callable[[str], None]) -> None:
        self.cfg, self.say, self.place, self.model = cfg, say, build.place(cfg.trainer), None
        if cfg.checkpoint is not None:
            self.model = door.trained(cfg.checkpoint, cfg.ema)
        self.schedule = build.schedule(cfg) if self.model is None else self.model.denoiser.schedule
        self.toy = self._toy()
        if self.model is not None:
            refuse_idle(cfg, typed(), OF_IMAGES if self.toy is None else OF_POINTS)
        self.folder = Path(cfg.out) if cfg.out is not None else self._beside() / "lab"
        if cfg.out is None and self.model is not None and self.model.run_folder is not None:
            RunFolder(self.model.run_folder).refuse_links()
        self.samplers = [named(words) for words in cfg.samplers]
        for sampler in self.samplers:
            sampler.make(self.schedule)
        if cfg.task == "errors":  # no other task takes the setting `sampler`
            self.sampler, self.times = build.sampler(cfg, self.schedule)

    def _beside(self) -> Path:
        return (None if self.model is None else self.model.run_folder) or Path(".")

    def _toy(self) -> Mixture | None:
        """The distribution whose score is known: that of the checkpoint's data, or the one that `toy` names."""
        cfg = self.cfg
        if self.model is not None:
            return door.data_of(self.model).mixture if self.model.on_points else None
        name = cfg.toy or ("gaussian" if cfg.task == "errors" else "modes")
        if name != "gaussian":
            return SETS[name]()
        mean, stds = list(cfg.gaussian.mean), list(cfg.gaussian.stds)
        return Gaussian(mean, covariance=torch.diag(torch.tensor(stds, dtype=torch.float64) ** 2))

    @property
    def toy_name(self) -> str:
        if self.model is not None:
            return self.model.config.at("data.toy") or self.model.data_name
        return self.cfg.toy or ("gaussian" if self.cfg.task == "errors" else "modes")

    @property
    def schedule_name(self) -> str:
        cfg = self.cfg if self.model is None else self.model.config
        return str(cfg["schedule"]["_target_"]).rpartition(".")[2]

    @property
    def walk(self) -> Walk:
        """What there is to be said of the walk of `sampler`."""
        return Walk(self.times[0], len(set(self.times)) - 1, self.schedule.num_timesteps, self.model is not None)

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
        return self.toy.sample(number, torch.Generator().manual_seed(seed63(self.cfg.seed, Stream.SAMPLES)))

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
        return self.folder / self.cfg.task / name

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
        report = write_page(page, self.folder / self.cfg.task)
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


# ---- the samplers by name ----


def named(words: str) -> Named:
    """`ddim eta=0.5` -> the option of the group `sampler` with these settings.

    Raises:
        Refusal: no such option, or no such setting of it.
    """
    name, *settings = words.split() or [""]
    known = groups()["sampler"]
    if name not in known:
        raise Refusal(f"samplers: there is no sampler={name}.{nearest(name, known)} There are: {', '.join(known)}.")
    cfg = group("sampler", name)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (equals and value):
            raise Refusal(f"samplers: {words!r}: settings are key=value, as in 'ddim eta=0.5'.")
        parent, last, there = lookup(cfg, key)
        if not there:
            raise Refusal(f"samplers: {words!r}: {unknown(key, parent, last)}")
        try:
            given = check_kind(f"sampler.{key}", plain(parse(setting).value()), parent[last])
        except Refusal as e:
            raise Refusal(f"samplers: {words!r}: {e}") from e
        OmegaConf.update(cfg, key, given)
    check(OmegaConf.create({"sampler": cfg}))
    taken = build.without(cfg, "num_steps", "spacing", "visits", "clip_x0")
    make = lambda schedule: build.make(taken, "samplers", schedule=schedule)  # noqa: E731
    stays, visits = cfg.num_steps == 1, cfg.get("visits", 1)
    anneals = visits > 1 or str(cfg._target_).endswith("AnnealedLangevin")
    return Named(words, make, 1 if stays else visits, stays, anneals)


def group(name: str, option: str) -> DictConfig:
    """An option of a config group as it stands in conf/; may be asked for within a command."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(overrides=[f"+{name}={option}"])[name]
    finally:
        GlobalHydra.instance().hydra = outer
