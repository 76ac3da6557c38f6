"""Walks of different lengths on the same noise, and the order at which they come together."""

from functools import partial

import numpy as np
import pytest
import torch

from diffusion.lab.errors import of_mixture, starts, steps_of_gaussian, steps_of_mixture
from diffusion.lab.gaussian import end_of, prior_at
from diffusion.lab.refinement import SharedNoise, fitted_order, local_errors, order_of_gaps, refine, rms
from diffusion.process.grids import even, geometric, refined, times
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import Prediction, sub_vp, ve_geometric, vp_linear
from diffusion.process.toy import Gaussian, modes
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.base import Sampler
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.multistep import AdamsBashforth, Heun

SCHEDULES = {"vp": vp_linear(), "ve": ve_geometric(), "sub-vp": sub_vp()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def of_one_image(schedule, x0):
    """The exact denoiser of data that are one point."""

    def denoise(x_t, t, labels=None):
        return Prediction(*PREDICTIONS["x0"].to_pair(schedule, x_t, t, x0.expand_as(x_t)))

    return denoise


# ---- grids ----


def test_grids_have_their_ends_and_are_even_in_what_they_say():
    schedule = SCHEDULES["vp"]
    assert even(1000, 1, 3) == [1000, 667, 334, 1]
    grid = geometric(schedule, 1000, 1, 50)
    apart = np.diff([float(schedule.log_ratio(t)) for t in grid])
    assert (grid[0], grid[-1], len(grid)) == (1000, 1, 51)
    np.testing.assert_allclose(apart, apart.mean(), rtol=1e-6)
    fine = refined([10, 4, 0], 3)
    assert fine == [10, 8, 6, 4, pytest.approx(8 / 3), pytest.approx(4 / 3), 0] and set(fine) >= {10, 4, 0}


# ---- noise ----


@on_all
def test_noise_of_a_long_step_is_standard_and_that_of_two_steps_independent(schedule):
    fine = refined([900, 500, 20], 7)
    noise = SharedNoise(schedule, fine, 0, torch.arange(20_000))
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    z = torch.cat([noise.between(900, 500)(x), noise.between(500, 20)(x)], dim=1)
    torch.testing.assert_close(z.T.cov(), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.03)


@on_all
def test_of_one_image_long_steps_end_where_short_ones_do(schedule):
    """The reverse kernels given x_0 compose: nothing is left between the walks but rounding."""
    x0 = torch.tensor([0.3, -0.8], dtype=torch.float64)
    coarse = [1000, 400.5, 60, 3]
    x = float(schedule.std(1000)) * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grids = [coarse, refined(coarse, 2), refined(coarse, 8)]
    found = refine(Ancestral(schedule), of_one_image(schedule, x0), x, grids, 3, torch.arange(5))
    assert max(found.gaps()) < 1e-10 and found.num_steps == [3, 6, 24]
    other = refine(Ancestral(schedule), of_one_image(schedule, x0), x, grids, 4, torch.arange(5))
    assert rms(other.ends[0] - found.ends[0]) > 1e-4, "of another seed another image"


@on_all
def test_the_draws_of_one_step_are_independent_and_a_walk_may_be_taken_again(schedule):
    fine = refined([900, 500], 5)
    noise, x = SharedNoise(schedule, fine, 0, torch.arange(20_000)), torch.zeros(20_000, 1, dtype=torch.float64)
    step = noise.between(900, 500)
    z = torch.cat([step(x), step(x), step(x)], dim=1)
    torch.testing.assert_close(z.T.cov(), torch.eye(3, dtype=torch.float64), rtol=0, atol=0.03)
    again = noise.between(900, 500)
    assert torch.equal(z[:, :1], again(x)) and torch.equal(z[:, 1:2], again(x)), "whatever the walk has drawn before"
    with pytest.raises(TypeError, match="belongs to the two times of a step"):
        noise(x)


class TwoDraws(Sampler):
    """Ancestral sampling by way of the middle: two draws a step."""

    def step(self, denoise, x_t, t, s, randn, past=()):
        by, middle = Ancestral(self.schedule), (t + s) / 2
        return by.step(denoise, by.step(denoise, x_t, t, middle, randn), middle, s, randn)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_sampler_of_two_draws_a_step_is_measured(name):
    """Walks come together, and the law is that of walks."""
    schedule, toy = SCHEDULES[name], Gaussian([0.3, -0.2], std=0.5)
    coarse = even(1000, 40, 6)
    x = starts(schedule, 1000, toy.sample(20, torch.Generator().manual_seed(0)), 0).data
    grids = [refined(coarse, parts) for parts in (1, 2, 8)]
    gaps = refine(TwoDraws(schedule), toy.denoiser(schedule), x, grids, 0, torch.arange(20)).gaps()
    assert gaps[0] > 1.5 * gaps[1] > 0
    halves = refined(coarse, 2)  # ancestral sampling in half the steps
    law, twin = (
        end_of(by(schedule), toy.denoiser(schedule), prior_at(schedule, 1000, 2), grid)
        for by, grid in ((TwoDraws, coarse), (Ancestral, halves))
    )
    torch.testing.assert_close(law.covariance, twin.covariance, rtol=1e-9, atol=0)


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    schedule, fine = SCHEDULES["vp"], refined([900, 500], 4)
    together = SharedNoise(schedule, fine, 0, torch.arange(4)).between(900, 500)(torch.zeros(4, 3))
    alone = SharedNoise(schedule, fine, 0, torch.tensor([2])).between(900, 500)(torch.zeros(1, 3))
    assert torch.equal(together[2:3], alone)


def test_a_time_that_is_not_on_the_finer_grid_is_found_out():
    with pytest.raises(AssertionError, match="not on the finer grid"):
        SharedNoise(SCHEDULES["vp"], [10, 5, 0], 0, torch.arange(2)).between(10, 4)


# ---- orders ----


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_orders_are_read_off(order):
    steps = [20, 80, 320, 1280]
    found = fitted_order(steps, [3 * n**-order for n in steps])
    assert found.order == pytest.approx(order) and found.at(40) == pytest.approx(3 * 40**-order)
    late = fitted_order(steps, [1.0, 80**-order, 320**-order, 1280**-order], onset=80)
    assert late.order == pytest.approx(order)
    steps = [50, 100, 200, 400]
    gaps = [3 * (n**-order - 400**-order) for n in steps[:-1]]
    found = order_of_gaps(steps, gaps)
    assert found.order == pytest.approx(order, abs=0.011) and found.at(50) == pytest.approx(3 * 50**-order, rel=0.02)


def test_where_there_is_no_order_none_is_made_up():
    assert fitted_order([20, 80], [0.1, 0.0]) is None and fitted_order([20], [0.1]) is None
    assert order_of_gaps([50, 100, 200], [1e-15, 0.0]) is None and order_of_gaps([50, 100, 200], [0.1, 0.2]) is None
    assert order_of_gaps([50, 100], [0.1]) is None


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("make", [DDIM, partial(Ancestral, variance="large")], ids=["ddim", "large"])
def test_walks_on_shared_noise_come_together(name, make):
    """To the same points, at first order, though one of the samplers draws noise at every step."""
    schedule, toy = SCHEDULES[name], Gaussian([0.3, -0.2], std=0.5)
    coarse = even(1000, 40, 20)
    x = starts(schedule, 1000, toy.sample(200, torch.Generator().manual_seed(0)), 0).data
    grids = [refined(coarse, parts) for parts in (1, 2, 4, 16)]
    found = refine(make(schedule), toy.denoiser(schedule), x, grids, 0, torch.arange(200))
    assert order_of_gaps(found.num_steps, found.gaps()).order == pytest.approx(1, abs=0.25)


def test_a_local_error_is_of_second_order():
    schedule, toy = SCHEDULES["vp"], Gaussian([0.3, -0.2], std=0.5)
    x = starts(schedule, 500, toy.sample(100, torch.Generator().manual_seed(0)), 0).data
    errors = [
        local_errors(DDIM(schedule), toy.denoiser(schedule), [x], [500, 500 - gap], 16, 0)[0] for gap in (10, 20, 40)
    ]
    assert errors[1] / errors[0] == pytest.approx(4, rel=0.1) and errors[2] / errors[1] == pytest.approx(4, rel=0.15)


LOCAL = pytest.mark.parametrize("make, order", [(DDIM, 2), (AdamsBashforth, 3), (Heun, 3)])


@LOCAL
@pytest.mark.parametrize("known", [True, False], ids=["laws", "points"])
def test_the_local_error_of_a_step_is_that_of_the_method_with_its_past(known, make, order):
    """One order above the method's: of Adams and Bashforth's from the second step on, as the first has no past."""
    schedule, toy = SCHEDULES["vp"], Gaussian([0.3, -0.2], std=0.5)
    x0 = toy.sample(100, torch.Generator().manual_seed(0))

    def errors(gap):
        grid = [500 + gap, 500, 500 - gap]
        steps = (
            steps_of_gaussian(toy, make(schedule), grid)
            if known
            else steps_of_mixture(toy, make(schedule), grid, x0, 0, parts=16)
        )
        return [step.error for step in steps]

    (first, later), (halved_first, halved_later) = errors(20), errors(10)
    started = 2 if make is AdamsBashforth else order
    assert first / halved_first == pytest.approx(2**started, rel=0.15)
    assert later / halved_later == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("make", [DDIM, partial(Ancestral, variance="large")])
def test_the_local_errors_of_a_sampler_without_a_memory_are_its_walks(make):
    schedule, toy, times = SCHEDULES["vp"], Gaussian([0.3, -0.2], std=0.5), [900, 500, 300]
    points = [starts(schedule, t, toy.sample(50, torch.Generator().manual_seed(0)), 0).data for t in times[:-1]]
    found = local_errors(make(schedule), toy.denoiser(schedule), points, times, 8, 0)
    for x, t, s, error in zip(points, times, times[1:], found, strict=False):
        grids = [[t, s], refined([t, s], 8)]
        walks = refine(make(schedule), toy.denoiser(schedule), x, grids, 0, torch.arange(50))
        assert walks.gaps() == [error]


# ---- the parts of a mixture ----


@pytest.mark.parametrize("name, make", [("vp", DDIM), ("ve", Ancestral)])
def test_of_a_mixture_each_cause_shows_in_its_own_part(name, make):
    schedule, toy = SCHEDULES[name], modes([1, 2, 1], radius=0.7, std=0.1)
    x0, sampler, exact = toy.sample(100, torch.Generator().manual_seed(0)), make(schedule), toy.denoiser(schedule)

    def off(x_t, t, labels=None):
        (alpha, sigma), (x, epsilon, _) = schedule(t), exact(x_t, t)
        return Prediction(x + 0.02, epsilon - 0.02 * alpha / sigma)

    found = of_mixture(toy, sampler, exact, times(1000, 20, "trailing"), x0, 0, parts=8)
    assert found.training < 1e-12 and found.discretisation > 0 and found.total <= found.sum
    finer = of_mixture(toy, sampler, exact, times(1000, 80, "trailing"), x0, 0, parts=4)
    assert finer.discretisation < found.discretisation
    shifted = of_mixture(toy, sampler, off, times(1000, 20, "trailing"), x0, 0, parts=8)
    assert shifted.training > 0.02 and shifted.discretisation == found.discretisation
    assert shifted.total <= shifted.sum
    late = of_mixture(toy, sampler, exact, times(1000, 10, "linear"), x0, 0, parts=8)
    early = of_mixture(toy, sampler, exact, times(1000, 10, "trailing"), x0, 0, parts=8)
    assert late.initialisation > early.initialisation, "there is more signal at t = 901 than at T"


def test_steps_of_a_mixture_are_named_and_measured():
    schedule, toy = SCHEDULES["vp"], modes([1, 1], radius=0.7, std=0.1)
    x0 = toy.sample(50, torch.Generator().manual_seed(0))
    found = steps_of_mixture(toy, DDIM(schedule), [1000, 500, 100, 20], x0, 0, parts=8)
    assert [(k.t, k.s) for k in found] == [(1000, 500), (500, 100), (100, 20)]
    assert all(0 < k.renewed < 1 and k.error > 0 for k in found)
