"""Langevin dynamics, annealed Langevin, predictor and corrector: against the papers' formulas and exact laws."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

from diffusion.noise import ImageNoise
from diffusion.process.grids import times
from diffusion.process.schedule import sub_vp, ve_geometric, vp_linear
from diffusion.process.toy import Gaussian, Mixture, modes
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.langevin import Langevin, MetropolisLangevin
from diffusion.samplers.predictor_corrector import LangevinCorrector, PredictorCorrector

SCHEDULES = {"vp": vp_linear(), "ve": ve_geometric(), "sub-vp": sub_vp()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
TOY = Mixture([2, 1], [[0.0, 1.0], [-1.0, 0.5]], covariances=[[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]])


def stream(seed=1):
    """Noise that can be asked for twice: the same draws for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def points(num=40, seed=0):
    return torch.randn(num, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- one update ----


@on_all
def test_an_update_is_the_textbooks(schedule):
    x, z, h = points(), points(seed=1), 0.003
    for t in (1, 300.5, 1000):
        expected = x + h * TOY.score(x, schedule(t)) + math.sqrt(2 * h) * z
        got = Langevin(schedule, h).step(TOY.denoiser(schedule), x, t, t, lambda x: z)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_annealed_langevin_is_the_papers_algorithm(convention):
    """NCSN on a ladder in its own letters: alpha_i = epsilon sigma_i^2 / sigma_L^2, sigma_1 the largest there."""
    epsilon, num_updates = 2e-5, 4
    schedule, noise, x = ve_geometric(10, 0.01, 1.0), stream(), points()
    expected = x
    for i in range(10, 0, -1):
        level = schedule(i)
        alpha = epsilon * float(level.sigma) ** 2 / 0.01**2
        for _ in range(num_updates):
            score, z = TOY.score(expected, level), noise(expected)
            if convention == "code":
                expected = expected + alpha * score + math.sqrt(2 * alpha) * z
            else:
                expected = expected + alpha / 2 * score + math.sqrt(alpha) * z
    sampler = AnnealedLangevin(schedule, epsilon / 0.01**2, convention, denoise=False)
    got = sampler.sample(TOY.denoiser(schedule), x, times(10, 10, visits=num_updates), stream())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    denoised = AnnealedLangevin(schedule, epsilon / 0.01**2, convention).sample(
        TOY.denoiser(schedule), x, times(10, 10, visits=num_updates), stream()
    )
    tweedie = expected + 0.01**2 * TOY.score(expected, schedule(1))
    torch.testing.assert_close(denoised, tweedie, rtol=1e-9, atol=1e-12)


@on_all
def test_the_papers_step_is_half_of_the_codes(schedule):
    x, grid = float(schedule.std(1000)) * points(), times(1000, 20, visits=2)
    code, paper, same = (
        AnnealedLangevin(schedule, step, convention).sample(TOY.denoiser(schedule), x, grid, stream())
        for step, convention in ((0.1, "code"), (0.1, "paper"), (0.2, "paper"))
    )
    torch.testing.assert_close(code, same, rtol=1e-12, atol=1e-12)
    assert (code - paper).abs().max() > 1e-3


@pytest.mark.parametrize("norms", ["image", "batch", "expected"])
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_corrector_is_the_papers(name, norms):
    """Song et al. 2021 (score SDE), alg. 4 and 5; for "batch" as their code has it, means of norms over the batch."""
    schedule, snr, t = SCHEDULES[name], 0.16, 400
    x, z = float(schedule.std(t)) * points(), points(seed=1)
    score = TOY.score(x, schedule(t))
    alpha = 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999) if name == "vp" else 1.0
    size = {
        "image": z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True),
        "batch": z.norm(dim=1).mean() / score.norm(dim=1).mean(),
        "expected": schedule(t).sigma,
    }[norms]
    step = 2 * alpha * (snr * size) ** 2
    expected = x + step * score + (2 * step) ** 0.5 * z
    got = LangevinCorrector(schedule, snr, norms).step(TOY.denoiser(schedule), x, t, t, lambda x: z)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("snr, step_size", [(0.316, 0.2), (0.176, 0.062)])
def test_the_expected_corrector_takes_annealed_langevins_step(snr, step_size):
    schedule, x, z = SCHEDULES["ve"], points(), points(seed=1)
    corrector = LangevinCorrector(schedule, snr, "expected")
    assert float(corrector.share(5, x, z)) == pytest.approx(step_size, rel=2e-3)
    exact = LangevinCorrector(schedule, math.sqrt(step_size / 2), "expected")
    annealed = AnnealedLangevin(schedule, step_size)
    args = (TOY.denoiser(schedule), x, 5, 5, lambda x: z)
    torch.testing.assert_close(exact.step(*args), annealed.step(*args))


# ---- walks ----


def test_predictor_and_corrector_are_the_papers_loop():
    """Reverse diffusion under VE with one corrector step before it at each level, and no noise at the end."""
    schedule, x, noise, snr = ve_geometric(20, 0.01, 5.0), 5 * points(), stream(), 0.16
    expected = x
    for i in range(20, 0, -1):
        score, z = TOY.score(expected, schedule(i)), noise(expected)
        step = 2 * (snr * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
        expected = expected + step * score + (2 * step) ** 0.5 * z
        gap = schedule(i).sigma ** 2 - schedule(i - 1).sigma ** 2
        mean = expected + gap * TOY.score(expected, schedule(i))
        expected = mean + gap**0.5 * noise(expected) if i > 1 else mean
    sampler = PredictorCorrector(
        schedule, partial(Ancestral, variance="large"), partial(LangevinCorrector, snr=snr, norms="batch")
    )
    got = sampler.sample(TOY.denoiser(schedule), x, times(20, 20, visits=2), stream())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@on_all
def test_without_stays_the_predictor_is_alone_and_without_descents_the_corrector_is(schedule):
    x, denoise = float(schedule.std(1000)) * points(), TOY.denoiser(schedule)
    both = PredictorCorrector(schedule, DDIM)
    alone = DDIM(schedule).sample(denoise, x, times(1000, 10), None)
    assert torch.equal(both.sample(denoise, x, times(1000, 10), stream()), alone)
    staying = LangevinCorrector(schedule).sample(denoise, x, [700] * 5, stream())
    assert torch.equal(both.sample(denoise, x, [700] * 5, stream()), staying)


@on_all
@pytest.mark.parametrize("sampler", [DDIM, partial(DDIM, eta=1.0), Ancestral, partial(Ancestral, variance="large")])
def test_a_step_that_stays_changes_nothing_where_nothing_is_to_be_corrected(schedule, sampler):
    x = float(schedule.std(300)) * points()
    stayed = sampler(schedule).step(TOY.denoiser(schedule), x, 300, 300, torch.ones_like)
    torch.testing.assert_close(stayed, x, rtol=1e-7, atol=1e-6)


def test_annealed_langevin_visits_and_calls_as_often_as_it_says():
    schedule, seen = ve_geometric(7), []

    def denoise(x_t, t):
        seen.append(t)
        return TOY.denoiser(schedule)(x_t, t)

    grid = times(7, 7, visits=3)
    visits = list(AnnealedLangevin(schedule, 0.1).walk(denoise, points(), grid, stream()))
    assert [visit.t for visit in visits] == grid[1:] and len(visits) == 21
    assert seen == [t for t in range(7, 0, -1) for _ in range(3)] + [1], "and one more for the last denoising"


SAMPLERS = {
    "langevin": partial(Langevin, step_size=1e-3),
    "metropolis": partial(MetropolisLangevin, step_size=1e-3),
    "annealed": partial(AnnealedLangevin, step_size=0.1),
    "corrector": partial(PredictorCorrector, predictor=Ancestral),
    "expected": partial(
        PredictorCorrector, predictor=Ancestral, corrector=partial(LangevinCorrector, norms="expected")
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    schedule, numbers = SCHEDULES["ve"], torch.tensor([4, 0, 7, 2])

    def sample(rows):
        noise = ImageNoise(3, numbers[rows])
        x = noise(torch.zeros(len(rows), 1, 4, 4, dtype=torch.float64))
        return SAMPLERS[name](schedule).sample(toy.denoiser(schedule), x, times(1000, 10, visits=2), noise)

    toy = Gaussian(0.3, 0.5)
    together = sample([0, 1, 2, 3])
    assert torch.equal(together[2:], sample([2, 3])) and torch.equal(together[1:2], sample([1]))
    assert not torch.equal(together[0], together[1])


def test_with_the_papers_norms_it_does():
    schedule, toy, x = SCHEDULES["ve"], Gaussian(0.3, 0.5), torch.randn(4, 1, 4, 4, dtype=torch.float64)
    corrector = LangevinCorrector(schedule, norms="batch")
    together = corrector.step(toy.denoiser(schedule), x, 5, 5, torch.ones_like)
    alone = corrector.step(toy.denoiser(schedule), x[:1], 5, 5, torch.ones_like)
    assert not torch.allclose(together[:1], alone)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_keeps_float32(name):
    schedule = SCHEDULES["vp"]
    out = SAMPLERS[name](schedule).sample(
        TOY.denoiser(schedule), points().float(), times(1000, 4, visits=2), torch.randn_like
    )
    assert out.dtype == torch.float32 and out.isfinite().all()


# ---- the laws they settle at ----


@pytest.mark.parametrize("h", [0.02, 0.2, 0.4])
def test_unadjusted_langevin_settles_at_too_wide_a_law(h):
    """On N(m, v): v / (1 - h / (2 v)), by propagating mean and variance through the affine update."""
    schedule, toy, t = SCHEDULES["vp"], Gaussian(0.3, 0.5), 40
    sampler, denoise = Langevin(schedule, h), toy.denoiser(SCHEDULES["vp"])
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    unit = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    b, a, c = sampler.step(denoise, x, t, t, lambda x: unit).tolist()
    a, c = a - b, c - b
    v = float(toy.spread(schedule(t))) ** 2
    assert b / (1 - a) == pytest.approx(0.3 * float(schedule(t).alpha), rel=1e-9)
    assert c**2 / (1 - a**2) == pytest.approx(v / (1 - h / (2 * v)), rel=1e-9)


def metropolis(h, log_density=None, toy=None, num=4000, steps=30):
    """(what 30 updates make of draws from the law itself, the share of proposals taken), at t = 40 under VP."""
    schedule, t, toy = SCHEDULES["vp"], 40, toy or Gaussian(0.3, 0.5)
    alpha, sigma = schedule(t)
    z = stream(3)
    x = alpha * toy.sample(num, torch.Generator().manual_seed(0))
    x = x + sigma * z(x)
    density = (lambda x, t: toy.log_density(x, schedule(t))) if log_density else None
    walk = MetropolisLangevin(schedule, h, density).walk(toy.denoiser(schedule), x, [t] * (steps + 1), z)
    places = [x] + [visit.x for visit in walk]
    taken = torch.stack([(a != b).reshape(num, -1).any(1).double().mean() for a, b in pairwise(places)]).mean()
    return places[-1], float(taken)


@pytest.mark.parametrize("h", [0.2, 0.6])
def test_metropolis_keeps_the_law_whatever_the_step(h):
    """Kolmogorov and Smirnov's distance of 4,000 chains; unadjusted it would be 1.27 times as wide at 0.2."""
    schedule, toy = SCHEDULES["vp"], Gaussian(0.3, 0.5)
    x, taken = metropolis(h)
    law = Normal(0.3 * float(schedule(40).alpha), float(toy.spread(schedule(40))))
    cdf = law.cdf(x.sort().values)
    rank = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
    assert (cdf - rank).abs().max() < 1.95 / math.sqrt(len(x)), "p > 1e-3"
    assert 0.2 < taken < 0.95


def test_metropolis_keeps_the_weights_of_modes():
    """Two modes that are near: chains cross, and as many each way."""
    toy = Mixture([1, 3], [-0.4, 0.4], stds=[0.2, 0.2])
    x, taken = metropolis(0.05, toy=toy)
    share = float((x < 0).double().mean())
    exact = float(sum(w * Normal(m, 0.205).cdf(torch.tensor(0.0)) for w, m in ((0.25, -0.4), (0.75, 0.4))))
    assert share == pytest.approx(exact, abs=3.3 * math.sqrt(exact * (1 - exact) / len(x))) and 0.5 < taken < 0.999


@pytest.mark.parametrize("toy", [Gaussian([0.3, -1.0], std=0.7), TOY, modes()], ids=["gaussian", "two", "modes"])
def test_the_score_tells_the_ratio_of_densities(toy):
    """By quadrature along the way of a usual proposal: the same images are taken as with the density itself."""
    by_density, taken = metropolis(2e-4, log_density=True, toy=toy, num=500, steps=5)
    by_score, also = metropolis(2e-4, toy=toy, num=500, steps=5)
    assert (by_density == by_score).double().mean() > 0.999 and taken == pytest.approx(also, abs=1e-3)


@on_all
def test_annealed_langevin_reaches_the_data_on_every_schedule(schedule):
    """W1 between 2,000 samples and the quantiles of a mixture, over a coarse ladder with many updates at each level."""
    toy, num = Mixture([1, 2], [-0.5, 0.4], stds=[0.2, 0.1]), 2000
    noise = ImageNoise(5, torch.arange(num))
    x = schedule.prior_std * noise(torch.zeros(num, dtype=torch.float64))
    grid = times(1000, 60, "trailing", visits=10)
    out = AnnealedLangevin(schedule, 0.1).sample(toy.denoiser(schedule), x, grid, noise).sort().values
    line = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    cdf = Normal(-0.5, 0.2).cdf(line) / 3 + Normal(0.4, 0.1).cdf(line) * 2 / 3
    exact = line[torch.searchsorted(cdf, (torch.arange(num, dtype=torch.float64) + 0.5) / num)]
    assert (out - exact).abs().mean() < 0.07, "the last bit of which is the lag of a grid that is even in t"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: Langevin(s, 0.0), "sampler.step_size=0.0"),
        (lambda s: AnnealedLangevin(s, math.nan), "sampler.step_size=nan"),
        (lambda s: AnnealedLangevin(s, 0.1, "ncsn"), "sampler.convention=ncsn must be one of code, paper"),
        (lambda s: LangevinCorrector(s, 0.0), "sampler.corrector.snr=0.0"),
        (
            lambda s: LangevinCorrector(s, 0.1, "mean"),
            "sampler.corrector.norms=mean must be one of image, batch",
        ),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_key(make, message):
    with pytest.raises(ValueError, match=message):
        make(SCHEDULES["vp"])


def test_langevin_does_not_go_up():
    schedule = SCHEDULES["vp"]
    for sampler in (Langevin(schedule, 0.1), AnnealedLangevin(schedule, 0.1)):
        with pytest.raises(ValueError, match="stays or goes down"):
            sampler.step(TOY.denoiser(schedule), points(), 10, 20, torch.randn_like)
