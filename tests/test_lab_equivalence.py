"""One loss and one process under two names; and the words that the laboratory has for what it finds."""

from functools import partial

import pytest
import torch
from torch import nn

from diffusion.denoiser import NetworkDenoiser
from diffusion.lab.equivalence import losses, walk_both
from diffusion.lab.errors import Parts
from diffusion.lab.images import Candidate, Discretisation, Initialisation, Training
from diffusion.lab.initialisation import Bounds
from diffusion.lab.verdict import Walk, of_images, of_parts
from diffusion.models.mlp import MLP
from diffusion.process.grids import times
from diffusion.process.schedule import sub_vp, ve_geometric, vp_cosine, vp_linear
from diffusion.process.variables import Exploding
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.ddim import DDIM

SCHEDULES = {"vp": vp_linear(), "cosine": vp_cosine(), "ve": ve_geometric(), "sub-vp": sub_vp()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def network(num_classes=0):
    torch.manual_seed(0)
    made = MLP(channels=2, width=32, blocks=1, num_classes=num_classes)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def draws(dtype, num=32):
    generator = torch.Generator().manual_seed(1)
    x0, epsilon = torch.randn(2, num, 2, 1, 1, dtype=torch.float64, generator=generator).to(dtype)
    return x0, epsilon, torch.randint(1, 1001, (num,), generator=generator)


@on_all
@pytest.mark.parametrize("prediction", ["epsilon", "v", "scaled_score"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_ddpms_loss_and_its_gradient_are_those_of_score_matching(schedule, prediction, dtype, tolerance):
    for levels in (schedule, Exploding(schedule)):
        found = losses(network().to(dtype), levels, *draws(dtype), prediction=prediction)
        assert found.simple > 0 and found.loss_gap <= tolerance and found.gradient_gap <= tolerance


def test_labels_reach_the_network():
    x0, epsilon, t = draws(torch.float64)
    made = network(num_classes=3).double()
    one, other = (losses(made, SCHEDULES["vp"], x0, epsilon, t, torch.full((32,), k)) for k in (0, 1))
    assert one.simple != other.simple and one.loss_gap < 1e-12


@pytest.mark.parametrize("make", [Ancestral, DDIM, partial(AnnealedLangevin, step_size=0.2)])
def test_walks_of_vp_and_ve_are_the_same(make):
    schedule, grid = SCHEDULES["vp"], times(1000, 100)
    x = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise = NetworkDenoiser(network().double(), schedule)
    found = walk_both(make, denoise, schedule, x, grid, 0)
    assert found.times == grid[1:] and max(found.gaps) < 1e-9
    single = walk_both(make, NetworkDenoiser(network(), schedule), schedule, x.float(), grid, 0)
    assert 1e-9 < max(single.gaps) < 1e-4


def test_with_the_large_variance_they_are_not():
    schedule, grid = SCHEDULES["vp"], times(1000, 20)
    x = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise = NetworkDenoiser(network().double(), schedule)
    assert max(walk_both(partial(Ancestral, variance="large"), denoise, schedule, x, grid, 0).gaps) > 0.01


# ---- words ----

LOW_START = Walk(901, 10, 1000, trained=False)


@pytest.mark.parametrize(
    "parts, walk, dominant, words",
    [
        (Parts(0.01, 0.02, 0.5, 0.5), LOW_START, "discretisation", "sampler.num_steps=20"),
        (Parts(0.01, 0.02, 0.5, 0.5), Walk(1000, 800, 1000, True), "discretisation", "sampler.num_steps=1000"),
        (Parts(0.01, 0.02, 0.5, 0.5), Walk(1000, 1000, 1000, True), "discretisation", "All levels are visited already"),
        (Parts(0.5, 0.02, 0.1, 0.5), LOW_START, "initialisation", "sampler.spacing=trailing"),
        (Parts(0.5, 0.02, 0.1, 0.5), Walk(1000, 10, 1000, True), "initialisation", "means to train again"),
        (Parts(0.01, 0.2, 0.1, 0.2), LOW_START, "training", "train longer"),
        (Parts(0.0, 1e-16, 0.0, 0.0), LOW_START, "none", "no error above rounding"),
    ],
)
def test_the_verdict_on_known_errors(parts, walk, dominant, words):
    said = of_parts(parts, walk)
    assert said.dominant == dominant and words in " ".join(said.words)


def images(init, disc, low, high, quarter=(0.1, 0.2, 0.3, 0.1)):
    begun = Initialisation(901, Bounds(0.1, 0.2), init)
    short = Discretisation([10, 20, 40, 80], [disc, disc / 2, disc / 4], None, disc)
    tried = [
        Candidate("now", 10, 10, 0.1),
        Candidate("sampler.spacing=trailing", 10, 10, 0.09),
        Candidate("more", 20, 20, 0.04),
    ]
    return begun, short, Training([1], [], Bounds(low, high), list(quarter)), tried


@pytest.mark.parametrize(
    "errors, dominant, words",
    [
        ((0.01, 0.02, 0.1, 0.2), "training", ["even by the lower estimate", "third quarter of the noise levels"]),
        (
            (0.01, 0.5, 0.1, 0.2),
            "discretisation",
            ["also by the upper estimate of training", "change: more, at 2 times the work"],
        ),
        (
            (0.6, 0.5, 0.1, 0.2),
            "initialisation",
            ["also by the upper estimate of training", "sampler.spacing=trailing"],
        ),
        ((0.01, 0.02, 0.01, 0.9), "open", ["Training dominates, most likely", "then discretisation", "train longer"]),
        ((0.01, 0.3, 0.01, 0.9), "open", ["Training and discretisation cannot be told apart", "change: more"]),
    ],
)
def test_the_verdict_on_a_trained_model(errors, dominant, words):
    said = of_images(*images(*errors), LOW_START, unseen=True)
    text = " ".join(said.words).replace("when discretisation does", "then discretisation does")
    assert said.dominant == dominant and all(part in text for part in words), text
    assert "learned by heart" not in text
    assert "learned by heart" in " ".join(of_images(*images(*errors), LOW_START, unseen=False).words)


def test_where_no_setting_is_better_it_is_said():
    begun, short, learned, _ = images(0.01, 0.5, 0.1, 0.2)
    tried = [Candidate("now", 10, 10, 0.1), Candidate("other", 10, 10, 0.099)]
    said = of_images(begun, short, learned, tried, LOW_START, unseen=True)
    assert "None of the other settings" in " ".join(said.words)
    free = [Candidate("now", 10, 10, 0.1), Candidate("better", 10, 10, 0.02), Candidate("best", 20, 20, 0.01)]
    said = of_images(begun, short, learned, free, LOW_START, unseen=True)
    assert "The cheapest change: better, at no cost" in " ".join(said.words)
