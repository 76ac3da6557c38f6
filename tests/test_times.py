"""Time grids: as many transitions as asked for, descending, down to clean data."""

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from diffusion.process.grids import OF_LEVELS, SPACINGS, karras, steps_of, times
from diffusion.process.schedule import ve_geometric, vp_linear

ALL = ["linear", "trailing", "lambda", "karras"]  # quadratic visits fewer


@pytest.mark.parametrize("spacing", ALL)
@pytest.mark.parametrize("num_timesteps", [2, 3, 4, 5, 6, 7, 10, 97, 250, 1000])
def test_any_number_of_steps_gives_that_many_strictly_descending(spacing, num_timesteps):
    schedule = vp_linear(num_timesteps, 1e-4, 0.02)
    for num_steps in range(1, num_timesteps + 1, max(num_timesteps // 50, 1)):
        grid = times(schedule, num_steps, spacing)
        assert len(grid) == num_steps + 1 and grid[-1] == 0 and grid[0] <= num_timesteps and grid[-2] >= 1
        assert all(t > s for t, s in pairwise(grid)), (num_steps, grid)


def test_the_published_grids():
    assert times(1000, 10, "linear") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1, 0]
    assert times(1000, 10, "quadratic") == [801, 633, 484, 356, 247, 159, 89, 40, 10, 1, 0]
    assert times(1000, 10, "trailing") == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


@pytest.mark.parametrize("num_steps", [2, 10, 50, 100, 1000])
def test_the_quadratic_grid_is_that_of_the_code_of_ddim_each_level_once(num_steps):
    published = [int(level) for level in np.linspace(0, np.sqrt(1000 * 0.8), num_steps) ** 2]  # counted from 0
    assert times(1000, num_steps, "quadratic")[:-1] == sorted({1 + level for level in published}, reverse=True)
    if num_steps >= 50:
        assert len(times(1000, num_steps, "quadratic")) - 1 < num_steps


@pytest.mark.parametrize("schedule", [vp_linear(1000), ve_geometric(1000)], ids=["vp", "ve"])
def test_uniform_in_lambda_and_karras_grid_are_their_formulas(schedule):
    by_lambda = [float(schedule.log_ratio(t)) for t in times(schedule, 12, "lambda")[:-1]]
    assert np.diff(by_lambda) == pytest.approx(np.full(11, (by_lambda[-1] - by_lambda[0]) / 11), rel=1e-6)
    ratios = np.array([math.exp(-float(schedule.log_ratio(t))) for t in times(schedule, 12, "karras")[:-1]])
    high, low, i = ratios[0], ratios[-1], np.arange(12)
    assert (high, low) == tuple(math.exp(-float(schedule.log_ratio(t))) for t in (1000, 1))
    wanted = (high ** (1 / 7) + i / 11 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert ratios == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [1, 10, 1000])
def test_a_single_step_begins_in_noise(spacing, num_timesteps):
    """At the highest level of the spacing, which is T but for the quadratic one."""
    schedule = vp_linear(num_timesteps, 1e-4, 0.02)
    (start, stop) = times(schedule, 1, spacing)
    assert stop == 0 and start == (1 + int(0.8 * num_timesteps) if spacing == "quadratic" else num_timesteps)


@pytest.mark.parametrize("schedule", [vp_linear(1000), ve_geometric(1000)], ids=["vp", "ve"])
def test_rho_of_the_karras_grid_is_a_setting(schedule):
    assert times(schedule, 9, "karras") == times(schedule, 9, "karras", rho=7.0) == [*karras(schedule, 9), 0]
    ratios = [math.exp(-float(schedule.log_ratio(t))) for t in times(schedule, 9, "karras", rho=1.0)[:-1]]
    assert np.diff(ratios) == pytest.approx(np.full(8, np.diff(ratios).mean()), rel=1e-6), "evenly in sigma / alpha"
    assert times(schedule, 9, "karras", rho=9.0)[4] < times(schedule, 9, "karras")[4]


@pytest.mark.parametrize("visits", [1, 2, 5])
def test_the_steps_of_a_grid_are_those_that_were_asked_for_whatever_the_visits(visits):
    assert steps_of(times(1000, 7, "trailing", visits)) == 7 and steps_of([7, 7, 0]) == 1 and steps_of([5]) == 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_no_number_of_steps_visits_every_level(spacing):
    assert times(vp_linear(1000), None, spacing) == list(range(1000, -1, -1))


@pytest.mark.parametrize("spacing", ["linear", "trailing"])
def test_as_many_steps_as_levels_visits_every_level(spacing):
    assert times(1000, 1000, spacing) == list(range(1000, -1, -1))


def test_times_may_be_given_one_by_one():
    assert times(1000, None, [1000, 500.5, 3]) == times(1000, None, [1000, 500.5, 3, 0]) == [1000, 500.5, 3, 0]
    assert times(1000, None, [7, 1], visits=2) == [7, 7, 1, 1, 0]
    for wrong in ([], [0], [5, 5], [1, 5], [1001, 3], [5, -1]):
        with pytest.raises(ValueError, match="sampler.spacing=.* must be falling times"):
            times(1000, None, wrong)


def test_leading_and_trailing_agree_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for num_steps in (4, 10, 50, 125, 500):  # of one step theirs begins at the cleanest level
        theirs = diffusers.DDIMScheduler(timestep_spacing="leading")
        theirs.set_timesteps(num_steps)
        assert times(1000, num_steps, "linear")[:-1] == (theirs.timesteps + 1).tolist()
    for num_steps in (1, 3, 7, 10, 16, 64, 999):
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
        theirs.set_timesteps(num_steps)
        assert times(1000, num_steps, "trailing")[:-1] == (theirs.timesteps + 1).tolist()


@pytest.mark.parametrize("spacing", OF_LEVELS)
def test_visits_repeat_every_level_but_the_last(spacing):
    once = times(100, 7, spacing)
    assert times(100, 7, spacing, visits=1) == once
    grid = times(100, 7, spacing, visits=3)
    assert len(grid) == 7 * 3 + 1 and grid[::3] == once and grid[-1] == 0 and grid.count(0) == 1
    assert grid == sorted(grid, reverse=True) and all(grid.count(level) == 3 for level in once[:-1])


@pytest.mark.parametrize("visits", [0, -1, 1.5, True, "2"])
def test_an_impossible_number_of_visits_is_refused(visits):
    with pytest.raises(ValueError, match="sampler.visits=.*at least 1"):
        times(1000, 10, visits=visits)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.5, True, "10"])
def test_an_impossible_number_of_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match="sampler.num_steps=.*from 1 to schedule.num_timesteps=1000"):
        times(1000, num_steps)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="sampler.spacing=even must be one of linear, quadratic, trailing"):
        times(1000, 10, "even")


def test_the_configuration_checker_need_not_load_torch():
    code = "import sys, diffusion.process.grids; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
