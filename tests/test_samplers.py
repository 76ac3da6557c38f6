"""DDIM and ancestral sampling: against closed forms, diffusers, and exact laws."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.noise import ImageNoise
from diffusion.process.grids import times
from diffusion.process.kernels import transition
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import Prediction, sub_vp, ve_geometric, vp_cosine, vp_linear
from diffusion.process.toy import Gaussian, Mixture
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.ddim import DDIM

SCHEDULES = {"linear": vp_linear(), "cosine": vp_cosine(), "ve": ve_geometric(), "sub-vp": sub_vp()}
SAMPLERS = {
    "ddim": DDIM,
    "ddim half": partial(DDIM, eta=0.5),
    "ddim one": partial(DDIM, eta=1.0),
    "small": Ancestral,
    "large": partial(Ancestral, variance="large"),
}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
with_all = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
STEPS = [(1000, 999), (1000, 800), (500, 499), (501, 1), (2, 1), (700.5, 12.25), (1, 0), (1000, 0), (0.75, 0.5)]


def images(num=4, seed=0):
    return torch.randn(num, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stream(seed=1):
    """Noise that can be asked for twice: the same draws for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def guess(x, time_index=None, labels=None):
    """A smooth stand-in for a trained network that predicts epsilon."""
    return torch.tanh(1.3 * x) + 0.1 * x.roll(1, dims=-1)


# ---- closed forms ----


@pytest.mark.parametrize("t", [2, 10, 500, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_ddpm_step_is_the_papers(t, variance):
    """Ho et al. 2020, alg. 2, in its own letters: alpha = 1 - beta."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    b, now, before = beta[t - 1], bar[t - 1], bar[t - 2]
    x, z, schedule = images(), images(seed=1), SCHEDULES["linear"]
    sigma = math.sqrt(b if variance == "large" else (1 - before) / (1 - now) * b)
    expected = (x - b / math.sqrt(1 - now) * guess(x)) / math.sqrt(1 - b) + sigma * z
    got = Ancestral(schedule, variance).step(NetworkDenoiser(guess, schedule), x, t, t - 1, lambda x: z)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t, s", [(1000, 900), (500, 499), (101, 1), (1, 0)])
def test_a_ddim_step_is_the_papers(t, s, eta):
    """Song et al. 2021, eqs. 12 and 16."""
    bar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    x, z, schedule = images(), images(seed=1), SCHEDULES["linear"]
    sigma = eta * math.sqrt((1 - bar[s]) / (1 - bar[t]) * (1 - bar[t] / bar[s]))
    x0 = (x - math.sqrt(1 - bar[t]) * guess(x)) / math.sqrt(bar[t])
    expected = math.sqrt(bar[s]) * x0 + math.sqrt(max(0, 1 - bar[s] - sigma**2)) * guess(x) + sigma * z
    got = DDIM(schedule, eta).step(NetworkDenoiser(guess, schedule), x, t, s, lambda x: z)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("t, s", [(1000, 999), (1000, 700), (2, 1), (1, 0)])
@pytest.mark.parametrize("sampler", [partial(DDIM, eta=1.0), Ancestral], ids=["ddim one", "small"])
def test_a_ve_step_is_ncsns_ancestral_one(sampler, t, s):
    """Song et al. 2021 (score SDE), app. F: x + (sigma_t^2 - sigma_s^2) score + sqrt(sigma_s^2 (...) / sigma_t^2) z."""
    schedule = SCHEDULES["ve"]
    high, low = float(schedule(t).sigma), float(schedule(s).sigma)
    x, z = high * images(), images(seed=1)
    gap = high**2 - low**2
    expected = x - gap / high * guess(x) + math.sqrt(low**2 * gap / high**2) * z

    def denoise(x_t, t):
        return Prediction(*PREDICTIONS["epsilon"].to_pair(schedule, x_t, t, guess(x_t)))

    got = sampler(schedule).step(denoise, x, t, s, lambda x: z)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * high)


@on_all
@pytest.mark.parametrize("t, s", STEPS)
def test_ddim_at_eta_one_is_ancestral_sampling(schedule, t, s):
    x, z, denoise = float(schedule.std(t)) * images(), images(seed=1), Gaussian(0.3, 0.5).denoiser(schedule)
    ddim = DDIM(schedule, eta=1.0).step(denoise, x, t, s, lambda x: z)
    torch.testing.assert_close(ddim, Ancestral(schedule).step(denoise, x, t, s, lambda x: z), rtol=1e-12, atol=1e-12)


@on_all
@pytest.mark.parametrize("t, s", [(1000, 999), (1000, 700), (2, 1)])
def test_large_variance_is_that_of_the_forward_kernel_and_learned_lies_between(schedule, t, s):
    toy, x, z = Gaussian(0.3, 0.5), images(), torch.ones_like(images())

    def noise_of(variance, share=None):
        def denoise(x_t, t):
            return toy.denoiser(schedule)(x_t, t)._replace(variance=share)

        sampler = Ancestral(schedule, variance)
        return sampler.step(denoise, x, t, s, lambda x: z) - sampler.step(denoise, x, t, s, torch.zeros_like)

    small, large = noise_of("small"), noise_of("large")
    torch.testing.assert_close(large, transition(schedule, t, s).sigma * z, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(noise_of("learned", 0 * x), small)
    torch.testing.assert_close(noise_of("learned", 0 * x + 1), large)
    torch.testing.assert_close(noise_of("learned", 0 * x + 0.5), (small * large).sqrt())


@on_all
@with_all
@pytest.mark.parametrize("t", [1000, 300, 1, 0.5])
def test_a_step_to_zero_returns_x0_without_noise(schedule, sampler, t):
    x, denoise = images(), Gaussian(0.3, 0.5).denoiser(schedule)
    got = sampler(schedule).step(denoise, x, t, 0, lambda x: 1e6 * torch.ones_like(x))
    torch.testing.assert_close(got, denoise(x, t).x0, rtol=0, atol=1e-13)


# ---- diffusers, with float64 tables in place of its float32 ones (which differ by up to 1.7e-4) ----


def float64_tables(scheduler):
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def clipped_or_not(clip, schedule, network=guess):
    denoiser = NetworkDenoiser(network, schedule)
    return Clipped(denoiser, schedule) if clip else denoiser


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("num_steps, spacing", [(1000, "leading"), (100, "leading"), (50, "trailing")])
def test_ancestral_walks_where_diffusers_ddpm_walks(variance, clip, num_steps, spacing):
    """google/ddpm-cifar10-32 is fixed_large, the 256x256 models fixed_small; all clip. 1000 steps, and strided ones.

    Where the grid's lowest level is above 1, diffusers adds noise to what it returns; DDPM does not, and we do not.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        variance_type=f"fixed_{variance}", clip_sample=clip, timestep_spacing=spacing, beta_schedule="linear"
    )
    float64_tables(theirs).set_timesteps(num_steps)
    schedule, x, generator = SCHEDULES["linear"], images(2), torch.Generator().manual_seed(1)
    grid = times(1000, num_steps, "linear" if spacing == "leading" else spacing)
    assert grid[:-1] == (theirs.timesteps + 1).tolist()
    walk = Ancestral(schedule, variance).walk(clipped_or_not(clip, schedule), x, grid, stream(1))
    for code_time, visit in zip(theirs.timesteps, walk, strict=True):
        step = theirs.step(guess(x), int(code_time), x, generator=generator)
        expected = step.prev_sample if visit.t > 0 else step.pred_original_sample
        scale = max(1.0, float(expected.abs().max()))  # without clipping this walk runs off
        assert (visit.x - expected).abs().max() < 1e-7 * scale
        assert (visit.prediction.x0 - step.pred_original_sample).abs().max() < 1e-7 * 160 * scale
        x = visit.x


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps, spacing", [(10, "leading"), (100, "trailing"), (20, "trailing")])
def test_ddim_walks_where_diffusers_ddim_walks(eta, clip, num_steps, spacing):
    """With use_clipped_model_output, which is guided-diffusion's way and ours: epsilon follows the clipped x0."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(clip_sample=clip, timestep_spacing=spacing, beta_schedule="linear")
    float64_tables(theirs).set_timesteps(num_steps)
    schedule, x, generator = SCHEDULES["linear"], images(2), torch.Generator().manual_seed(1)
    grid = times(1000, num_steps, "linear" if spacing == "leading" else spacing)
    walk = DDIM(schedule, eta).walk(clipped_or_not(clip, schedule), x, grid, stream(1))
    for code_time, visit in zip(theirs.timesteps, walk, strict=True):
        step = theirs.step(
            guess(x), int(code_time), x, eta=eta, use_clipped_model_output=True, generator=generator if eta else None
        )
        scale = max(1.0, float(step.prev_sample.abs().max()))
        assert (visit.x - step.prev_sample).abs().max() < 1e-7 * scale
        x = visit.x


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_a_learned_variance_is_read_as_diffusers_reads_it(num_steps):
    diffusers = pytest.importorskip("diffusers")

    def network(x, time_index=None, labels=None):
        return torch.cat([guess(x), torch.tanh(x.roll(1, dims=-2))], dim=1)

    theirs = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=True)
    float64_tables(theirs).set_timesteps(num_steps)
    schedule, x, generator = SCHEDULES["linear"], images(2), torch.Generator().manual_seed(1)
    denoiser = clipped_or_not(True, schedule, network)
    walk = Ancestral(schedule, "learned").walk(denoiser, x, times(1000, num_steps), stream(1))
    for code_time, visit in zip(theirs.timesteps, walk, strict=True):
        x = theirs.step(network(x), int(code_time), x, generator=generator).prev_sample
        assert (visit.x - x).abs().max() < 1e-7
        x = visit.x


# ---- exact laws ----


def law_after(sampler, denoise, mean, std, grid):
    """Mean and standard deviation, exactly: every step on Gaussian data is x_s = a x_t + b + c z."""
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    unit = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        b, a, c = sampler.step(denoise, x, t, s, lambda x: unit).tolist()
        a, c = a - b, c - b
        mean, std = a * mean + b, math.hypot(a * std, c)
    return mean, std


@pytest.mark.parametrize("name", ["linear", "ve"])
@pytest.mark.parametrize("sampler", [DDIM, Ancestral], ids=["ddim", "small"])
def test_the_error_shrinks_at_first_order(sampler, name):
    """N(.3, .5^2) from its exact law at t = 1000 to t = 40: W2 to the exact law there, N = 80, 160, 320 steps."""
    schedule, toy, steps = SCHEDULES[name], Gaussian(0.3, 0.5), [80, 160, 320]
    errors = []
    for num_steps in steps:
        grid = np.linspace(1000, 40, num_steps + 1).tolist()
        start = 0.3 * float(schedule(1000).alpha), float(toy.spread(schedule(1000)))
        mean, std = law_after(sampler(schedule), toy.denoiser(schedule), *start, grid)
        errors.append(math.hypot(mean - 0.3 * float(schedule(40).alpha), std - float(toy.spread(schedule(40)))))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.1), errors


@on_all
@with_all
def test_every_sampler_reaches_the_data_on_every_schedule(schedule, sampler):
    """W1 between 4,000 samples and the quantiles of a mixture; with exact draws it is about 0.02."""
    toy, num = Mixture([1, 2], [-1.0, 0.8], stds=[0.2, 0.1]), 4000
    noise = ImageNoise(5, torch.arange(num))
    x = schedule.prior_std * noise(torch.zeros(num, dtype=torch.float64))
    out = sampler(schedule).sample(toy.denoiser(schedule), x, times(1000, 250, "trailing"), noise).sort().values
    grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    cdf = Normal(-1.0, 0.2).cdf(grid) / 3 + Normal(0.8, 0.1).cdf(grid) * 2 / 3
    exact = grid[torch.searchsorted(cdf, (torch.arange(num, dtype=torch.float64) + 0.5) / num)]
    assert (out - exact).abs().mean() < 0.06


@on_all
def test_ddim_follows_the_flow(schedule):
    toy = Mixture([1, 2], [-1.0, 0.8], stds=[0.2, 0.1])
    x = toy.spread(schedule(1000)) * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    exact = toy.flow(x, schedule, 1000, 1)
    errors = []
    for num_steps in (250, 500):
        grid = [1 + 999 * k / num_steps for k in range(num_steps, -1, -1)]
        errors.append((DDIM(schedule).sample(toy.denoiser(schedule), x, grid, None) - exact).abs().max())
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.05


@on_all
def test_ddim_encodes_upward_what_it_decodes_downward(schedule):
    toy = Gaussian(0.3, 0.5)
    x, grid = toy.spread(schedule(1)) * torch.linspace(-2, 2, 9, dtype=torch.float64), list(range(1, 1001))
    code = DDIM(schedule).sample(toy.denoiser(schedule), x, grid, None)
    torch.testing.assert_close(code, toy.flow(x, schedule, 1, 1000), rtol=0.05, atol=0.05 * schedule.prior_std)
    again = DDIM(schedule).sample(toy.denoiser(schedule), code, grid[::-1], None)
    torch.testing.assert_close(again, x, rtol=0, atol=0.02)


def test_only_ddim_goes_up():
    schedule, denoise = SCHEDULES["linear"], Gaussian(0.3, 0.5).denoiser(SCHEDULES["linear"])
    for sampler in (DDIM(schedule, eta=0.5), Ancestral(schedule)):
        with pytest.raises(ValueError, match="s must not be above t"):
            sampler.step(denoise, images(), 10, 20, torch.randn_like)


# ---- the loop ----


@with_all
def test_a_walk_visits_the_times_it_is_given_with_one_call_each(sampler):
    schedule, seen = SCHEDULES["linear"], []

    def denoise(x_t, t):
        seen.append(t)
        return Gaussian(0.3, 0.5).denoiser(schedule)(x_t, t)

    grid = times(1000, 13)
    visits = list(sampler(schedule).walk(denoise, images(), grid, stream()))
    assert [visit.t for visit in visits] == grid[1:] and seen == grid[:-1]
    assert torch.equal(visits[-1].x, sampler(schedule).sample(denoise, images(), grid, stream()))
    torch.testing.assert_close(visits[-1].x, visits[-1].prediction.x0)
    assert torch.equal(sampler(schedule).sample(denoise, images(), [500], stream()), images())


def test_deterministic_sampling_asks_for_no_noise():
    schedule = SCHEDULES["linear"]
    asked = []
    DDIM(schedule).sample(NetworkDenoiser(guess, schedule), images(), times(1000, 5), asked.append)
    assert asked == []


@with_all
def test_an_image_does_not_depend_on_its_batch(sampler):
    schedule, numbers = SCHEDULES["linear"], torch.tensor([4, 0, 7, 2])

    def sample(rows):
        noise = ImageNoise(3, numbers[rows])
        x = noise(torch.zeros(len(rows), 1, 4, 4, dtype=torch.float64))
        return sampler(schedule).sample(Gaussian(0.3, 0.5).denoiser(schedule), x, times(1000, 10), noise)

    together = sample([0, 1, 2, 3])
    assert torch.equal(together[2:], sample([2, 3])) and torch.equal(together[1:2], sample([1]))
    assert not torch.equal(together[0], together[1])


def test_sampling_keeps_float32_and_no_graph():
    schedule, weight = SCHEDULES["linear"], torch.ones((), requires_grad=True)
    denoiser = NetworkDenoiser(lambda x, t, labels: weight * guess(x), schedule)
    out = Ancestral(schedule).sample(denoiser, images().float(), times(1000, 4), torch.randn_like)
    assert out.dtype == torch.float32 and not out.requires_grad


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: DDIM(s, eta=1.1), "sampler.eta=1.1"),
        (lambda s: DDIM(s, eta=-0.1), "sampler.eta=-0.1"),
        (lambda s: DDIM(s, eta=math.nan), "sampler.eta=nan"),
        (lambda s: Ancestral(s, "fixed_small"), "sampler.variance=fixed_small must be one of small, large, learned"),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_key(make, message):
    with pytest.raises(ValueError, match=message):
        make(SCHEDULES["linear"])


def test_a_learned_variance_must_be_there():
    schedule = SCHEDULES["linear"]
    with pytest.raises(ValueError, match="sampler.variance=learned"):
        Ancestral(schedule, "learned").step(NetworkDenoiser(guess, schedule), images(), 9, 8, torch.randn_like)
