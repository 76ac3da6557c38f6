"""Networks of the score-based family: their conditioning value, their scaled output, networks for vectors."""

import math

import pytest
import torch

from diffusion.denoiser import NetworkDenoiser
from diffusion.models.embedding import FourierEmbedding
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet
from diffusion.objective import DSM, Simple
from diffusion.process.kernels import noised
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import sub_vp, ve_geometric, vp_linear
from diffusion.process.toy import modes
from diffusion.process.variables import Exploding

SCHEDULES = {"vp": vp_linear(), "ve": ve_geometric(232, 0.02, 100.0), "sub-vp": sub_vp()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
SMALL = dict(image_size=8, channels=1, width=32, multipliers=(1, 2), attention_resolutions=(4,))


def ordinary(network, seed=0):
    """None of the paper's zeros, so that every weight has a say in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    return network


# ---- the conditioning value of a network ----


@on_all
@pytest.mark.parametrize("make", [lambda **k: UNet(**SMALL, **k), lambda **k: MLP(1, 8, **k)], ids=["unet", "mlp"])
def test_the_conditioning_value_is_the_time_or_the_noise_as_the_embedding_needs(schedule, make):
    heard, x, top = [], torch.randn(3, 1, 8, 8), schedule.num_timesteps
    t = torch.tensor([0.5, 1.0, top])
    for kind in ("positional", "fourier"):
        network = make(time_embedding=kind)
        network.time.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
        denoiser = NetworkDenoiser(network, schedule)
        denoiser.output(x, t)
        for time in t.tolist():
            denoiser.output(x, time)
    index, noise = heard[0], heard[4]
    assert index.tolist() == [0, 0, top - 1]
    level = schedule(t.clamp(min=1))
    torch.testing.assert_close(noise.double(), (level.sigma / level.alpha).log(), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(alone, index[k].expand(3)) for k, alone in enumerate(heard[1:4]))
    assert all(torch.equal(alone, noise[k].expand(3)) for k, alone in enumerate(heard[5:8]))
    assert index.dtype == noise.dtype == torch.float32


@on_all
def test_a_network_conditioned_on_the_noise_cannot_distinguish_vp_from_ve(schedule):
    """Its input and its conditioning value are the same in both variables, so its prediction is too."""
    network = ordinary(UNet(**SMALL, time_embedding="fourier", fourier_scale=1.0)).eval()
    twin, t = Exploding(schedule), 0.4 * schedule.num_timesteps
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here = NetworkDenoiser(network, schedule)(x, t)
        there = NetworkDenoiser(network, twin)((x / schedule(t).alpha).float(), t)
    torch.testing.assert_close(here.epsilon, there.epsilon, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(here.x0, there.x0, rtol=1e-3, atol=1e-3)


def test_fourier_features_are_sines_of_fixed_random_frequencies():
    torch.manual_seed(0)
    embedding = FourierEmbedding(1000, scale=16.0)
    assert embedding.frequencies.std() == pytest.approx(16, rel=0.1)
    assert "frequencies" in embedding.state_dict() and "frequencies" not in dict(embedding.named_parameters())
    fed = []
    embedding.dense_1.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    log_sigma = torch.tensor([0.3, -1.2])
    embedding(log_sigma)
    angle = 2 * math.pi * log_sigma[:, None].double() * embedding.frequencies.double()
    torch.testing.assert_close(fed[0].double(), torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", [lambda **k: UNet(**SMALL, **k), lambda **k: MLP(**k)], ids=["unet", "mlp"])
def test_a_wrong_embedding_is_refused_by_name(make):
    with pytest.raises(ValueError, match="model.time_embedding=sinus must be one of positional, fourier"):
        make(time_embedding="sinus")
    with pytest.raises(ValueError, match="model.fourier_scale=0"):
        make(time_embedding="fourier", fourier_scale=0)


# ---- DSM is L_simple ----


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_score_network_has_ddpms_loss_and_gradient_on_the_same_draws(name):
    """To 1e-6, in float32, at every weight: sigma^2 DSM of the score -net / sigma, and L_simple of the noise net."""
    schedule, network = SCHEDULES[name], ordinary(UNet(**SMALL, time_embedding="fourier", fourier_scale=1.0))
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1, schedule.num_timesteps + 1, (16,), generator=generator)
    x0, epsilon = torch.randn(2, 16, 1, 8, 8, generator=generator)
    x_t = noised(schedule, x0, t, epsilon)
    simple, matching = Simple(schedule, "epsilon"), DSM(schedule, "scaled_score")

    def loss_and_gradients(loss):
        network.zero_grad()
        loss.mean().backward()
        return loss.detach(), [p.grad.clone() for p in network.parameters()]

    output = NetworkDenoiser(network, schedule).output(x_t, t)
    one, one_gradients = loss_and_gradients(simple(output, x_t, x0, epsilon, t))
    output = NetworkDenoiser(network, schedule, "scaled_score").output(x_t, t)
    two, two_gradients = loss_and_gradients(matching(-output, x_t, x0, epsilon, t))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    for a, b in zip(one_gradients, two_gradients, strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 1e-6 * a.abs().max()


@on_all
def test_the_scaled_score_is_the_score_times_sigma(schedule):
    x_t, output = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (1, schedule.num_timesteps):
        by_scaled = PREDICTIONS["scaled_score"].to_pair(schedule, x_t, t, output)
        by_score = PREDICTIONS["score"].to_pair(schedule, x_t, t, output / schedule(t).sigma)
        torch.testing.assert_close(by_scaled, by_score)


# ---- vectors ----


def test_a_vector_is_an_image_of_one_pixel_to_the_mlp():
    network = ordinary(MLP(channels=3, width=32, num_classes=4))
    x, values, labels = torch.randn(5, 3), torch.linspace(0, 999, 5), torch.arange(5)
    flat = network(x, values, labels)
    assert flat.shape == (5, 3) and torch.equal(network(x[..., None, None], values, labels)[..., 0, 0], flat)
    assert torch.equal(network(x, values), network(x, values, torch.full((5,), 4))) and network.null_label == 4
    assert not torch.allclose(network(x, values, labels), network(x, values, (labels + 1) % 4))
    assert not torch.allclose(network(x, values, labels), network(x, values + 100, labels))
    assert MLP(channels=3, width=32, out_channels=6)(x, values).shape == (5, 6)
    assert MLP(channels=1, image_size=8, width=32)(torch.randn(2, 1, 8, 8), values[:2]).shape == (2, 1, 8, 8)


def test_an_untrained_mlp_answers_with_nearly_nothing():
    assert MLP()(torch.randn(64, 2), torch.zeros(64)).abs().max() < 1e-3


@pytest.mark.parametrize("wrong, key", [(dict(width=20), "model.width=20"), (dict(blocks=0), "model.blocks=0")])
def test_wrong_sizes_are_refused_by_name(wrong, key):
    with pytest.raises(ValueError, match=key):
        MLP(**wrong)


def test_an_mlp_learns_the_exact_denoiser():
    """200 steps on the eight modes, at one noise level: the excess falls below a tenth of what nobody can know."""
    schedule, toy, t = vp_linear(), modes(), 300
    torch.manual_seed(0)
    network, generator = MLP(width=64, blocks=2), torch.Generator().manual_seed(1)
    denoiser, objective = NetworkDenoiser(network, schedule, "v"), Simple(schedule, "v")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    def draw(num):
        x0, epsilon = toy.sample(num, generator).float(), torch.randn(num, 2, generator=generator)
        return noised(schedule, x0, t, epsilon), x0, epsilon

    for _ in range(200):
        x_t, x0, epsilon = draw(512)
        optimizer.zero_grad()
        objective(denoiser.output(x_t, t), x_t, x0, epsilon, t).mean().backward()
        optimizer.step()
    x_t, x0, epsilon = draw(20_000)
    exact = toy.denoiser(schedule)(x_t, t)
    best = PREDICTIONS["v"].from_pair(schedule, x_t, t, exact.x0, exact.epsilon)
    irreducible = objective(best, x_t, x0, epsilon, t).mean()
    with torch.no_grad():
        excess = ((denoiser.output(x_t, t) - best) ** 2).mean()
    assert excess < 0.1 * irreducible
