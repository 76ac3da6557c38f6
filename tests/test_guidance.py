"""Classifier-free guidance, on mixtures whose conditional scores are known."""

import math

import pytest
import torch

from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.guidance import ClassifierFree
from diffusion.process.grids import times
from diffusion.process.kernels import noised
from diffusion.process.schedule import sub_vp, ve_geometric, vp_linear
from diffusion.process.toy import Mixture
from diffusion.samplers.ddim import DDIM

SCHEDULES = {"vp": vp_linear(), "ve": ve_geometric(), "sub-vp": sub_vp()}
COVARIANCES = [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.1], [-0.1, 0.2]]]
TOY = Mixture([2, 1, 1], [[0.0, 1.0], [-1.0, 0.5], [1.0, -1.0]], covariances=COVARIANCES, classes=[0, 1, 1])
NULL = TOY.num_classes


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scale", [0, 0.5, 1, 3.0])
def test_the_guided_score_is_the_closed_form(schedule, scale):
    """grad log q(x) + scale * grad log q(y | x), by differentiating log densities."""
    labels = torch.arange(40) % 2
    for t in (1, 300, 1000):
        level = schedule(t)
        x = TOY.spread(level) * torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        x.requires_grad_()
        marginal = TOY.log_density(x, level)
        posterior = TOY.log_density(x, level, labels) - marginal
        (closed_form,) = torch.autograd.grad((marginal + scale * posterior).sum(), x)
        x = x.detach()
        x0, epsilon, _ = ClassifierFree(TOY.denoiser(schedule), scale, NULL)(x, t, labels)
        torch.testing.assert_close(-epsilon / level.sigma, closed_form, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(noised(schedule, x0, t, epsilon), x, rtol=1e-9, atol=1e-9)


class Counting:
    def __init__(self):
        self.calls = []

    def __call__(self, x, time_index, labels):
        self.calls.append((len(x), time_index.tolist(), labels.tolist()))
        return torch.cat([x * labels.reshape(-1, 1, 1, 1), 0.1 * labels.reshape(-1, 1, 1, 1) + 0 * x], dim=1)


@pytest.mark.parametrize("t", [5, torch.tensor([5, 6])])
def test_both_halves_go_through_the_network_at_once(t):
    network = Counting()
    guided = ClassifierFree(NetworkDenoiser(network, SCHEDULES["vp"]), 2.0, null_label=10)
    x = torch.ones(2, 1, 2, 2)
    prediction = guided(x, t, torch.tensor([3, 7]))
    index = [4.0, 5.0] if isinstance(t, torch.Tensor) else [4.0, 4.0]
    assert network.calls == [(4, index * 2, [3, 7, 10, 10])]
    assert prediction.epsilon[:, 0, 0, 0].tolist() == [10 + 2 * (3 - 10), 10 + 2 * (7 - 10)]
    assert prediction.variance[:, 0, 0, 0].tolist() == pytest.approx([0.65, 0.85]), "the conditional one"


def test_scale_one_is_the_conditional_denoiser_at_half_the_work():
    network = Counting()
    denoiser, x, labels = NetworkDenoiser(network, SCHEDULES["vp"]), torch.ones(2, 1, 2, 2), torch.tensor([3, 7])
    guided = ClassifierFree(denoiser, 1.0, null_label=10)(x, 5, labels)
    assert torch.equal(guided.epsilon, denoiser(x, 5, labels).epsilon)
    assert [size for size, _, _ in network.calls] == [2, 2]


def test_guidance_sharpens_what_is_sampled():
    """Of two overlapping classes, class 0 moves away from class 1; clipping holds x0 in the range of images."""
    schedule, toy, labels = SCHEDULES["vp"], Mixture([1, 1], [0.3, -0.3], stds=[0.3, 0.3]), torch.zeros(500).long()
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = []
    for scale in (1.0, 3.0):
        guided = ClassifierFree(toy.denoiser(schedule), scale, null_label=2)
        out = DDIM(schedule).sample(lambda x_t, t, g=guided: g(x_t, t, labels), x, times(1000, 50, "trailing"), None)
        means.append(float(out.mean()))
    assert means[0] == pytest.approx(0.3, abs=0.03) and means[1] > 0.5
    clipped = Clipped(ClassifierFree(toy.denoiser(schedule), 50.0, null_label=2), schedule)
    assert clipped(x, 700, labels).x0.abs().max() == 1


@pytest.mark.parametrize("scale", [-0.1, math.inf, math.nan])
def test_a_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"guidance.scale={scale}"):
        ClassifierFree(TOY.denoiser(SCHEDULES["vp"]), scale, NULL)


def test_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match="needs labels"):
        ClassifierFree(TOY.denoiser(SCHEDULES["vp"]), 2.0, NULL)(torch.zeros(3, 2), 5)
