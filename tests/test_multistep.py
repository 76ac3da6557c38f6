"""Samplers with a memory and samplers of several calls: the walk owns the past, and the order is the method's."""

import csv
import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import inside

from diffusion.lab.errors import distance_of_gaussian
from diffusion.lab.gaussian import prior_at, propagated
from diffusion.lab.refinement import fitted_order
from diffusion.noise import ImageNoise
from diffusion.process.grids import SPACINGS, even, geometric, times
from diffusion.process.schedule import ve_geometric, vp_linear
from diffusion.process.toy import Gaussian
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.base import Sampler
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.langevin import MetropolisLangevin
from diffusion.samplers.multistep import AdamsBashforth, FlowSampler, Heun
from diffusion.samplers.predictor_corrector import PredictorCorrector
from diffusion.scoring import recipe
from diffusion.scoring.recipe import Plan

SCHEDULES = pytest.mark.parametrize("schedule", [vp_linear(1000), ve_geometric(1000)], ids=["vp", "ve"])


def toy():
    return Gaussian([0.3, -0.2], covariance=torch.tensor([[0.25, 0.05], [0.05, 0.04]], dtype=torch.float64))


@SCHEDULES
@pytest.mark.parametrize("sampler, order", [(DDIM, 1), (AdamsBashforth, 2), (Heun, 2)])
def test_the_error_falls_at_the_order_of_the_method(schedule, sampler, order):
    """On Gaussian data, exactly, the past carried along with the law."""
    steps = [80, 160, 320, 640]
    found = [distance_of_gaussian(toy(), sampler(schedule), geometric(schedule, 1000, 1.0, n)) for n in steps]
    assert fitted_order(steps, found).order == pytest.approx(order, abs=0.1)


@SCHEDULES
@pytest.mark.parametrize("sampler", [AdamsBashforth, Heun])
def test_the_law_that_is_carried_along_is_that_of_walks(schedule, sampler):
    times, data = even(1000, 0, 7), toy()
    laws = list(propagated(sampler(schedule), data.denoiser(schedule), prior_at(schedule, 1000, 2), times))
    x = float(schedule.std(1000)) * torch.randn(
        40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    ends = sampler(schedule).sample(data.denoiser(schedule), x, times, torch.zeros_like)
    assert torch.allclose(ends.mean(0), laws[-1].mean, atol=0.02)
    assert torch.allclose(ends.T.cov(), laws[-1].covariance, atol=0.02 * float(laws[-1].covariance.max()) + 1e-4)


@pytest.mark.parametrize("sampler", [AdamsBashforth, Heun])
def test_two_walks_of_one_object_do_not_meet(sampler):
    schedule, data = vp_linear(1000), toy()
    one, denoise = sampler(schedule), data.denoiser(schedule)
    starts = [torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    grids = [even(1000, 0, 9), even(900, 0, 9)]
    alone = [one.sample(denoise, x, grid, torch.zeros_like) for x, grid in zip(starts, grids, strict=True)]
    walks = [one.walk(denoise, x, grid, torch.zeros_like) for x, grid in zip(starts, grids, strict=True)]
    for first, second in zip(*walks, strict=True):  # in turn
        ends = first.x, second.x
    assert all(torch.equal(end, wanted) for end, wanted in zip(ends, alone, strict=True))


class Noting(Sampler):
    """Stays where it is, and notes the past it is given."""

    memory = 2

    def __init__(self, schedule):
        super().__init__(schedule)
        self.seen = []

    def step(self, denoise, x_t, t, s, randn, past=()):
        x0 = denoise(x_t, t).x0
        self.seen.append([moment.t for moment in past])
        assert all(torch.equal(denoise(moment.x, moment.t).x0, moment.prediction.x0) for moment in past)
        return x0


def test_the_past_is_forgotten_where_a_walk_stays_or_turns_round():
    schedule, data = vp_linear(1000), toy()
    noting, x = Noting(schedule), torch.zeros(1, 2, dtype=torch.float64)
    noting.sample(data.denoiser(schedule), x, [900, 800, 700, 600, 600, 500, 400, 450, 500, 300], torch.zeros_like)
    #                          900  -> 800    700         600->600  ->500  ->400  turns      on        turns
    assert noting.seen == [[], [900], [800, 900], [], [], [600], [], [400], []]


def test_noise_may_belong_to_the_times_of_a_step():
    """What gives noise `between` two times is asked for it at every step; DDIM draws by calling it once."""
    asked = []

    class OfTimes:
        def between(self, t, s):
            asked.append((t, s))
            return torch.zeros_like

    schedule, data = vp_linear(1000), toy()
    times = even(1000, 0, 4)
    DDIM(schedule, eta=1.0).sample(data.denoiser(schedule), torch.zeros(1, 2, dtype=torch.float64), times, OfTimes())
    assert asked == list(pairwise(times))


CALLS = {
    "ddim": DDIM,
    "heun": Heun,
    "adams": AdamsBashforth,
    "adams by heun": partial(AdamsBashforth, start="heun"),
    "heun corrected": partial(PredictorCorrector, predictor=Heun),
    "annealed": partial(AnnealedLangevin, step_size=0.1),
    "annealed, not denoised": partial(AnnealedLangevin, step_size=0.1, denoise=False),
    "metropolis": partial(MetropolisLangevin, step_size=1e-3),
    "metropolis, ddim": partial(PredictorCorrector, predictor=DDIM, corrector=partial(MetropolisLangevin, step_size=1)),
}


@pytest.mark.parametrize("visits", [1, 2, 3])
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_a_sampler_knows_how_often_it_calls(make, visits):
    schedule, data, called = vp_linear(1000), toy(), []

    def denoise(x_t, t, labels=None):
        called.append(t)
        return data.denoiser(schedule)(x_t, t)

    for grid in (times(1000, 3, "trailing", visits), times(1000, 1, "trailing", visits), [800, 500, 300]):
        called.clear()
        sampler = make(schedule)
        sampler.sample(denoise, torch.zeros(2, 2, dtype=torch.float64), grid, ImageNoise(0, torch.arange(2)))
        assert sampler.calls(grid) == len(called), grid


@SCHEDULES
def test_the_first_step_may_be_of_second_order_too(schedule):
    data = toy()
    plain, started = (
        distance_of_gaussian(data, AdamsBashforth(schedule, start), [500, 300, 200]) for start in ("ddim", "heun")
    )
    assert started < 0.7 * plain
    x, denoise = torch.ones(1, 2, dtype=torch.float64), data.denoiser(schedule)
    first = {s: AdamsBashforth(schedule, s).step(denoise, x, 900, 500, None) for s in ("ddim", "heun")}
    assert torch.equal(first["ddim"], AdamsBashforth(schedule).step(denoise, x, 900, 500, None))
    assert torch.equal(first["ddim"], FlowSampler.moved(AdamsBashforth(schedule), x, 900, 500, denoise(x, 900).epsilon))
    assert torch.equal(first["heun"], Heun(schedule).step(denoise, x, 900, 500, None))
    with pytest.raises(ValueError, match="sampler.start=euler must be one of ddim, heun"):
        AdamsBashforth(schedule, "euler")


def test_a_predictor_that_remembers_is_refused_between_correctors():
    with pytest.raises(ValueError, match="sampler.predictor: AdamsBashforth reads the steps before"):
        PredictorCorrector(vp_linear(1000), AdamsBashforth)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("make", [DDIM, Heun, CALLS["heun corrected"]], ids=["ddim", "heun", "corrected"])
def test_the_longest_walk_of_a_budget_is_found_in_few_grids(make, spacing, monkeypatch):
    """The same as by trying every number of steps, the largest first."""
    schedule, made = vp_linear(60), []
    sampler = make(schedule)
    monkeypatch.setattr(recipe, "times", lambda *args: made.append(args[1]) or times(*args))
    for visits in (1, 3):
        for budget in (6, 17, 59, 90, 1000):
            made.clear()
            found = Plan(max_calls=budget, spacing=spacing, visits=visits).times(sampler)
            assert len(made) <= 12
            all_grids = (times(schedule, n, spacing, visits) for n in range(min(budget, 60), 0, -1))
            assert found == next(grid for grid in all_grids if sampler.calls(grid) <= budget)
    with pytest.raises(ValueError, match="sampler.max_calls=2: one step has"):
        Plan(max_calls=2, spacing=spacing, visits=5).times(sampler)


def test_a_budget_in_calls_is_turned_into_steps(digits_run, tmp_path):
    rows = []
    for option in ("adams_bashforth", "heun", "ddim"):
        words = [
            f"checkpoint={digits_run}",
            "num_images=20",
            "metrics=[fid]",
            f"sampler={option}",
            f"out={option}.jsonl",
        ]
        assert inside("evaluate", [*words, "sampler.max_calls=12"], tmp_path) == 0
        rows.append(json.loads((tmp_path / f"{option}.jsonl").read_text()))
    assert [(row["num_steps"], row["nfe"]) for row in rows] == [(12, 12), (6, 11), (12, 12)]


def test_the_commands_take_them(digits_run, tmp_path):
    words = [f"checkpoint={digits_run}", "sampler=adams_bashforth", "sampler.num_steps=3", "num_images=4", "out=s"]
    assert inside("sample", words, tmp_path) == 0
    words = [f"checkpoint={digits_run}", "task=sweep", "num_images=20", "sweep.num_steps=[2,3]", "sweep.eta=[]"]
    words += ["sweep.large=false", "sweep.samplers=[adams_bashforth,heun]", "out=sweep"]
    assert inside("evaluate", words, tmp_path) == 0
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        table = [(row["sampler"], row["words"], row["num_steps"]) for row in csv.DictReader(file)]
    named = [("adamsbashforth", "adams_bashforth"), ("heun", "heun")]
    assert table == [(*names, steps) for names in named for steps in ("2", "3")]
    words = ["task=errors", "sampler=adams_bashforth", "sampler.num_steps=20", "errors.num_steps=[40,80,160]"]
    assert inside("lab", [*words, "samplers=[adams_bashforth,heun]", "out=lab"], tmp_path) == 0
    orders = (tmp_path / "lab" / "errors" / "orders.csv").read_text()
    assert "adams_bashforth" in orders and "heun" in orders


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("multistep")
    words = ["trainer=cpu", "callbacks=none", "trainer.max_steps=2", "data.batch_size=8", f"data.root={digits}"]
    assert inside("train", [*words, "run_dir=run"], folder) == 0
    return folder / "run"
