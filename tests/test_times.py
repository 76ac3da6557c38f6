"""Time grids: as many transitions as asked for, descending, down to clean data."""

import subprocess
import sys
from itertools import pairwise

import pytest

from diffusion.process.times import SPACINGS, times


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 4, 5, 6, 7, 10, 97, 250, 1000])
def test_any_number_of_steps_gives_that_many_strictly_descending(spacing, num_timesteps):
    for num_steps in range(1, num_timesteps + 1):
        grid = times(num_timesteps, num_steps, spacing)
        assert len(grid) == num_steps + 1 and grid[-1] == 0 and grid[0] <= num_timesteps
        assert all(t > s for t, s in pairwise(grid)), (num_steps, grid)
        assert all(isinstance(t, int) for t in grid)


def test_the_published_grids():
    assert times(1000, 10, "linear") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1, 0]
    assert times(1000, 10, "quadratic") == [801, 633, 484, 356, 247, 159, 89, 40, 10, 1, 0]
    assert times(1000, 10, "trailing") == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


def test_repeats_of_the_quadratic_grid_move_up_by_one():
    raw = [1 + int(800 * (k / 99) ** 2 + 1e-9) for k in range(100)]
    assert len(set(raw)) < 100, "the formula repeats levels at S = 100, which is what the rule is for"
    grid = times(1000, 100, "quadratic")[-2::-1]
    assert grid[:5] == [1, 2, 3, 4, 5] and grid[-1] == 801
    assert all(got >= wanted for got, wanted in zip(grid, raw, strict=True))
    assert grid[50:] == raw[50:]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_levels_visits_every_level(spacing):
    assert times(1000, 1000, spacing) == list(range(1000, -1, -1))


def test_leading_and_trailing_agree_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for num_steps in (1, 4, 10, 50, 125, 500):
        theirs = diffusers.DDIMScheduler(timestep_spacing="leading")
        theirs.set_timesteps(num_steps)
        assert times(1000, num_steps, "linear")[:-1] == (theirs.timesteps + 1).tolist()
    for num_steps in (1, 3, 7, 10, 16, 64, 999):
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
        theirs.set_timesteps(num_steps)
        assert times(1000, num_steps, "trailing")[:-1] == (theirs.timesteps + 1).tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
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
    with pytest.raises(ValueError, match="sampler.spacing=even is none of linear, quadratic, trailing"):
        times(1000, 10, "even")


def test_the_configuration_checker_need_not_load_torch():
    code = "import sys, diffusion.process.times; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
