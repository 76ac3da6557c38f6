"""How far denoisers are from the best: the split that is known on toys, and the bounds that hold on images."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from diffusion.lab.gaussian import denoising_error
from diffusion.lab.images import calls_of_all, candidates, discretisation, initialisation, interpolated, training
from diffusion.lab.initialisation import spectrum
from diffusion.lab.training_error import (
    Known,
    carried_to_the_end,
    linear_loss,
    loss_by_quarter,
    moved_by_errors,
    of_images,
    of_known,
    posterior_mean,
    quarters,
    some_times,
)
from diffusion.lab.verdict import cheapest_sampler
from diffusion.process.grids import times
from diffusion.process.schedule import Prediction, ve_geometric, vp_linear
from diffusion.process.toy import Gaussian, Mixture, modes
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.base import Moment
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.multistep import AdamsBashforth, Heun

VP, VE = vp_linear(), ve_geometric()
SCHEDULES = {"vp": VP, "ve": VE}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
DIM = 12
TOY = Gaussian([0.1] * DIM, covariance=torch.diag(torch.linspace(0.4, 0.05, DIM, dtype=torch.float64) ** 2))


def images(num, seed=0):
    return TOY.sample(num, torch.Generator().manual_seed(seed)).reshape(num, 3, 2, 2)


def as_images(denoise):
    """A denoiser of vectors as one of images of 3 x 2 x 2."""

    def called(x_t, t, labels=None):
        x0, epsilon, _ = denoise(x_t.flatten(1), t)
        return Prediction(x0.reshape(x_t.shape), epsilon.reshape(x_t.shape))

    return called


def scaled(denoise, schedule, factor, shift=0.0):
    """A denoiser whose x0 is too small, or shifted."""

    def called(x_t, t, labels=None):
        x0 = factor * denoise(x_t, t).x0 + shift
        alpha, sigma = schedule(t)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    return called


# ---- times ----


def test_some_times_stand_for_all():
    assert some_times(1000, 4) == [126, 376, 626, 876] and some_times(8, 100) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert quarters(8, [1, 2, 3, 8], [1.0, 3.0, 5.0, 7.0])[:2] == [2.0, 5.0]
    assert math.isnan(quarters(8, [1], [1.0])[3]) and quarters(8, [8.0], [7.0])[3] == 7.0


# ---- where the score is known ----


@on_all
def test_the_split_by_points_is_the_closed_form(schedule):
    guess, points = scaled(TOY.denoiser(schedule), schedule, 0.9), TOY.sample(20_000, torch.Generator().manual_seed(0))
    for t in (50, 600):
        found, exact = of_known(guess, TOY, schedule, t, points, 0), denoising_error(guess, TOY, schedule, t)
        assert found.irreducible == pytest.approx(exact.irreducible, rel=0.03)
        assert found.excess == pytest.approx(exact.excess, rel=0.03)
    assert of_known(TOY.denoiser(schedule), TOY, schedule, 50, points[:10], 0).excess == 0


def test_the_loss_of_v_by_quarter_is_irreducible_for_the_exact_denoiser():
    toy = modes([1, 2], radius=0.5, std=0.2)
    points = toy.sample(4000, torch.Generator().manual_seed(0))

    def exact(x_t, t, labels=None):
        x0, epsilon, _ = toy.denoiser(VP)(x_t[..., 0, 0], t)
        return Prediction(x0[..., None, None], epsilon[..., None, None])

    found = loss_by_quarter(exact, toy, VP, "v", points, 0)
    assert all(excess < 1e-12 < irreducible for irreducible, excess in found)
    off = loss_by_quarter(lambda x, t: exact(x, t)._replace(x0=exact(x, t).x0 + 0.1), toy, VP, "x0", points, 0)
    assert [excess for _, excess in off] == pytest.approx([0.01] * 4, rel=1e-4)


# ---- bounds on images ----


@on_all
@pytest.mark.parametrize("t", [5, 100, 700])
def test_the_exact_denoiser_has_an_excess_of_nothing_at_least(schedule, t):
    x0 = images(600)
    known = Known(x0, None, spectrum(x0))
    found = of_images(as_images(TOY.denoiser(schedule)), schedule, t, x0[:300], None, known, 0)
    irreducible = denoising_error(TOY.denoiser(schedule), TOY, schedule, t).irreducible
    assert found.floor <= irreducible * 1.05 and found.loss == pytest.approx(irreducible, abs=4 * found.standard_error)
    low, high = found.excess
    assert low <= 0.02 * irreducible and low <= high <= found.loss
    assert found.linear == pytest.approx(irreducible, rel=0.1), "of Gaussian data the best denoiser is linear"
    few = of_images(
        as_images(TOY.denoiser(schedule)), schedule, t, x0[:20], None, Known(x0[:20], None, known.spectrum), 0
    )
    assert math.isnan(few.linear), "20 images have no covariance to speak of"


@on_all
@pytest.mark.parametrize("factor, shift", [(0.8, 0.0), (1.0, 0.1)])
def test_bounds_hold_the_true_excess_of_a_denoiser_that_is_off(schedule, factor, shift):
    x0 = images(2000)
    known = Known(x0, None, spectrum(x0))
    guess = as_images(scaled(TOY.denoiser(schedule), schedule, factor, shift))
    for t in (100, 500):
        true = denoising_error(scaled(TOY.denoiser(schedule), schedule, factor, shift), TOY, schedule, t).excess
        low, high = of_images(guess, schedule, t, x0, None, known, 0).excess
        assert low <= 1.1 * true and high >= 0.9 * true
        assert low > 0.4 * true, "a scale and a shift are what an affine change finds"


def test_the_posterior_mean_among_points_is_that_of_point_masses():
    points = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    toy = Mixture([1.0] * 20, points, stds=[0.0] * 20, classes=[k % 2 for k in range(20)])
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(posterior_mean(x, points, VP(300)), toy.denoiser(VP)(x, 300).x0)
    labels, classes = torch.arange(7) % 2, torch.arange(20) % 2
    torch.testing.assert_close(posterior_mean(x, points, VP(300), labels, classes), toy.denoiser(VP)(x, 300, labels).x0)


@on_all
def test_the_linear_loss_is_the_irreducible_one_of_a_gaussian(schedule):
    found = spectrum(TOY.sample(200_000, torch.Generator().manual_seed(0)))
    for t in (5, 500):
        exact = denoising_error(TOY.denoiser(schedule), TOY, schedule, t).irreducible
        assert linear_loss(found, schedule(t)) == pytest.approx(exact, rel=0.02)


# ---- what errors do to the end ----


@on_all
@pytest.mark.parametrize("make", [DDIM, Ancestral, Heun], ids=["ddim", "small", "heun"])
def test_errors_that_pull_one_way_are_carried_exactly_on_gaussian_data(schedule, make):
    """A constant shift of x0 moves the end of every walk by the same: that of two walks on the same noise."""
    toy, grid, sampler = Gaussian([0.0], std=0.4), times(1000, 20), make(schedule)
    exact = toy.denoiser(schedule)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None] * float(schedule.std(grid[0]))
    still = lambda x: 0 * x  # noqa: E731
    moved = sampler.sample(scaled(exact, schedule, 1.0, 0.03), x, grid, still) - sampler.sample(exact, x, grid, still)
    expected = carried_to_the_end(sampler, schedule, grid, [0.03] * 20, 0.16)
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-8, atol=0)
    apart = carried_to_the_end(sampler, schedule, grid, [0.03] * 20, 0.16, together=False)
    assert 0.03 * 0.5 < apart < expected


@on_all
@pytest.mark.parametrize("make", [AdamsBashforth, partial(AdamsBashforth, start="heun")], ids=["ddim", "heun"])
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_the_error_of_one_step_is_also_carried_by_those_that_remember_it(schedule, make, k):
    grid, sampler, exact = [900, 600, 400, 200, 50, 0], make(schedule), Gaussian([0.0], std=0.4).denoiser(schedule)

    def end(wrong):
        """Of a walk whose denoiser is off by 0.1 in one step."""
        x, past = torch.ones(1, 1, dtype=torch.float64), ()
        for step, (t, s) in enumerate(pairwise(grid)):
            by = scaled(exact, schedule, 1.0, 0.1) if step == wrong else exact
            x, past = sampler.step(by, x, t, s, None, past), (Moment(t, x, by(x, t)),)
        return float(x)

    moved = moved_by_errors(sampler, schedule, grid, 0.16)
    assert end(k) - end(None) == pytest.approx(0.1 * float(moved[k]), rel=1e-9)


def test_a_learned_variance_counts_as_the_small_one():
    grid, errors = times(1000, 10), [0.1] * 10
    learned, small = (
        carried_to_the_end(Ancestral(VP, variance), VP, grid, errors, 0.16) for variance in ("learned", "small")
    )
    assert learned == pytest.approx(small, rel=1e-9)


def test_values_between_times_are_those_of_lambda():
    middle = VP.time_of((float(VP.log_ratio(10)) + float(VP.log_ratio(100))) / 2)
    found = interpolated(VP, [100, 10], [3.0, 1.0], [10, middle, 100, 1, 1000])
    assert found == pytest.approx([1, 2, 3, 1, 3])


# ---- a model of images, all of it ----


def test_the_errors_of_a_model_that_is_exact_are_those_of_its_walk():
    """Of Gaussian images by their exact denoiser: no certain excess, a walk that comes together, a start that is off by
    the signal left in it."""
    x0 = images(600).float()
    known, grid, sampler = Known(x0, None, spectrum(x0)), times(1000, 20), DDIM(VP)
    denoise = as_images(TOY.denoiser(VP))
    learned = training(sampler, denoise, grid, some_times(1000, 10), x0[:200], None, known, 0, 64)
    assert learned.effect.low < 0.1 * learned.effect.high and len(learned.held) == 10
    assert max(learned.by_quarter) <= learned.effect.high <= sum(learned.by_quarter) * 1.001
    z = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    short = discretisation(sampler, denoise, grid, z, 0)
    assert short.num_steps == [20, 40, 80, 160] and short.gaps[0] > short.gaps[1] > short.gaps[2]
    assert short.order.order == pytest.approx(1, abs=0.2) and short.effect >= short.gaps[0]
    begun = initialisation(sampler, denoise, grid, x0[:32], known.spectrum, 0)
    assert begun.t == 951 and 0 < begun.distance.low <= begun.distance.high and 0 < begun.effect < short.effect
    settings = [
        ("now", sampler, grid),
        ("more", sampler, times(1000, 40)),
        ("other", sampler, times(1000, 20, "trailing")),
    ]
    tried = candidates(settings, denoise, z, 0)
    assert [(c.words, c.num_steps, c.calls) for c in tried] == [("now", 20, 20), ("more", 40, 40), ("other", 20, 20)]
    assert tried[1].distance < 0.7 * tried[0].distance


def test_the_work_of_a_setting_is_its_network_calls():
    """By a sampler of two calls a step: what is announced is what is made, and the cheapest change is that of calls."""
    x0, grid, called = images(8).float(), times(1000, 2), []
    settings = [("now", Heun(VP), grid), ("other sampler", DDIM(VP), times(1000, 3))]

    def denoise(x_t, t, labels=None):
        called.append(t)
        return as_images(TOY.denoiser(VP))(x_t, t)

    initialisation(Heun(VP), denoise, grid, x0, spectrum(x0), 0)
    discretisation(Heun(VP), denoise, grid, x0, 0)
    tried = candidates(settings, denoise, x0, 0)
    assert len(called) == calls_of_all(Heun(VP), grid, settings)
    assert [(c.num_steps, c.calls) for c in tried] == [(2, 3), (3, 3)]
    better = [tried[0]._replace(distance=1.0), tried[1]._replace(distance=0.1)]
    assert "other sampler, at no cost" in cheapest_sampler(better)


def test_a_model_that_is_off_shows_in_training_and_nowhere_else():
    x0, grid, sampler = images(600).float(), times(1000, 20), DDIM(VP)
    known, exact = Known(x0, None, spectrum(x0)), as_images(TOY.denoiser(VP))
    off = scaled(exact, VP, 1.0, 0.1)
    learned = training(sampler, off, grid, some_times(1000, 10), x0[:200], None, known, 0, 64)
    z = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    moved = float((sampler.sample(off, z, grid, None) - sampler.sample(exact, z, grid, None)).square().mean()) ** 0.5
    assert 0 < learned.effect.low < moved < learned.effect.high
