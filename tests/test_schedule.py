"""The noise schedules: their tables, what lies between the levels, and their inverse."""

import math

import numpy as np
import pytest
import torch

from diffusion.process.kernels import noised, posterior, renoised, transition
from diffusion.process.schedule import (
    sub_vp,
    ve_geometric,
    vp_constant,
    vp_continuous,
    vp_cosine,
    vp_linear,
    vp_quadratic,
)

VP = {"linear": vp_linear(), "quadratic": vp_quadratic(), "constant": vp_constant(1000, 0.01), "cosine": vp_cosine()}
VE = {"ve": ve_geometric(), "ncsn": ve_geometric(10, 0.01, 1.0)}
CONTINUOUS = {"vp continuous": vp_continuous(), "sub-vp": sub_vp(), "sub-vp of 7": sub_vp(7, 0.2, 12.0)}
ALL = VP | VE | CONTINUOUS
between = pytest.mark.parametrize("name", ALL)


def real_times(schedule, num=4001):
    return torch.linspace(0, schedule.num_timesteps, num, dtype=torch.float64)


def test_the_published_figures_of_the_linear_schedule():
    schedule = VP["linear"]
    alpha_bar = schedule(torch.arange(1001)).alpha ** 2
    assert float(alpha_bar[1]) == pytest.approx(0.9999, abs=1e-12)
    assert float(alpha_bar[1000]) == pytest.approx(4.036e-5, rel=2e-4)
    assert float(schedule(1000).alpha) == pytest.approx(6.353e-3, rel=2e-4)
    assert float(posterior(schedule, 2, 1).std ** 2) == pytest.approx(5.453e-5, rel=2e-4)
    ratio = [float(schedule(t).sigma / schedule(t).alpha) for t in (1, 1000)]
    assert ratio == pytest.approx([0.0100, 157.41], rel=1e-4)


def test_the_published_figures_of_the_cosine_schedule():
    schedule = VP["cosine"]
    assert float(transition(schedule, 1, 0).sigma ** 2) == pytest.approx(4.13e-5, rel=2e-3)
    assert float(schedule(500).alpha ** 2) == pytest.approx(0.4938, abs=1e-4)
    assert float(VP["linear"](500).alpha ** 2) == pytest.approx(0.0786, abs=1e-4)
    assert float(schedule(1000).alpha ** 2) == pytest.approx(2.4e-9, rel=0.02)
    assert float(transition(schedule, 1000, 999).sigma ** 2) == pytest.approx(0.999, abs=1e-12)


def betas(name):
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "quadratic": np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2,
        "constant": np.full(1000, 0.01),
        "cosine": np.minimum(1 - f[1:] / f[:-1], 0.999),
    }[name]


@pytest.mark.parametrize("name", VP)
def test_integers_are_the_products_of_the_papers(name):
    alpha_bar = np.cumprod(1 - betas(name))
    alpha, sigma = VP[name](torch.arange(1, 1001))
    np.testing.assert_allclose(alpha**2, alpha_bar, rtol=1e-11)
    np.testing.assert_allclose(sigma**2, 1 - alpha_bar, rtol=1e-11)


def test_the_ladder_of_ncsn():
    published = [0.01, 0.01668, 0.02783, 0.04642, 0.07743, 0.12915, 0.21544, 0.35938, 0.59948, 1.0]
    np.testing.assert_allclose(VE["ncsn"](torch.arange(1, 11)).sigma, published, atol=5e-6)
    ladder = ve_geometric(232, 0.01, 50.0)
    assert float(ladder(101).sigma / ladder(100).sigma) == pytest.approx(1.03756, abs=1e-5)


@between
def test_a_level_is_on_its_familys_curve_at_every_time(name):
    alpha, sigma = ALL[name](real_times(ALL[name]))
    curve = alpha if name in VE else alpha**2 + (sigma if name.startswith("sub-vp") else sigma**2)
    assert (curve - 1).abs().max() < 1e-15


@pytest.mark.parametrize("name", VP | VE)
def test_lambda_is_linear_between_levels_and_sigma_below_the_first(name):
    schedule = ALL[name]
    k = torch.arange(1, schedule.num_timesteps, dtype=torch.float64)

    def log_ratio(t):
        alpha, sigma = schedule(t)
        return (alpha / sigma).log()

    for part in (0.25, 0.5, 0.9):
        expected = (1 - part) * log_ratio(k) + part * log_ratio(k + 1)
        torch.testing.assert_close(log_ratio(k + part), expected, rtol=0, atol=1e-12)
    below = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(schedule(below).sigma, below * schedule(1).sigma, rtol=1e-15, atol=0)


@pytest.mark.parametrize("beta_min, beta_max", [(0.1, 20.0), (0.5, 8.0), (3.0, 3.0)])
def test_continuous_schedules_are_the_formulas_of_score_sde_at_every_time(beta_min, beta_max):
    """Song et al. 2021, eqs. 29 and 30 and the code, whose time is u = t / T: by integrating beta numerically."""
    t = real_times(vp_continuous(50, beta_min, beta_max))
    u = torch.linspace(0, 1, len(t), dtype=torch.float64)
    beta = beta_min + u * (beta_max - beta_min)
    integral = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(beta, u)])  # exact of a line
    for schedule, sigma in (
        (vp_continuous(50, beta_min, beta_max), (1 - (-integral).exp()).sqrt()),
        (sub_vp(50, beta_min, beta_max), 1 - (-integral).exp()),
    ):
        torch.testing.assert_close(schedule(t).alpha, (-integral / 2).exp(), rtol=1e-11, atol=0)
        torch.testing.assert_close(schedule(t).sigma, sigma, rtol=1e-9, atol=1e-12)


def test_the_continuous_schedule_is_near_the_discrete_one_and_narrower_than_it():
    here, there = VP["linear"](torch.arange(1, 1001)), CONTINUOUS["vp continuous"](torch.arange(1, 1001))
    torch.testing.assert_close(here.sigma, there.sigma, rtol=0.05, atol=0)
    torch.testing.assert_close(here.alpha, there.alpha, rtol=0.05, atol=0)
    sub = CONTINUOUS["sub-vp"](torch.arange(1, 1001))
    torch.testing.assert_close(sub.sigma, there.sigma**2), torch.testing.assert_close(sub.alpha, there.alpha)


def test_the_geometric_ladder_is_continuous_time_ve():
    schedule, u = VE["ve"], torch.linspace(0, 1, 777, dtype=torch.float64)
    torch.testing.assert_close(schedule(1 + 999 * u).sigma, 0.01 * (50 / 0.01) ** u, rtol=1e-12, atol=0)


@between
def test_clean_at_zero_and_noisier_ever_after(name):
    alpha, sigma = ALL[name](real_times(ALL[name]))
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert ((sigma / alpha).diff() > 0).all()


@between
def test_time_of_inverts_lambda(name):
    schedule = ALL[name]
    t = real_times(schedule)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(schedule.time_of((alpha / sigma).log()), t, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.log_ratio(t), (alpha / sigma).log(), rtol=1e-12, atol=1e-12)
    assert schedule.time_of(math.inf) == 0
    lowest = schedule(schedule.num_timesteps)
    last = schedule.time_of(float((lowest.alpha / lowest.sigma).log()))
    assert last <= schedule.num_timesteps == pytest.approx(last, rel=1e-14)
    with pytest.raises(ValueError, match="below lambda_T"):
        schedule.time_of(-20.0)


@between
def test_a_level_is_float64_of_the_shape_of_the_time_whatever_its_type(name):
    schedule = ALL[name]
    for t in (3, 3.0, torch.tensor(3), torch.tensor([3, 3]), torch.tensor([[3.0]], dtype=torch.float32)):
        alpha, sigma = schedule(t)
        assert alpha.dtype == sigma.dtype == torch.float64
        assert alpha.shape == sigma.shape == torch.as_tensor(t).shape
        assert (sigma == schedule(3).sigma).all() and (alpha == schedule(3).alpha).all()


def test_one_level_is_a_schedule_too():
    schedule = vp_linear(1, 0.5, 0.5)
    assert float(schedule(1).alpha ** 2) == pytest.approx(0.5)
    assert schedule.time_of(0.0) == pytest.approx(1.0)
    assert float(schedule(0.5).sigma) == pytest.approx(0.5**1.5)
    assert float(ve_geometric(1, 0.1, 1.0)(1).sigma) == pytest.approx(0.1)


def test_the_prior_has_the_variance_of_noised_unit_data():
    assert VP["linear"].prior_std == pytest.approx(1, abs=1e-15)
    assert VE["ve"].prior_std == pytest.approx(math.sqrt(1 + 50**2))
    assert float(VE["ve"].std(1)) == pytest.approx(math.sqrt(1 + 1e-4))


@pytest.mark.parametrize("t", [-1e-9, 1000.0001, math.nan, math.inf, torch.tensor([1, 1001])])
def test_a_time_off_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match=r"outside \[0, 1000\]"):
        VP["linear"](t)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: vp_linear(0), "schedule.num_timesteps=0"),
        (lambda: vp_linear(10, 0.0, 0.1), "schedule.beta_start=0.0"),
        (lambda: vp_linear(10, 0.2, 0.1), "schedule.beta_end=0.1"),
        (lambda: vp_quadratic(10, 0.1, 1.0), "schedule.beta_end=1.0"),
        (lambda: vp_constant(10, -1.0), "schedule.beta=-1.0"),
        (lambda: vp_cosine(10, offset=0.0), "schedule.offset=0.0"),
        (lambda: vp_cosine(10, beta_max=1.0), "schedule.beta_max=1.0"),
        (lambda: ve_geometric(10, 2.0, 1.0), "schedule.sigma_min=2.0"),
        (lambda: ve_geometric(10, 0.01, math.inf), "schedule.sigma_max=inf"),
        (lambda: ve_geometric(0), "schedule.num_timesteps=0"),
        (lambda: vp_constant(1000, 0.999), "keep some signal"),
        (lambda: vp_continuous(0), "schedule.num_timesteps=0"),
        (lambda: vp_continuous(10, 0.0), "schedule.beta_min=0.0"),
        (lambda: sub_vp(10, 2.0, 1.0), "schedule.beta_max=1.0"),
        (lambda: sub_vp(10, 1.0, 4000.0), "schedule.beta_max=4000.0: no signal"),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_key(make, key):
    with pytest.raises(ValueError, match=key):
        make()


# ---- kernels ----

PAIRS = [(1, 0), (2, 1), (1000, 999), (1000, 1), (700.5, 0.25), (500, 500)]


@pytest.mark.parametrize("name", ["linear", "cosine", "ve", "sub-vp"])
@pytest.mark.parametrize("t, s", PAIRS)
def test_renoising_carries_the_marginal_at_s_to_that_at_t(name, t, s):
    schedule = ALL[name]
    alpha, sigma = transition(schedule, t, s)
    at_s, at_t = schedule(s), schedule(t)
    assert float(alpha * at_s.alpha) == pytest.approx(float(at_t.alpha), rel=1e-14)
    assert float((alpha * at_s.sigma) ** 2 + sigma**2) == pytest.approx(float(at_t.sigma**2), rel=1e-13)
    x, z = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(renoised(schedule, x, s, t, z), torch.stack([2 * alpha, 3 * sigma]))


@pytest.mark.parametrize("name", ["linear", "cosine", "ve", "sub-vp"])
@pytest.mark.parametrize("t, s", PAIRS)
def test_the_posterior_is_bayes_rule(name, t, s):
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0): precisions add, means are weighed by them."""
    if t == s or s == 0:
        kernel = posterior(ALL[name], t, s)
        expected = (1.0, 0.0, 0.0) if t == s else (0.0, 1.0, 0.0)
        assert [float(value) for value in kernel] == pytest.approx(expected, abs=1e-7)
        return
    schedule, kernel = ALL[name], posterior(ALL[name], t, s)
    (alpha_s, sigma_s), (alpha, sigma) = schedule(s), transition(schedule, t, s)
    precision = alpha**2 / sigma**2 + 1 / sigma_s**2
    assert float(kernel.std**-2) == pytest.approx(float(precision), rel=1e-10)
    assert float(kernel.x_t) == pytest.approx(float(alpha / sigma**2 / precision), rel=1e-10)
    assert float(kernel.x0) == pytest.approx(float(alpha_s / sigma_s**2 / precision), rel=1e-10)


def test_one_step_of_the_linear_schedule_gives_ddpms_own_coefficients():
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    t = torch.arange(2, 1001)
    kernel, forward = posterior(VP["linear"], t, t - 1), transition(VP["linear"], t, t - 1)
    b, now, before = beta[1:], bar[2:], bar[1:-1]
    np.testing.assert_allclose(forward.sigma**2, b, rtol=1e-9)
    np.testing.assert_allclose(forward.alpha**2, 1 - b, rtol=1e-12)
    np.testing.assert_allclose(kernel.x0, np.sqrt(before) * b / (1 - now), rtol=1e-9)
    np.testing.assert_allclose(kernel.x_t, np.sqrt(1 - b) * (1 - before) / (1 - now), rtol=1e-9)
    np.testing.assert_allclose(kernel.std**2, (1 - before) / (1 - now) * b, rtol=1e-9)


def test_a_kernel_towards_more_noise_is_refused():
    for kernel in (posterior, transition):
        with pytest.raises(ValueError, match="s must not be above t"):
            kernel(VP["linear"], 3, 4)


def test_noising_takes_one_time_or_one_per_image_and_keeps_the_dtype():
    x0, epsilon = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 500, 999, 1000])
    x_t = noised(VP["linear"], x0, t, epsilon)
    assert x_t.dtype == torch.float32
    for k, time in enumerate(t.tolist()):
        torch.testing.assert_close(x_t[k], noised(VP["linear"], x0, time, epsilon)[k], rtol=1e-6, atol=1e-7)


def test_a_tensor_of_times_is_never_looked_at():
    """On the meta device there are no values: whatever would make a host wait for its GPU raises here."""
    t = torch.ones(4, dtype=torch.int64, device="meta")
    images = torch.zeros(4, 3, 8, 8, device="meta")
    for schedule in (VP["linear"], VE["ve"], CONTINUOUS["sub-vp"]):
        assert schedule(t).alpha.device.type == "meta"
        assert noised(schedule, images, t, images).shape == images.shape
        assert schedule.time_of(schedule(t).alpha).shape == t.shape
