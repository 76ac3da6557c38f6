"""Which noise levels are trained on, what they weigh, and EDM's preconditioning."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import inside

from diffusion.noise import Stream, keys
from diffusion.objective import DSM, Bound, Hybrid, Simple
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import ve_geometric, vp_cosine, vp_linear
from diffusion.training.levels import LogNormal, Uniform

SCHEDULES = pytest.mark.parametrize(
    "schedule", [vp_linear(1000), vp_cosine(1000), ve_geometric(1000, 0.002, 80.0)], ids=["linear", "cosine", "ve"]
)


@SCHEDULES
def test_lambda_is_normal_within_the_ends_of_the_schedule(schedule):
    levels = LogNormal(schedule, mean=1.2, std=1.2)
    t = levels.draw(keys(torch.arange(20_000), 0, Stream.TIME))
    assert t.dtype == torch.float64 and (t >= 1).all() and (t <= 1000).all()
    low, high = (float(schedule.log_ratio(end)) for end in (1000, 1))
    law = scipy.stats.truncnorm((low - 1.2) / 1.2, (high - 1.2) / 1.2, loc=1.2, scale=1.2)
    assert scipy.stats.kstest(schedule.log_ratio(t).numpy(), law.cdf).pvalue > 1e-3


def test_uniform_is_every_level_alike():
    t = Uniform(vp_linear(10)).draw(keys(torch.arange(20_000), 0, Stream.TIME))
    assert t.dtype == torch.int64 and scipy.stats.chisquare(np.bincount(t.numpy())[1:]).pvalue > 1e-3


@SCHEDULES
def test_min_snr_weights_are_their_formulas(schedule):
    """Hang et al. 2023: of epsilon min(SNR, 5) / SNR, of x0 min(SNR, 5), of v min(SNR, 5) / (SNR + 1) under VP."""
    t = torch.tensor([1, 10, 300, 600, 1000])
    alpha, sigma = schedule(t)
    snr = (alpha / sigma) ** 2
    least = snr.clamp(max=5.0)
    wanted = {"epsilon": least / snr, "scaled_score": least / snr, "x0": least, "score": least / snr * sigma**2}
    wanted["v"] = least / ((alpha**2 + sigma**2) ** 2 / sigma**2)
    for prediction, weight in wanted.items():
        found = Uniform(schedule, weight="min_snr").weight_at(t, Simple(schedule, prediction))
        torch.testing.assert_close(found, weight, rtol=1e-12, atol=0)
    assert Uniform(schedule).weight_at(t, Simple(schedule)) is None
    if float(alpha[-1] ** 2 + sigma[-1] ** 2) == pytest.approx(1):
        torch.testing.assert_close(wanted["v"], least / (snr + 1), rtol=1e-9, atol=0)


@SCHEDULES
@pytest.mark.parametrize(
    "objective", [partial(Simple, prediction="v"), DSM, partial(DSM, prediction="v"), partial(DSM, weight="one")],
    ids=["simple", "score", "dsm of v", "score, unweighted"],
)  # fmt: skip
def test_with_min_snr_the_error_of_x0_weighs_the_same_whatever_the_objective(schedule, objective):
    """The loss itself, of outputs whose x0 is wrong by 1 in each pixel: min(SNR, 5)."""
    objective, t = objective(schedule), torch.tensor([1, 10, 300, 600, 1000])
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule(t))
    x0, epsilon = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = alpha * x0 + sigma * epsilon
    output = PREDICTIONS[objective.prediction].from_pair(schedule, x_t, t, x0 + 1, epsilon - alpha / sigma)
    loss = Uniform(schedule, weight="min_snr").weight_at(t, objective) * objective(output, x_t, x0, epsilon, t)
    torch.testing.assert_close(loss, ((alpha / sigma) ** 2).clamp(max=5.0).view(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", [Bound, Hybrid])
def test_min_snr_of_a_loss_with_other_parts_is_refused_when_the_run_is_built(objective):
    schedule = vp_linear(10)
    with pytest.raises(ValueError, match="levels.weight=min_snr cannot be used .*levels.weight=one"):
        Uniform(schedule, weight="min_snr").weight_at(torch.tensor([1]), objective(schedule))


@SCHEDULES
def test_the_preconditioning_of_edm_there_and_back(schedule):
    kind, generator = PREDICTIONS["edm"], torch.Generator().manual_seed(0)
    x0, epsilon = torch.randn(2, 50, 3, 4, 4, dtype=torch.float64, generator=generator)
    for t in (1, 250.5, 1000, torch.linspace(1, 1000, 50, dtype=torch.float64)):
        alpha, sigma = (value.reshape(-1, *[1] * (3 * value.ndim)) for value in schedule(t))
        x_t = alpha * x0 + sigma * epsilon
        output = kind.from_pair(schedule, x_t, t, x0, epsilon)
        back = kind.to_pair(schedule, x_t, t, output)
        assert float((back[0] - x0).abs().max()) < 1e-12 * max(1, float((sigma / alpha).max()))
        assert float((back[1] - epsilon).abs().max() * (sigma / alpha).min()) < 1e-12 * max(
            1, float((sigma / alpha).max())
        )


def test_the_preconditioning_is_the_papers():
    """Karras et al. 2022, table 1, at sigma = 3: the target of the network is (x0 - c_skip x) / c_out."""
    schedule, sigma = ve_geometric(1000, 0.002, 80.0), 3.0
    t = schedule.time_of(-math.log(sigma))
    x0, x = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64)
    skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    target = PREDICTIONS["edm"].from_pair(schedule, x, t, x0, (x - x0) / sigma)
    assert float(target) == pytest.approx((0.5 - skip * 4) / out, rel=1e-9)
    assert float(PREDICTIONS["edm"].input_std(schedule, t)) == pytest.approx(math.sqrt(sigma**2 + 0.25), rel=1e-9)


def test_the_loss_of_edm_is_the_papers():
    """lambda(sigma) |D - x0|^2, lambda = (sigma^2 + s^2) / (sigma s)^2, is the plain error of the network's output."""
    schedule = ve_geometric(1000, 0.002, 80.0)
    t, generator = torch.tensor([1.0, 400.0, 900.0]), torch.Generator().manual_seed(0)
    x0, epsilon, output = torch.randn(3, 3, 2, dtype=torch.float64, generator=generator)
    sigma = schedule(t).sigma[:, None]
    x_t = x0 + sigma * epsilon
    denoised = PREDICTIONS["edm"].to_pair(schedule, x_t, t, output)[0]
    wanted = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (denoised - x0) ** 2).mean(1)
    torch.testing.assert_close(Simple(schedule, "edm")(output, x_t, x0, epsilon, t), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("words", [
    ["objective=edm", "levels=log_normal", "schedule=ve_geometric", "schedule.sigma_min=.002", "schedule.sigma_max=80"],
    ["objective=v", "levels.weight=min_snr"],
    ["objective=edm", "levels=log_normal", "model.time_embedding=fourier"],
])  # fmt: skip
def test_digits_are_trained_and_sampled(words, digits, tmp_path):
    plain = ["trainer=cpu", "callbacks=none", "data.batch_size=16", "log_every=5", f"data.root={digits}", "run_dir=run"]
    assert inside("train", [*words, *plain, "trainer.max_steps=20", "lr_schedule.warmup_steps=5"], tmp_path) == 0
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert float(rows[-1][1]) < float(rows[1][1])
    assert inside("sample", ["checkpoint=run", "num_images=4", "sampler.num_steps=3", "out=s"], tmp_path) == 0


def test_the_terms_of_the_bound_are_of_whole_levels(command_inside):
    done = command_inside("train", "objective=bound", "levels=log_normal", check=2)
    assert "Give levels=uniform" in done.stderr
