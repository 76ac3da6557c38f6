"""The hub, the network's border, and clipping."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.process.kernels import noised
from diffusion.process.prediction import PREDICTIONS, prediction_kind
from diffusion.process.schedule import Prediction, ve_geometric, vp_cosine, vp_linear

SCHEDULES = {"linear": vp_linear(), "cosine": vp_cosine(), "ve": ve_geometric(), "short": vp_linear(7, 0.01, 0.4)}
everywhere = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_kind = pytest.mark.parametrize("kind", PREDICTIONS)


def pair(schedule, t, dtype=torch.float64, num=64):
    x0, epsilon = torch.randn(2, num, 1, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(3))
    return noised(schedule, x0, t, epsilon), x0, epsilon


def some_times(schedule):
    top = schedule.num_timesteps
    return [0.5, 1, 1.5, 2, top / 2, top - 0.7, top]


@everywhere
@every_kind
def test_there_and_back_is_the_identity(schedule, kind):
    """Errors are relative to the largest number on the way: x_t / alpha or x_t itself."""
    to_pair, from_pair, _ = PREDICTIONS[kind]
    for t in some_times(schedule):
        x_t, x0, epsilon = pair(schedule, t)
        output = from_pair(schedule, x_t, t, x0, epsilon)
        x0_again, epsilon_again = to_pair(schedule, x_t, t, output)
        scale = max(1.0, float((x_t / schedule(t).alpha).abs().max()))
        assert (x0_again - x0).abs().max() < 1e-12 * scale, t
        assert (epsilon_again - epsilon).abs().max() < 1e-12 * scale, t
        again = from_pair(schedule, x_t, t, x0_again, epsilon_again)
        assert (again - output).abs().max() <= 1e-12 * max(1.0, float(output.abs().max())), t


@everywhere
@every_kind
def test_any_output_becomes_a_pair_of_x_t(schedule, kind):
    for t in some_times(schedule):
        x_t, output, _ = pair(schedule, t)
        x0, epsilon = PREDICTIONS[kind].to_pair(schedule, x_t, t, output)
        error = (noised(schedule, x0, t, epsilon) - x_t).abs().max()
        assert error < 1e-12 * max(1.0, float(x0.abs().max()), float(schedule(t).sigma * epsilon.abs().max())), t


@every_kind
def test_one_time_per_image_is_the_same_as_one_by_one(kind):
    schedule, t = SCHEDULES["linear"], torch.tensor([1, 2, 500, 1000])
    x_t, x0, epsilon = pair(schedule, t, num=4)
    together = PREDICTIONS[kind].from_pair(schedule, x_t, t, x0, epsilon)
    for k, time in enumerate(t.tolist()):
        alone = PREDICTIONS[kind].from_pair(schedule, x_t[k : k + 1], time, x0[k : k + 1], epsilon[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-14, atol=1e-14)


def test_the_published_forms_of_v_score_and_mu():
    schedule, beta = SCHEDULES["linear"], np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    for t in (2, 300, 1000):
        x_t, x0, epsilon = pair(schedule, t)
        a, s = bar[t - 1] ** 0.5, (1 - bar[t - 1]) ** 0.5
        v = PREDICTIONS["v"].from_pair(schedule, x_t, t, x0, epsilon)
        torch.testing.assert_close(v, a * epsilon - s * x0, rtol=0, atol=1e-12)
        score = PREDICTIONS["score"].from_pair(schedule, x_t, t, x0, epsilon)
        torch.testing.assert_close(score, -(x_t - a * x0) / (1 - bar[t - 1]), rtol=1e-9, atol=1e-9)
        mu = PREDICTIONS["mu"].from_pair(schedule, x_t, t, x0, epsilon)  # Ho et al. 2020, eq. 11
        torch.testing.assert_close(mu, (x_t - beta[t - 1] / s * epsilon) / (1 - beta[t - 1]) ** 0.5, rtol=0, atol=1e-11)
    x_t, x0, epsilon = pair(schedule, 1)
    assert torch.equal(PREDICTIONS["mu"].from_pair(schedule, x_t, 1, x0, epsilon), x0)


@everywhere
@pytest.mark.parametrize("kind", ["epsilon", "x0", "v", "score"])
def test_float32_stays_float32_and_loses_no_more_than_the_signal_to_noise_ratio(schedule, kind):
    for t in some_times(schedule):
        x_t, x0, epsilon = pair(schedule, t, torch.float32)
        got = PREDICTIONS[kind].to_pair(schedule, x_t, t, PREDICTIONS[kind].from_pair(schedule, x_t, t, x0, epsilon))
        alpha, sigma = (float(value) for value in schedule(t))
        assert got[0].dtype == got[1].dtype == torch.float32
        assert alpha * (got[0] - x0).abs().max() < 3e-6 * (alpha + sigma)
        assert sigma * (got[1] - epsilon).abs().max() < 3e-6 * (alpha + sigma)


def test_an_unknown_kind_is_refused_by_its_key():
    with pytest.raises(
        ValueError, match="objective.prediction=noise must be one of epsilon, x0, v, score, scaled_score, mu"
    ):
        prediction_kind("noise")


# ---- networks ----


class Recorder:
    """A network that notes what it is fed and answers with a fixed multiple of it."""

    def __init__(self, channels=1):
        self.channels, self.calls = channels, []

    def __call__(self, x, time_index, labels):
        self.calls.append((x, time_index, labels))
        return torch.cat([0.5 * x] * self.channels, dim=1)


@pytest.mark.parametrize("t, index", [(1, 0.0), (1000, 999.0), (2.5, 1.5), (0.25, 0.0)])
def test_networks_count_time_from_zero(t, index):
    network = Recorder()
    denoiser, x = NetworkDenoiser(network, SCHEDULES["linear"]), torch.ones(3, 1, 2, 2)
    denoiser(x, t)
    denoiser(x, torch.full((3,), float(t)))
    denoiser(x, torch.tensor(float(t)))
    for _, time_index, labels in network.calls:
        assert time_index.dtype == torch.float32 and time_index.tolist() == [index] * 3 and labels is None


@pytest.mark.parametrize("name", ["linear", "ve"])
def test_networks_see_unit_variance_for_unit_data(name):
    schedule, network = SCHEDULES[name], Recorder()
    x0, epsilon = torch.randn(2, 20_000, 1, 1, 1, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([1, 400, 1000]).repeat_interleave(20_000)
    x_t = noised(schedule, x0.repeat(3, 1, 1, 1), t, epsilon.repeat(3, 1, 1, 1))
    NetworkDenoiser(network, schedule).output(x_t, t)
    fed = network.calls[0][0]
    assert fed.reshape(3, -1).std(1) == pytest.approx([1, 1, 1], abs=0.02)
    assert name == "ve" or torch.equal(fed, x_t)


@every_kind
@everywhere
def test_the_denoiser_reads_its_networks_kind(schedule, kind):
    def network(x, time_index, labels):
        return PREDICTIONS[kind].from_pair(schedule, x_t, t, x0, epsilon)

    t = schedule.num_timesteps // 2
    x_t, x0, epsilon = pair(schedule, t)
    prediction = NetworkDenoiser(network, schedule, kind)(x_t, t)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(prediction.epsilon, epsilon, rtol=0, atol=1e-10)
    assert prediction.variance is None


def test_low_precision_ends_at_the_networks_output():
    convolution = torch.nn.Conv2d(1, 1, 1)
    denoiser, x = NetworkDenoiser(lambda x, t, labels: convolution(x), SCHEDULES["linear"]), torch.ones(2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolution(x).dtype == torch.bfloat16
        prediction = denoiser(x, 500)
    assert denoiser.output(x, 500).dtype == prediction.x0.dtype == prediction.epsilon.dtype == torch.float32


def test_a_second_half_of_channels_is_the_learned_variance():
    def network(x, time_index, labels):
        return torch.cat([0 * x, torch.linspace(-1, 1, len(x)).reshape(-1, 1, 1, 1).expand_as(x)], dim=1)

    prediction = NetworkDenoiser(network, SCHEDULES["linear"])(torch.ones(3, 2, 2, 2), 10)
    assert prediction.variance[:, 0, 0, 0].tolist() == [0, 0.5, 1] and prediction.x0.shape == (3, 2, 2, 2)


def test_labels_reach_the_network_also_when_bound():
    network, labels = Recorder(), torch.tensor([3, 7])
    denoiser = NetworkDenoiser(network, SCHEDULES["linear"])
    partial(denoiser, labels=labels)(torch.ones(2, 1, 2, 2), 5)
    assert network.calls[0][2] is labels


def test_clipping_clips_x0_and_derives_epsilon_again():
    schedule = SCHEDULES["linear"]
    x0 = torch.tensor([-3.0, -0.2, 0.9, 1.7], dtype=torch.float64).reshape(1, 1, 2, 2)
    x_t, _, _ = pair(schedule, 600, num=1)

    def denoise(x_t, t, labels=None):
        return Prediction(*PREDICTIONS["x0"].to_pair(schedule, x_t, t, x0), variance=x0)

    free, clipped = denoise(x_t, 600), Clipped(denoise, schedule)(x_t, 600)
    assert clipped.x0.flatten().tolist() == [-1.0, -0.2, 0.9, 1.0] and clipped.variance is x0
    torch.testing.assert_close(noised(schedule, clipped.x0, 600, clipped.epsilon), x_t, rtol=0, atol=1e-14)
    same = (clipped.epsilon == free.epsilon).flatten().tolist()
    assert same == [False, True, True, False]
    narrow = Clipped(denoise, schedule, low=0.0, high=0.5)(x_t, 600).x0
    assert narrow.min() == 0.0 and narrow.max() == 0.5


def test_a_bad_prediction_is_refused_when_built():
    with pytest.raises(ValueError, match="objective.prediction"):
        NetworkDenoiser(Recorder(), SCHEDULES["linear"], "eps")


def test_the_score_of_unit_noise_at_the_top_is_minus_x():
    """Data at 0: x_T is sigma_T epsilon, so the score is -x / sigma_T^2."""
    schedule = SCHEDULES["ve"]
    x_t = 50 * torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    score = PREDICTIONS["score"].from_pair(schedule, x_t, 1000, 0 * x_t, x_t / 50)
    torch.testing.assert_close(score, -x_t / 2500)
    assert math.isclose(float(schedule(1000).sigma), 50)
