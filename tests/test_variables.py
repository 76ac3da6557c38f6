"""The change of variables between VP and VE: one model, one set of samples."""

import math

import pytest
import torch

from diffusion.denoiser import NetworkDenoiser
from diffusion.noise import ImageNoise
from diffusion.process.grids import times
from diffusion.process.kernels import reverse_std
from diffusion.process.schedule import sub_vp, vp_cosine, vp_linear
from diffusion.process.toy import Mixture
from diffusion.process.variables import Exploding, carried, carried_denoiser
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.ddim import DDIM

SCHEDULES = {"linear": vp_linear(), "cosine": vp_cosine(), "sub-vp": sub_vp()}
SAMPLERS = {
    "small": Ancestral,
    "ddim": DDIM,
    "annealed": lambda s: AnnealedLangevin(s, 0.2),
}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def guess(x, time_index=None, labels=None):
    """A smooth stand-in for a trained network that predicts epsilon; of unit variance is what it is fed."""
    return 0.9 * torch.tanh(1.3 * x) + 0.1 * x.roll(1, dims=-1)


@on_all
def test_the_twin_has_the_same_lambda_at_every_time(schedule):
    twin, t = Exploding(schedule), torch.linspace(0, 1000, 997, dtype=torch.float64)
    assert (twin(t).alpha == 1).all() and twin.num_timesteps == 1000
    torch.testing.assert_close(twin.log_ratio(t[1:]), schedule.log_ratio(t[1:]), rtol=0, atol=1e-12)
    torch.testing.assert_close(twin.time_of(twin.log_ratio(t)), t, rtol=0, atol=1e-9)


def walked(schedule, sampler, denoise, x, grid, dtype=torch.float64):
    """x_0 from x at grid[0], the noise keyed by image."""
    return sampler(schedule).sample(denoise, x.to(dtype), grid, ImageNoise(3, torch.arange(len(x))))


@on_all
@pytest.mark.parametrize("name", SAMPLERS)
def test_vp_and_ve_make_the_same_samples_of_one_model(schedule, name):
    """A network is fed x_t at unit variance, which is the same number in both variables: nothing of it changes."""
    twin, grid = Exploding(schedule), times(1000, 100, visits=3 if name == "annealed" else 1)
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here = NetworkDenoiser(guess, schedule)
    one = walked(schedule, SAMPLERS[name], here, x, grid)
    there = carried(x, grid[0], schedule, twin)
    for denoise in (NetworkDenoiser(guess, twin), carried_denoiser(here, schedule, twin)):
        other = walked(twin, SAMPLERS[name], denoise, there, grid)
        assert one.isfinite().all() and (other - one).abs().max() < 1e-9 * max(1, one.abs().max())


@on_all
def test_the_large_variance_is_not_the_same_in_both_variables(schedule):
    """That of VP is narrower than sigma_t^2 - sigma_s^2 of VE by alpha_t / alpha_s: another sampler."""
    twin, t, s = Exploding(schedule), 400, 300
    here, there = (float(reverse_std(levels, t, s, "large")) for levels in (schedule, twin))
    kept = float(schedule(t).alpha / schedule(s).alpha)
    assert here / float(schedule(s).alpha) == pytest.approx(kept * there, rel=1e-12) and kept < 0.95


@pytest.mark.slow
def test_ddpms_own_chain_is_ncsns_to_rounding_in_float32_too():
    """All 1,000 steps, fixed-small, of exact scores: to 1e-9 in float64, to 1e-6 in float32."""
    schedule = SCHEDULES["linear"]
    twin, grid, toy = Exploding(schedule), times(1000, 1000), Mixture([1, 2], [-0.5, 0.6], stds=[0.2, 0.1])
    gaps = {}
    for dtype in (torch.float64, torch.float32):
        x = ImageNoise(1, torch.arange(64))(torch.zeros(64, dtype=torch.float64))
        one = walked(schedule, Ancestral, toy.denoiser(schedule), x, grid, dtype)
        other = walked(twin, Ancestral, toy.denoiser(twin), carried(x, 1000, schedule, twin), grid, dtype)
        gaps[dtype] = float((one - other).abs().max())
    assert gaps[torch.float64] < 1e-9
    assert 1e-9 < gaps[torch.float32] < 5e-6


def test_carrying_there_and_back_changes_nothing():
    schedule, twin = SCHEDULES["linear"], Exploding(SCHEDULES["linear"])
    x, t = torch.randn(5, 3, dtype=torch.float64), torch.tensor([1, 10, 500, 999, 1000])
    there = carried(x, t, schedule, twin)
    torch.testing.assert_close(there, x / schedule(t).alpha[:, None])
    torch.testing.assert_close(carried(there, t, twin, schedule), x)
    assert float(carried(x[:1], 1000, schedule, twin)[0, 0] / x[0, 0]) == pytest.approx(math.exp(5.0589), rel=1e-3)
