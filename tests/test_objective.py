"""The losses: what equals what, and what each weighs."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion.denoiser import NetworkDenoiser
from diffusion.objective import DSM, Bound, Simple
from diffusion.process.kernels import noised, posterior, transition
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import ve_geometric, vp_cosine, vp_linear
from diffusion.process.toy import Gaussian

SCHEDULES = {"linear": vp_linear(), "cosine": vp_cosine(), "ve": ve_geometric()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_kind = pytest.mark.parametrize("kind", PREDICTIONS)
TIMES = torch.tensor([1, 2, 3, 40, 500, 999, 1000])


def batch(schedule, t=TIMES, dtype=torch.float64, seed=0):
    x0, epsilon, wrong = torch.randn(3, len(t), 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return noised(schedule, x0, t, epsilon), x0, epsilon, epsilon + 0.1 * wrong


def output_of(kind, schedule, x_t, t, epsilon):
    """The output of this kind that says epsilon."""
    x0, _ = PREDICTIONS["epsilon"].to_pair(schedule, x_t, t, epsilon)
    return PREDICTIONS[kind].from_pair(schedule, x_t, t, x0, epsilon)


@on_all
def test_simple_is_the_mean_squared_error_of_epsilon_per_image(schedule):
    x_t, x0, epsilon, guess = batch(schedule)
    loss = Simple(schedule)(guess, x_t, x0, epsilon, TIMES)
    torch.testing.assert_close(loss, torch.stack([((a - b) ** 2).mean() for a, b in zip(guess, epsilon, strict=True)]))


@on_all
@every_kind
def test_no_loss_without_an_error(schedule, kind):
    x_t, x0, epsilon, _ = batch(schedule)
    output = PREDICTIONS[kind].from_pair(schedule, x_t, TIMES, x0, epsilon)
    for objective in (Simple(schedule, kind), Bound(schedule, kind), DSM(schedule, kind)):
        loss = objective(output, x_t, x0, epsilon, TIMES)
        assert loss.shape == TIMES.shape and loss.abs().max() == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["linear", "ve"])
def test_score_matching_weighed_by_sigma2_is_l_simple_in_loss_and_gradient(name, dtype, tolerance):
    """sigma^2 ||s + epsilon / sigma||^2 = ||epsilon_theta - epsilon||^2 with s = -epsilon_theta / sigma."""
    schedule = SCHEDULES[name]
    x_t, x0, epsilon, guess = batch(schedule, dtype=dtype)
    guess.requires_grad_()
    score = -guess / schedule(TIMES).sigma.to(dtype).reshape(-1, 1, 1, 1)
    losses = Simple(schedule)(guess, x_t, x0, epsilon, TIMES), DSM(schedule)(score, x_t, x0, epsilon, TIMES)
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
    (simple,) = torch.autograd.grad(losses[0].sum(), guess, retain_graph=True)
    (matched,) = torch.autograd.grad(losses[1].sum(), guess)
    assert (matched - simple).abs().max() < tolerance * simple.abs().max()


@on_all
@pytest.mark.parametrize("weight", ["sigma2", "one", lambda level: level.alpha * level.sigma])
def test_score_matching_is_the_weighed_squared_error_of_the_score(schedule, weight):
    x_t, x0, epsilon, guess = batch(schedule)
    alpha, sigma = schedule(TIMES)
    wide = sigma.reshape(-1, 1, 1, 1)
    error = ((guess / wide - epsilon / wide) ** 2).flatten(1).mean(1)
    expected = {"sigma2": sigma**2, "one": torch.ones_like(sigma)}.get(weight, alpha * sigma) * error
    for kind in PREDICTIONS:
        output = output_of(kind, schedule, x_t, TIMES, guess)
        loss = DSM(schedule, kind, weight)(output, x_t, x0, epsilon, TIMES)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


@on_all
@every_kind
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_is_the_kl_of_the_two_gaussians(schedule, kind, variance):
    t = TIMES[1:]
    x_t, x0, epsilon, guess = batch(schedule, t)
    loss = Bound(schedule, kind, variance)(output_of(kind, schedule, x_t, t, guess), x_t, x0, epsilon, t)
    for k, time in enumerate(t.tolist()):
        kernel = posterior(schedule, time, time - 1)
        said, _ = PREDICTIONS["epsilon"].to_pair(schedule, x_t[k], time, guess[k])
        std = kernel.std if variance == "small" else transition(schedule, time, time - 1).sigma
        q = Normal(kernel.x_t * x_t[k] + kernel.x0 * x0[k], kernel.std)
        p = Normal(kernel.x_t * x_t[k] + kernel.x0 * said, std)
        assert float(loss[k]) == pytest.approx(float(kl_divergence(q, p).mean()), rel=1e-6)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_weighs_epsilon_as_the_paper_does(variance):
    """beta^2 / (2 var alpha (1 - alpha_bar)), alpha = 1 - beta; at t = 1 the code's variance, beta tilde of t = 2."""
    schedule, beta = SCHEDULES["linear"], np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    tilde = np.concatenate([[0], (1 - bar[:-1]) / (1 - bar[1:]) * beta[1:]])
    tilde[0] = tilde[1]
    var = tilde if variance == "small" else np.concatenate([[tilde[1]], beta[1:]])
    weight = torch.tensor(beta**2 / (2 * var * (1 - beta) * (1 - bar)))[TIMES - 1]
    x_t, x0, epsilon, guess = batch(schedule)
    error = ((guess - epsilon) ** 2).flatten(1).mean(1)
    objective = Bound(schedule, "epsilon", variance)
    floor = objective(epsilon, x_t, x0, epsilon, TIMES)
    torch.testing.assert_close(objective(guess, x_t, x0, epsilon, TIMES) - floor, weight * error, rtol=1e-8, atol=1e-12)
    assert floor[0] == 0 and (floor[1:] > 0).all() == (variance == "large")


@on_all
def test_a_loss_is_of_its_own_image_alone(schedule):
    x_t, x0, epsilon, guess = batch(schedule)
    for objective in (Simple(schedule), Bound(schedule), DSM(schedule, "epsilon")):
        together = objective(guess, x_t, x0, epsilon, TIMES)
        for k in range(len(TIMES)):
            row = slice(k, k + 1)
            alone = objective(guess[row], x_t[row], x0[row], epsilon[row], float(TIMES[k]))
            torch.testing.assert_close(alone, together[row], rtol=1e-12, atol=0)


@on_all
@every_kind
def test_the_exact_denoiser_has_the_least_expected_loss(schedule, kind):
    """Moved by any constant, the exact answer loses; common random numbers."""
    toy, num = Gaussian(0.3, 0.5), 20_000
    generator = torch.Generator().manual_seed(2)
    x0 = toy.sample(num, generator)[:, None]
    epsilon = torch.randn(num, 1, dtype=torch.float64, generator=generator)
    t = 400
    x_t = noised(schedule, x0, t, epsilon)
    pair = toy.denoiser(schedule)(x_t, t)
    best = PREDICTIONS[kind].from_pair(schedule, x_t, t, pair.x0, pair.epsilon)
    for objective in (Simple(schedule, kind), Bound(schedule, kind), DSM(schedule, kind)):
        size = float((best - PREDICTIONS[kind].from_pair(schedule, x_t, t, x0, epsilon)).std())
        least = objective(best, x_t, x0, epsilon, t).mean()
        for shift in (-0.2, 0.2):
            assert objective(best + shift * size, x_t, x0, epsilon, t).mean() > least


@every_kind
def test_a_training_step_in_float32_gives_finite_losses_and_gradients(kind):
    for schedule in SCHEDULES.values():
        convolution = torch.nn.Conv2d(3, 3, 1)
        denoiser = NetworkDenoiser(lambda x, t, labels, layer=convolution: layer(x), schedule, kind)
        x_t, x0, epsilon, _ = batch(schedule, dtype=torch.float32)
        for objective in (Simple(schedule, kind), Bound(schedule, kind), DSM(schedule, kind)):
            loss = objective(denoiser.output(x_t, TIMES), x_t, x0, epsilon, TIMES)
            assert loss.dtype == torch.float32 and loss.shape == TIMES.shape and loss.isfinite().all()
            loss.mean().backward()
            assert convolution.weight.grad.isfinite().all()


@on_all
@every_kind
def test_a_training_step_never_looks_at_a_value(schedule, kind):
    """On the meta device there are no values: whatever would make a host wait for its GPU raises here."""
    t = torch.ones(4, dtype=torch.int64, device="meta")
    x0 = torch.zeros(4, 3, 8, 8, device="meta")
    x_t = noised(schedule, x0, t, x0)
    output = NetworkDenoiser(lambda x, t, labels: x, schedule, kind).output(x_t, t)
    for objective in (Simple(schedule, kind), Bound(schedule, kind, "large"), DSM(schedule, kind)):
        assert objective(output, x_t, x0, x0, t).shape == (4,)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: Simple(s, "noise"), "objective.prediction=noise"),
        (lambda s: Bound(s, "epsilon", "learned"), "objective.variance=learned"),
        (lambda s: DSM(s, "score", "sigma"), "objective.weight=sigma is none of sigma2, one"),
        (lambda s: Bound(vp_linear(1)), "schedule.num_timesteps=1"),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_key(make, message):
    with pytest.raises(ValueError, match=message):
        make(SCHEDULES["linear"])
