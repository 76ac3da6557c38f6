"""The exact distributions: their scores, denoisers and flows against independent reckonings."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from diffusion.noise import keys, normal
from diffusion.process.schedule import Level, sub_vp, ve_geometric, vp_cosine, vp_linear
from diffusion.process.toy import SETS, Gaussian, Mixture, checkerboard, modes, moons, rings

SCHEDULES = {"linear": vp_linear(), "cosine": vp_cosine(), "ve": ve_geometric(), "sub-vp": sub_vp()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

NUMBERS = Mixture([1, 2, 1], [-1.5, 0.2, 2.0], stds=[0.3, 0.1, 0.6])
COVARIANCES = [[[1.0, 0.6], [0.6, 0.5]], [[0.04, 0.0], [0.0, 0.3]], [[0.2, -0.1], [-0.1, 0.2]]]
VECTORS = Mixture([3, 1, 2], [[0.0, 1.0], [-2.0, 0.5], [1.0, -1.0]], covariances=COVARIANCES, classes=[0, 1, 0])
TOYS = {
    "numbers": NUMBERS,
    "vectors": VECTORS,
    "gaussian": Gaussian(0.3, 0.5),
    "gaussian vectors": Gaussian([0.3, -1.0], covariance=COVARIANCES[0]),
    "isotropic": Gaussian([0.3, -1.0, 2.0], std=0.7),
}
every_toy = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def points(toy, level, num=50):
    spread, generator = toy.spread(level), torch.Generator().manual_seed(7)
    return 1.5 * spread * torch.randn(num, *spread.shape, dtype=torch.float64, generator=generator)


def by_torch(schedule, t):
    """The law of VECTORS at time t, put together by torch.distributions."""
    alpha, sigma = schedule(t)
    means, weights = float64([[0.0, 1.0], [-2.0, 0.5], [1.0, -1.0]]), float64([3, 1, 2])
    covariance = alpha**2 * float64(COVARIANCES) + sigma**2 * torch.eye(2)
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(alpha * means, covariance))


@on_all
@pytest.mark.parametrize("t", [0, 0.5, 1, 300, 1000])
def test_the_density_of_a_mixture_is_that_of_torch_distributions(schedule, t):
    x = points(VECTORS, schedule(t))
    torch.testing.assert_close(VECTORS.log_density(x, schedule(t)), by_torch(schedule, t).log_prob(x))


@every_toy
@on_all
def test_the_score_is_the_gradient_of_the_log_density(toy, schedule):
    for t in (0.5, 1, 300, 1000):
        level = schedule(t)
        x = points(toy, level).requires_grad_()
        (gradient,) = torch.autograd.grad(toy.log_density(x, level).sum(), x)
        torch.testing.assert_close(toy.score(x.detach(), level), gradient, rtol=1e-9, atol=1e-9)


@every_toy
@on_all
def test_the_denoiser_is_tweedies_formula(toy, schedule):
    for t in (1, 300, 1000):
        level = schedule(t)
        x_t = points(toy, level)
        x0, epsilon, variance = toy.denoiser(schedule)(x_t, t)
        score = toy.score(x_t, level)
        scale = float(x_t.abs().max() / level.alpha)
        torch.testing.assert_close(x0, (x_t + level.sigma**2 * score) / level.alpha, rtol=0, atol=1e-11 * scale)
        torch.testing.assert_close(epsilon, -level.sigma * score)
        assert variance is None


@every_toy
def test_one_time_per_point_is_the_same_as_one_by_one(toy):
    schedule, t = SCHEDULES["linear"], torch.tensor([1, 300, 1000])
    x = points(toy, schedule(300), 3)
    together = toy.denoiser(schedule)(x, t)
    for k in range(3):
        alone = toy.denoiser(schedule)(x[k : k + 1], float(t[k]))
        torch.testing.assert_close(together.x0[k : k + 1], alone.x0)
        torch.testing.assert_close(together.epsilon[k : k + 1], alone.epsilon)


@on_all
def test_labels_pick_components(schedule):
    """Class 0 of VECTORS is components 0 and 2, class 1 is component 1; label 2 is the whole mixture."""
    parts = {
        0: Mixture([3, 2], [[0.0, 1.0], [1.0, -1.0]], covariances=[COVARIANCES[0], COVARIANCES[2]]),
        1: Gaussian([-2.0, 0.5], covariance=COVARIANCES[1]),
        2: VECTORS,
    }
    level = schedule(300)
    x, labels = points(VECTORS, level), torch.arange(50) % 3
    score, density = VECTORS.score(x, level, labels), VECTORS.log_density(x, level, labels)
    x0 = VECTORS.denoiser(schedule)(x, 300, labels).x0
    for label, part in parts.items():
        rows = labels == label
        torch.testing.assert_close(score[rows], part.score(x[rows], level))
        torch.testing.assert_close(density[rows], part.log_density(x[rows], level))
        torch.testing.assert_close(x0[rows], part.denoiser(schedule)(x[rows], 300).x0)


def test_samples_have_the_moments_and_classes_of_the_mixture():
    x = VECTORS.sample(100_000, torch.Generator().manual_seed(0))
    exact = by_torch(SCHEDULES["linear"], 0)
    torch.testing.assert_close(x.mean(0), exact.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x.std(0), exact.variance.sqrt(), rtol=0, atol=0.02)
    torch.testing.assert_close(VECTORS.spread(Level(*torch.tensor([1.0, 0.0]))), exact.variance.sqrt())
    labels = torch.arange(30_000) % 3
    x = VECTORS.sample(30_000, torch.Generator().manual_seed(0), labels=labels)
    torch.testing.assert_close(x[labels == 1].T.cov(), float64(COVARIANCES[1]), rtol=0, atol=0.02)
    assert x[labels == 0].mean(0).tolist() == pytest.approx([0.4, 0.2], abs=0.04)
    assert NUMBERS.sample(5).shape == (5,) and VECTORS.sample(5).shape == (5, 2)


@on_all
def test_the_flow_of_a_gaussian_keeps_its_law_and_is_its_own_inverse(schedule):
    toy = TOYS["gaussian vectors"]
    t, s = 700, 20
    x = points(toy, schedule(t))
    there = toy.flow(x, schedule, t, s)
    torch.testing.assert_close(toy.flow(there, schedule, s, t), x)
    stretch = torch.linalg.lstsq(x - x.mean(0), there - there.mean(0)).solution.mT
    at_t, at_s = (
        alpha**2 * float64(COVARIANCES[0]) + sigma**2 * torch.eye(2) for alpha, sigma in map(schedule, (t, s))
    )
    torch.testing.assert_close(stretch @ at_t @ stretch.mT, at_s)
    torch.testing.assert_close(stretch, stretch.mT)


@on_all
def test_the_flow_of_a_gaussian_solves_the_equation_that_mixtures_solve(schedule):
    for toy in (TOYS["gaussian"], TOYS["gaussian vectors"]):
        x = points(toy, schedule(1000))
        for t, s in ((1000, 0), (1000, 40), (40, 700.5)):
            exact = toy.flow(x, schedule, t, s)
            assert (Mixture.flow(toy, x, schedule, t, s) - exact).abs().max() < 1e-8 * max(1, exact.abs().max())


def cdf(x, level):
    means, stds = float64([[-1.5, 0.2, 2.0], [0.3, 0.1, 0.6]])
    parts = Normal(level.alpha * means, (level.alpha**2 * stds**2 + level.sigma**2).sqrt())
    return parts.cdf(x[:, None]) @ float64([0.25, 0.5, 0.25])


@on_all
@pytest.mark.parametrize("t, s", [(1000, 0), (1000, 300), (1, 500)])
def test_the_flow_of_numbers_keeps_every_quantile(schedule, t, s):
    x = points(NUMBERS, schedule(t))
    moved = NUMBERS.flow(x, schedule, t, s)
    torch.testing.assert_close(cdf(moved, schedule(s)), cdf(x, schedule(t)), rtol=0, atol=1e-8)


@on_all
def test_the_flow_given_labels_is_that_of_their_components(schedule):
    x = points(VECTORS, schedule(1000), 6)
    moved = VECTORS.flow(x, schedule, 1000, 0, labels=torch.ones(6, dtype=torch.int64))
    exact = Gaussian([-2.0, 0.5], covariance=COVARIANCES[1]).flow(x, schedule, 1000, 0)
    torch.testing.assert_close(moved, exact, rtol=0, atol=1e-7)


def test_the_answer_has_the_dtype_of_the_question():
    schedule, x = SCHEDULES["linear"], torch.zeros(3)
    assert NUMBERS.denoiser(schedule)(x, 5).x0.dtype == NUMBERS.score(x, schedule(5)).dtype == torch.float32
    assert NUMBERS.flow(x, schedule, 5, 4).dtype == torch.float32
    assert NUMBERS.log_density(x, schedule(5)).dtype == torch.float64


@on_all
def test_what_no_denoiser_can_know_of_a_gaussian_is_its_irreducible_loss(schedule):
    """E (epsilon - epsilon*)^2 = alpha^2 std^2 / (alpha^2 std^2 + sigma^2)."""
    num, toy = 200_000, TOYS["gaussian"]
    epsilon = normal(keys(torch.tensor([0]), 1), (num,), torch.float64)[0]
    x0 = toy.sample(num, torch.Generator().manual_seed(1))
    for t in (40, 300):
        alpha, sigma = schedule(t)
        loss = ((toy.denoiser(schedule)(alpha * x0 + sigma * epsilon, t).epsilon - epsilon) ** 2).mean()
        signal = alpha**2 * 0.25
        assert float(loss) == pytest.approx(float(signal / (signal + sigma**2)), rel=0.015)


def test_point_masses_are_distributions_too():
    """Two points at -1 and 1: E[x_0 | x] = tanh(alpha x / sigma^2)."""
    schedule, toy = SCHEDULES["linear"], Mixture([1, 1], [-1.0, 1.0], stds=[0, 0])
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha, sigma = schedule(300)
    torch.testing.assert_close(toy.denoiser(schedule)(x, 300).x0, (alpha * x / sigma**2).tanh())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mixture([1, 1], [0.0, 1.0]), "exactly one"),
        (lambda: Mixture([1, -1], [0.0, 1.0], stds=[1, 1]), "must be positive"),
        (lambda: Mixture([1], [0.0, 1.0], stds=[1, 1]), "one per mean"),
        (lambda: Mixture([1, 1], [0.0, 1.0], stds=[1, -1]), "stds"),
        (lambda: Gaussian([0.0, 0.0], covariance=[[1.0, 2.0], [2.0, 1.0]]), "semidefinite"),
        (lambda: Gaussian([0.0, 0.0], covariance=[[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: Mixture([1, 1], [0.0, 1.0], stds=[1, 1], classes=[0, 2]), "classes"),
    ],
)
def test_what_is_no_distribution_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- sets in the plane ----


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_a_mixture_within_the_range_of_images(name):
    toy = SETS[name]()
    x = toy.sample(5000, torch.Generator().manual_seed(0))
    assert x.shape == (5000, 2) and (x.abs() > 1).double().mean() < 1e-3 and toy.num_classes > 1
    assert float(toy.spread(SCHEDULES["linear"](0)).max()) == pytest.approx(0.45, abs=0.05)
    line = torch.linspace(-1.4, 1.4, 141, dtype=torch.float64)
    density = toy.log_density(torch.cartesian_prod(line, line), SCHEDULES["linear"](1)).exp()
    assert float(density.sum()) * 0.02**2 == pytest.approx(1, rel=2e-3), "all of its mass"


def test_rings_are_even_along_and_narrow_across():
    toy, level = rings(radii=(0.4, 0.8), width=0.03), SCHEDULES["linear"](0)
    turn = torch.linspace(0, 2 * math.pi, 1000, dtype=torch.float64)
    for radius in (0.4, 0.8):
        along = toy.log_density(radius * torch.stack([turn.cos(), turn.sin()], 1), level).exp()
        assert along.max() / along.min() < 1.02
    x = toy.sample(20_000, torch.Generator().manual_seed(0))
    radius = x.norm(dim=1)
    outer = radius > 0.6
    assert float(outer.double().mean()) == pytest.approx(2 / 3, abs=0.012), "as long as it is"
    assert float(radius[outer].std()) == pytest.approx(0.03, rel=0.05)
    inner = toy.sample(2000, torch.Generator().manual_seed(1), labels=torch.zeros(2000, dtype=torch.int64))
    assert inner.norm(dim=1).mean() == pytest.approx(0.4, abs=0.01)


def test_moons_hold_each_others_ends():
    x = moons().sample(4000, torch.Generator().manual_seed(0), labels=torch.arange(4000) % 2)
    upper, lower = x[::2], x[1::2]
    assert (upper[:, 1] > -0.3).all() and (lower[:, 1] < 0.3).all()
    torch.testing.assert_close(upper.mean(0), -lower.mean(0), rtol=0, atol=0.03)
    distance = (upper - float64([-0.25, -0.1])).norm(dim=1)
    assert distance.mean() == pytest.approx(0.5, abs=0.01) and distance.std() == pytest.approx(0.04, rel=0.1)


def test_a_checkerboard_is_flat_on_black_and_empty_on_white():
    toy, level = checkerboard(), SCHEDULES["linear"](0)
    centres = -0.6 + 0.4 * torch.cartesian_prod(torch.arange(4), torch.arange(4)).double()
    black = (torch.cartesian_prod(torch.arange(4), torch.arange(4)).sum(1) % 2) == 0
    density = toy.log_density(centres, level).exp()
    torch.testing.assert_close(density[black], torch.full((8,), 1 / (8 * 0.16), dtype=torch.float64), rtol=0.01, atol=0)
    assert density[~black].max() < 0.01


def test_modes_have_the_weights_given():
    toy = modes([1, 3], radius=0.5, std=0.1)
    x = toy.sample(4000, torch.Generator().manual_seed(0))
    assert float((x[:, 0] > 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert toy.num_classes == 2 and modes().weights.tolist() == pytest.approx([k / 36 for k in range(1, 9)])


def test_an_impossible_tolerance_is_refused():
    with pytest.raises(ValueError, match="tolerance=1e-30"):
        NUMBERS.flow(torch.zeros(1), SCHEDULES["linear"], 5, 4, tolerance=1e-30)


def test_the_initialisation_error_of_ddpm_is_the_published_one():
    """W2 between the law of x_T and N(0, 1), for N(.3, .25), N(0, .25) and N(0, 1)."""
    level = SCHEDULES["linear"](1000)
    for (mean, std), published in {(0.3, 0.5): 1.906e-3, (0, 0.5): 1.51e-5, (0, 1): 0}.items():
        spread = float(Gaussian(float(mean), std).spread(level))
        assert math.hypot(float(level.alpha) * mean, spread - 1) == pytest.approx(published, rel=3e-3, abs=1e-12)
