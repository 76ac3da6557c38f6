"""Gaussian data in the laboratory: laws, errors and their sum against closed forms that are reckoned here."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusion.lab.errors import distance_of_gaussian, of_gaussian, renewed, steps_of_gaussian
from diffusion.lab.gaussian import Law, denoising_error, end_of, fitted, law_at, prior_at, propagated, step_of, w2
from diffusion.lab.initialisation import of_mixture, of_points, spectrum
from diffusion.process.grids import even, times
from diffusion.process.schedule import sub_vp, ve_geometric, vp_continuous, vp_linear
from diffusion.process.toy import Gaussian, Mixture, modes
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.predictor_corrector import LangevinCorrector, PredictorCorrector

SCHEDULES = {"vp": vp_linear(), "ve": ve_geometric(), "sub-vp": sub_vp()}
SAMPLERS = {
    "ddim": DDIM,
    "half": partial(DDIM, eta=0.5),
    "small": Ancestral,
    "large": partial(Ancestral, variance="large"),
    "annealed": partial(AnnealedLangevin, step_size=0.2),
    "corrected": partial(
        PredictorCorrector, predictor=Ancestral, corrector=partial(LangevinCorrector, norms="expected")
    ),
}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
with_all = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
MEAN, VARIANCES = (0.3, -0.2), (0.25, 0.01)
TOY = Gaussian(MEAN, covariance=torch.diag(torch.tensor(VARIANCES, dtype=torch.float64)))
TRAINED = Gaussian((0.28, -0.19), covariance=torch.tensor([[0.24, 0.002], [0.002, 0.012]], dtype=torch.float64))


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def random_law(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return Law(torch.randn(dim, dtype=torch.float64, generator=generator), a @ a.mT / dim)


# ---- distances ----


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_w2_is_the_formula(dim):
    one, other = random_law(dim, 0), random_law(dim, 1)
    root = sqrtm(one.covariance.numpy())
    cross = sqrtm(root @ other.covariance.numpy() @ root).real
    square = float((one.mean - other.mean).square().sum()) + np.trace(
        one.covariance.numpy() + other.covariance.numpy() - 2 * cross
    )
    assert w2(one, other) == pytest.approx(math.sqrt(square), rel=1e-9)
    assert w2(one, other) == pytest.approx(w2(other, one), rel=1e-12)


def test_w2_of_laws_that_are_nearly_the_same_keeps_its_digits():
    one = Law(float64([0.0, 0.0]), torch.diag(float64([1.0, 0.04])))
    for far in (1e-3, 1e-6, 1e-9):
        other = Law(float64([0.0, 0.0]), torch.diag(float64([(1 + far) ** 2, 0.04])))
        assert w2(one, other) == pytest.approx(far, rel=1e-4)
    assert w2(one, one) < 1e-15


def test_w2_to_a_point_and_between_points():
    point, other = Law(float64([1.0, 2.0]), torch.zeros(2, 2).double()), Law(float64([1.0, 0.0]), torch.eye(2).double())
    assert w2(point, other) == pytest.approx(math.sqrt(4 + 2))
    assert w2(point, Law(float64([4.0, 6.0]), torch.zeros(2, 2).double())) == pytest.approx(5)


# ---- laws of walks ----


@on_all
def test_a_ddim_walk_stretches_each_axis_by_a_product_of_its_steps(schedule):
    """(alpha_s alpha_t v + sigma_s sigma_t) / (alpha_t^2 v + sigma_t^2) a step; the mean follows alpha."""
    grid = times(1000, 20)
    begun = law_at(TOY, schedule(grid[0]))
    end = end_of(DDIM(schedule), TOY.denoiser(schedule), begun, grid)
    for axis, variance in enumerate(VARIANCES):
        stretch = 1.0
        for t, s in zip(grid, grid[1:], strict=False):
            (a, b), (c, d) = (map(float, schedule(t)), map(float, schedule(s)))
            stretch *= (c * a * variance + d * b) / (a**2 * variance + b**2)
        expected = stretch * float(begun.covariance[axis, axis]) ** 0.5
        assert float(end.covariance[axis, axis]) ** 0.5 == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(end.mean, float64(MEAN), rtol=0, atol=1e-10)


@with_all
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_law_is_that_of_many_walks(name, make):
    schedule = SCHEDULES[name]
    sampler, denoise = make(schedule), TOY.denoiser(schedule)
    grid = times(1000, 10, "trailing", visits=2)[:-1]
    law = law_at(TOY, schedule(grid[0]))
    generator = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)  # noqa: E731
    root = torch.linalg.cholesky(law.covariance)
    x = law.mean + noise(torch.empty(8000, 2, dtype=torch.float64)) @ root.mT
    x = sampler.sample(denoise, x, grid, noise)
    end = end_of(sampler, denoise, law, grid)
    scale = float(end.covariance.diagonal().max()) ** 0.5
    torch.testing.assert_close(x.mean(0), end.mean, rtol=0, atol=0.06 * scale)
    torch.testing.assert_close(x.T.cov(), end.covariance, rtol=0.1, atol=0.02 * scale**2)


def test_a_walk_has_a_law_at_each_time():
    schedule, grid = SCHEDULES["vp"], times(1000, 7)
    walk = DDIM(schedule), TOY.denoiser(schedule), law_at(TOY, schedule(grid[0])), grid
    laws = list(propagated(*walk))
    assert len(laws) == 7 and torch.equal(laws[-1].mean, end_of(*walk).mean)


def test_what_is_not_affine_is_refused():
    schedule = SCHEDULES["vp"]
    with pytest.raises(ValueError, match="DDIM: its step is not affine"):
        step_of(DDIM(schedule), modes().denoiser(schedule), 60, 50, 2)
    by_image = PredictorCorrector(schedule, Ancestral, LangevinCorrector)
    with pytest.raises(ValueError, match="PredictorCorrector: its step is not affine"):
        step_of(by_image, TOY.denoiser(schedule), 60, 60, 2)


# ---- the errors, each within 1 % of its closed form ----


@pytest.mark.parametrize("mean, variance, published", [(0.3, 0.25, 1.906e-3), (0.0, 0.25, 1.51e-5), (0.0, 1.0, 0.0)])
def test_the_error_of_initialisation_on_vp(mean, variance, published):
    low, high = of_mixture(Gaussian([mean], std=variance**0.5), SCHEDULES["vp"], 1000)
    assert low == pytest.approx(published, rel=3e-3, abs=1e-12) and high == pytest.approx(low, abs=1e-12)


@on_all
def test_the_error_of_initialisation_is_that_of_mean_and_deviations(schedule):
    """The prior is N(0, (alpha^2 + sigma^2) I): N(0, I) under VP, N(0, (sigma_T^2 + 1) I) under VE."""
    for t in (1000, 700):
        alpha, sigma = map(float, schedule(t))
        std = math.hypot(alpha, sigma)
        square = sum(
            (alpha * m) ** 2 + (math.sqrt(alpha**2 * v + sigma**2) - std) ** 2
            for m, v in zip(MEAN, VARIANCES, strict=True)
        )
        assert of_mixture(TOY, schedule, t).low == pytest.approx(math.sqrt(square), rel=1e-6)
        assert float(prior_at(schedule, t, 2).covariance[0, 0]) == pytest.approx(std**2)


@on_all
def test_the_error_of_a_denoiser_is_its_closed_form(schedule):
    """Irreducible: sum of v sigma^2 / (alpha^2 v + sigma^2). Excess: of D - D*, affine, over the law of x_t."""
    for t in (1, 300, 1000):
        alpha, sigma = map(float, schedule(t))
        exact = denoising_error(TOY.denoiser(schedule), TOY, schedule, t)
        irreducible = sum(v * sigma**2 / (alpha**2 * v + sigma**2) for v in VARIANCES)
        assert exact.irreducible == pytest.approx(irreducible, rel=1e-9) and exact.excess < 1e-25
        found = denoising_error(TRAINED.denoiser(schedule), TOY, schedule, t)
        law, generator = law_at(TOY, schedule(t)), torch.Generator().manual_seed(t)
        z = torch.randn(200_000, 2, dtype=torch.float64, generator=generator)
        x = law.mean + z @ torch.linalg.cholesky(law.covariance).mT
        gap = TRAINED.denoiser(schedule)(x, t).x0 - TOY.denoiser(schedule)(x, t).x0
        assert found.excess == pytest.approx(float(gap.square().sum(1).mean()), rel=0.01)
        assert found.irreducible == pytest.approx(irreducible, rel=1e-9)


def reckoned(schedule, grid, guessed, guessed_mean, start_variance, start_mean, share):
    """Mean and variance of one axis after a walk with the reverse kernel at a share of the posterior's deviation, by
    the denoiser of N(guessed_mean, guessed): worked out from the levels alone."""
    m, v = start_mean, start_variance
    for t, s in zip(grid, grid[1:], strict=False):
        (a, b), (c, d) = (map(float, schedule(t)), map(float, schedule(s)))
        gain = a * guessed / (a**2 * guessed + b**2)  # x0 = guessed_mean + gain (x - a guessed_mean)
        r = (a * d) / (c * b)
        fresh = share * d * math.sqrt(1 - r**2)
        kept = math.sqrt(max(d**2 - fresh**2, 0.0))
        slope = c * gain + kept * (1 - a * gain) / b
        shift = (c - kept * a / b) * guessed_mean * (1 - a * gain)
        m, v = slope * m + shift, slope**2 * v + fresh**2
    return m, v


@on_all
@pytest.mark.parametrize("share, make", [(0.0, DDIM), (1.0, Ancestral), (0.5, partial(DDIM, eta=0.5))])
def test_each_part_and_the_total_are_the_closed_forms(schedule, share, make):
    """Of a denoiser that has the mean and the deviations wrong, along the axes."""
    wrong_mean, wrong = (0.28, -0.19), (0.24, 0.012)
    guess = Gaussian(wrong_mean, covariance=torch.diag(float64(wrong)))
    grid = times(1000, 25)
    parts = of_gaussian(TOY, make(schedule), guess.denoiser(schedule), grid)
    alpha, sigma = map(float, schedule(grid[0]))
    pure = [(0.0, alpha**2 + sigma**2)] * 2
    noised = [(alpha * m, alpha**2 * v + sigma**2) for m, v in zip(MEAN, VARIANCES, strict=True)]

    def ends_of(guessed_means, guessed, starts):
        found = []
        for m_hat, v_hat, (m, v) in zip(guessed_means, guessed, starts, strict=True):
            m, v = reckoned(schedule, grid, v_hat, m_hat, v, m, share)
            found.append((m, math.sqrt(v)))
        return found

    ends = {
        "got": ends_of(wrong_mean, wrong, pure),
        "begun": ends_of(wrong_mean, wrong, noised),
        "exact": ends_of(MEAN, VARIANCES, noised),
    }
    ends["data"] = [(m, math.sqrt(v)) for m, v in zip(MEAN, VARIANCES, strict=True)]
    apart = lambda one, other: math.sqrt(  # noqa: E731
        sum((m - n) ** 2 + (s - u) ** 2 for (m, s), (n, u) in zip(ends[one], ends[other], strict=True))
    )
    assert parts.initialisation == pytest.approx(apart("got", "begun"), rel=1e-6)
    assert parts.training == pytest.approx(apart("begun", "exact"), rel=1e-6)
    assert parts.discretisation == pytest.approx(apart("exact", "data"), rel=1e-6)
    assert parts.total == pytest.approx(apart("got", "data"), rel=1e-6)


@on_all
@with_all
def test_the_sum_is_at_least_the_total(schedule, make):
    visits = 2 if make is SAMPLERS["corrected"] else 1
    parts = of_gaussian(TOY, make(schedule), TRAINED.denoiser(schedule), times(1000, 30, "trailing", visits))
    assert min(parts.initialisation, parts.training, parts.discretisation) > 0
    assert parts.total <= parts.sum * (1 + 1e-12)


def test_what_is_learned_from_points_has_their_moments():
    toy = fitted(TOY, 1000, torch.Generator().manual_seed(0))
    x = TOY.sample(1000, torch.Generator().manual_seed(0))
    mean, covariance = toy.moments(SCHEDULES["vp"](0))
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(covariance, x.T.cov(correction=0))
    assert w2(Law(mean, covariance), law_at(TOY, SCHEDULES["vp"](0))) < 0.05
    with pytest.raises(ValueError, match="3 points are too few"):
        fitted(TOY, 3, torch.Generator())


# ---- steps ----


@on_all
def test_a_step_is_named_by_the_noise_that_it_takes_away(schedule):
    for t, s in ((1000, 900), (2, 1), (1, 0), (10, 10)):
        (a, b), (c, d) = (map(float, schedule(t)), map(float, schedule(s)))
        assert renewed(schedule, t, s) == pytest.approx(1 - (d / c) ** 2 / (b / a) ** 2, abs=1e-9)


def test_local_errors_add_up_to_the_whole_at_first_order():
    schedule = vp_continuous()
    found = {}
    for num_steps in (100, 200):
        steps = steps_of_gaussian(TOY, DDIM(schedule), even(1000, 1, num_steps))
        found[num_steps] = [step.error for step in steps]
        assert [step.t for step in steps] == even(1000, 1, num_steps)[:-1]
    assert sum(found[200]) == pytest.approx(sum(found[100]) / 2, rel=0.1), "each step's is of second order"


RECKONED = {  # W2 to the exact law after N = 20, 80, 320, 1280 steps in continuous time, N(.3, .25)
    "small": (Ancestral, [1.08e-1, 3.8e-2, 1.1e-2, 3.0e-3]),
    "large": (partial(Ancestral, variance="large"), [4.4e-2, 1.07e-2, 2.66e-3, 6.6e-4]),
    "ddim": (DDIM, [6.6e-2, 1.7e-2, 4.4e-3, 1.1e-3]),
}


@pytest.mark.parametrize("name", RECKONED)
def test_distances_against_steps_are_the_reckoned_ones(name):
    make, known = RECKONED[name]
    schedule, toy = vp_continuous(), Gaussian([0.3], std=0.5)
    found = [distance_of_gaussian(toy, make(schedule), even(1000, 1, n)) for n in (20, 80, 320, 1280)]
    assert found == pytest.approx(known, rel=0.05)
    assert math.log(found[2] / found[3], 4) == pytest.approx(1, abs=0.1)


# ---- bounds ----


@on_all
@pytest.mark.parametrize("number", [8, 500])
def test_points_lie_between_their_bounds_by_moments_and_one_by_one(schedule, number):
    """The spectrum is that of the covariance whether there are fewer points than numbers in one or more."""
    x = torch.randn(number, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.2
    found = spectrum(x.reshape(number, 5, 2, 2))
    assert found.dim == 20 and len(found.variances) == min(number - 1, 20)
    assert found.total == pytest.approx(float(x.var(0).sum()), rel=1e-9)
    for t in (1000, 500):
        low, high = of_points(found, schedule, t)
        (alpha, sigma), std = map(float, schedule(t)), float(schedule.std(t))
        law = Law(alpha * x.mean(0), alpha**2 * x.T.cov() + sigma**2 * torch.eye(20, dtype=torch.float64))
        assert low == pytest.approx(w2(law, prior_at(schedule, t, 20)), rel=1e-6)
        one_by_one = alpha**2 * float(x.mean(0).square().sum() + x.var(0).sum()) + 20 * (std - sigma) ** 2
        assert low < high == pytest.approx(math.sqrt(one_by_one), rel=1e-9)


def test_a_mixture_of_one_dimension_lies_between_its_bounds():
    """W2 in one dimension is that of quantiles."""
    schedule, toy = SCHEDULES["vp"], Mixture([1, 3], [[-0.8], [0.6]], stds=[0.1, 0.2])
    for t in (200, 500):
        law = toy.components(schedule(t))
        grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
        normal = torch.distributions.Normal
        cdf = sum(w * normal(m[0], c[0, 0].sqrt()).cdf(grid) for w, m, c in zip(*law, strict=True))
        level = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        exact = float((grid[torch.searchsorted(cdf, level)] - normal(0.0, 1.0).icdf(level)).square().mean()) ** 0.5
        low, high = of_mixture(toy, schedule, t)
        assert low <= exact * (1 + 1e-3) and exact <= high
        assert t < 500 or low == pytest.approx(exact, rel=0.02), "in much noise all but the lower"
