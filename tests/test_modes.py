"""How much of each mode a sampler makes: eight of them, of weights 1 to 8, far apart, by exact scores.

A chi-square test of the counts: of 20,000 samples in 1,000 steps where it is marked slow, else of 2,500 in 200 or 400.
"""

from functools import partial

import pytest
import torch
from scipy.stats import chisquare

from diffusion.noise import ImageNoise
from diffusion.process.grids import times
from diffusion.process.schedule import sub_vp, ve_geometric, vp_continuous, vp_linear
from diffusion.process.toy import modes
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.langevin import Langevin
from diffusion.samplers.predictor_corrector import LangevinCorrector, PredictorCorrector

TOY = modes()
CENTRES = 0.7 * torch.tensor([[1, 0], [0.5**0.5, 0.5**0.5], [0, 1], [-(0.5**0.5), 0.5**0.5]], dtype=torch.float64)
CENTRES = torch.cat([CENTRES, -CENTRES])
SCHEDULES = {
    "vp": vp_linear(),
    "vp continuous": vp_continuous(),
    "sub-vp": sub_vp(),
    "ve": ve_geometric(1000, 0.01, 10.0),
}
CLAIMING = {  # sampler and visits of each level
    "small": (Ancestral, 1),
    "large": (partial(Ancestral, variance="large"), 1),
    "ddim half": (partial(DDIM, eta=0.5), 1),
    "ddim": (DDIM, 1),
    "corrected": (
        partial(PredictorCorrector, predictor=Ancestral, corrector=partial(LangevinCorrector, norms="expected")),
        2,
    ),
}
slow = partial(pytest.param, marks=pytest.mark.slow)


def p_value(schedule, sampler, grid, num):
    """Of the counts of the nearest mode, against the weights; the seed is fixed."""
    noise = ImageNoise(0, torch.arange(num))
    x = float(schedule.std(grid[0])) * noise(torch.zeros(num, 2, dtype=torch.float64))
    x = sampler(schedule).sample(TOY.denoiser(schedule), x, grid, noise)
    counts = torch.cdist(x, CENTRES).argmin(1).bincount(minlength=8)
    return chisquare(counts.numpy(), (TOY.weights * num).numpy()).pvalue


def test_the_centres_are_those_of_the_set():
    x = TOY.sample(20_000, torch.Generator().manual_seed(0))
    nearest = torch.cdist(x, CENTRES).min(1)
    assert nearest.values.max() < 0.36, "six deviations, and half the way to the next"
    assert chisquare(nearest.indices.bincount().numpy(), (TOY.weights * len(x)).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("num, num_steps", [(2500, 200), slow(20_000, 1000)])
@pytest.mark.parametrize("sampler, visits", CLAIMING.values(), ids=CLAIMING)
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_every_mode_has_its_share(name, sampler, visits, num, num_steps):
    grid = times(1000, num_steps // visits, "trailing", visits)
    assert p_value(SCHEDULES[name], sampler, grid, num) > 1e-3


@pytest.mark.parametrize("name", ["vp continuous", "sub-vp"])
def test_on_continuous_schedules_too(name):
    assert p_value(SCHEDULES[name], Ancestral, times(1000, 200, "trailing"), 2500) > 1e-3


@pytest.mark.parametrize("num, num_steps", [(2500, 200), slow(20_000, 1000)])
def test_plain_langevin_finds_the_modes_but_not_their_shares(num, num_steps):
    """At the lowest level what divides the modes is crossed by no chain: each has what was near it at the start."""
    schedule = SCHEDULES["ve"]
    assert p_value(schedule, partial(Langevin, step_size=1e-3), [1] * num_steps + [0], num) < 1e-100


@pytest.mark.parametrize("num, num_steps", [(2500, 400), slow(20_000, 1000)])
def test_annealing_cures_it(num, num_steps):
    """A geometric ladder of so many levels, an update of 0.2 sigma^2 at each: chains move while the modes are one."""
    schedule = ve_geometric(num_steps, 0.01, 10.0)
    annealed = partial(AnnealedLangevin, step_size=0.2)
    assert p_value(schedule, annealed, times(num_steps, num_steps), num) > 1e-3


def test_annealing_by_too_short_steps_does_not():
    """On the same ladder with a quarter of the step the law lags behind the level: rare modes are made too often."""
    schedule = ve_geometric(400, 0.01, 10.0)
    assert p_value(schedule, partial(AnnealedLangevin, step_size=0.05), times(400, 400), 2500) < 1e-6
