"""The losses: what equals what, and what each weighs."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion.denoiser import NetworkDenoiser
from diffusion.objective import DSM, Bound, Hybrid, Simple
from diffusion.process.bound import decoder_nll
from diffusion.process.kernels import noised, posterior, transition
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.schedule import ve_geometric, vp_cosine, vp_linear
from diffusion.process.toy import Gaussian

SCHEDULES = {"linear": vp_linear(), "cosine": vp_cosine(), "ve": ve_geometric()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_kind = pytest.mark.parametrize("kind", PREDICTIONS)
TIMES = torch.tensor([1, 2, 3, 40, 500, 999, 1000])


BIT = math.log(2)


def batch(schedule, t=TIMES, dtype=torch.float64, seed=0):
    """x0 on uint8 levels, the two outermost among them, and a guess at epsilon that is somewhat wrong."""
    x0, epsilon, wrong = torch.randn(3, len(t), 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert x0.min() == -1 and x0.max() == 1
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
    """The bound's first term is a probability's logarithm, which no prediction makes 0."""
    x_t, x0, epsilon, _ = batch(schedule)
    output = PREDICTIONS[kind].from_pair(schedule, x_t, TIMES, x0, epsilon)
    for objective in (Simple(schedule, kind), Bound(schedule, kind), DSM(schedule, kind)):
        loss = objective(output, x_t, x0, epsilon, TIMES)
        assert loss.shape == TIMES.shape and loss[1:].abs().max() == 0
        assert (loss[0] > 0) == isinstance(objective, Bound)


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


def learned(schedule, x_t, seed=7):
    """Half of an output: the variance's channels, from -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(x_t.shape, dtype=torch.float64, generator=generator).to(x_t.dtype) - 1


@on_all
@every_kind
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_bound_is_the_kl_of_the_two_gaussians(schedule, kind, variance):
    t = TIMES[1:]
    x_t, x0, epsilon, guess = batch(schedule, t)
    output, between = output_of(kind, schedule, x_t, t, guess), learned(schedule, x_t)
    whole = torch.cat([output, between], dim=1) if variance == "learned" else output
    loss = Bound(schedule, kind, variance)(whole, x_t, x0, epsilon, t)
    for k, time in enumerate(t.tolist()):
        kernel, wide = posterior(schedule, time, time - 1), transition(schedule, time, time - 1).sigma
        said, _ = PREDICTIONS["epsilon"].to_pair(schedule, x_t[k], time, guess[k])
        v = {"small": 0.0, "large": 1.0, "learned": (between[k] + 1) / 2}[variance]
        std = torch.as_tensor(wide.log() * v + kernel.std.log() * (1 - v)).exp()  # Nichol & Dhariwal 2021, eq. 15
        q = Normal(kernel.x_t * x_t[k] + kernel.x0 * x0[k], kernel.std)
        p = Normal(kernel.x_t * x_t[k] + kernel.x0 * said, std)
        assert float(loss[k]) == pytest.approx(float(kl_divergence(q, p).mean()) / BIT, rel=1e-6)


@on_all
@every_kind
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_bounds_first_term_is_the_mass_on_the_level(schedule, kind, variance):
    """By the error function itself, whose differences are exact enough a few widths around the level."""
    t = torch.ones(5, dtype=torch.long)
    x_t, x0, epsilon, guess = batch(schedule, t)
    output, between = output_of(kind, schedule, x_t, t, guess), learned(schedule, x_t)
    whole = torch.cat([output, between], dim=1) if variance == "learned" else output
    loss = Bound(schedule, kind, variance)(whole, x_t, x0, epsilon, t)
    tilde, beta = float(posterior(schedule, 2, 1).std), float(schedule(1).sigma)
    v = (between + 1) / 2 if variance == "learned" else torch.zeros_like(x0)
    std = (v * math.log(beta) + (1 - v) * math.log(tilde)).exp()
    said, _ = PREDICTIONS["epsilon"].to_pair(schedule, x_t, 1, guess)
    upper = torch.where(x0 == 1, math.inf, (x0 + 1 / 255 - said) / std)
    lower = torch.where(x0 == -1, -math.inf, (x0 - 1 / 255 - said) / std)
    mass = 0.5 * (torch.erf(upper / 2**0.5) - torch.erf(lower / 2**0.5))
    torch.testing.assert_close(loss, (-mass.log() / BIT).flatten(1).mean(1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_weighs_epsilon_as_the_paper_does(variance):
    """beta^2 / (2 var alpha (1 - alpha_bar)), alpha = 1 - beta."""
    schedule, beta, t = SCHEDULES["linear"], np.linspace(1e-4, 0.02, 1000), TIMES[1:]
    bar = np.cumprod(1 - beta)
    tilde = np.concatenate([[0], (1 - bar[:-1]) / (1 - bar[1:]) * beta[1:]])
    var = tilde if variance == "small" else beta
    weight = torch.tensor((beta**2 / (2 * np.where(var, var, 1) * (1 - beta) * (1 - bar)))[t - 1]) / BIT
    x_t, x0, epsilon, guess = batch(schedule, t)
    error = ((guess - epsilon) ** 2).flatten(1).mean(1)
    objective = Bound(schedule, "epsilon", variance)
    floor = objective(epsilon, x_t, x0, epsilon, t)
    torch.testing.assert_close(objective(guess, x_t, x0, epsilon, t) - floor, weight * error, rtol=1e-8, atol=1e-12)
    assert (floor > 0).all() == (floor > 0).any() == (variance == "large")


@on_all
@every_kind
def test_the_hybrid_is_the_squared_error_and_a_thousandth_of_the_bound(schedule, kind):
    """And the bound, whose expectation over uniform t is its own mean, is T times the term of one t."""
    x_t, x0, epsilon, guess = batch(schedule)
    output = output_of(kind, schedule, x_t, TIMES, guess)
    whole = torch.cat([output, learned(schedule, x_t)], dim=1)
    simple = Simple(schedule, kind)(output, x_t, x0, epsilon, TIMES)
    bound = 1000 * Bound(schedule, kind, "learned")(whole, x_t, x0, epsilon, TIMES)
    for weight in (0.001, 0.5):
        hybrid = Hybrid(schedule, kind, vlb_weight=weight)(whole, x_t, x0, epsilon, TIMES)
        torch.testing.assert_close(hybrid, simple + weight * bound, rtol=1e-12, atol=0)


@on_all
@every_kind
def test_the_hybrids_mean_learns_from_the_squared_error_alone(schedule, kind):
    x_t, x0, epsilon, guess = batch(schedule)
    output = output_of(kind, schedule, x_t, TIMES, guess).requires_grad_()
    width = learned(schedule, x_t).requires_grad_()
    loss = Hybrid(schedule, kind)(torch.cat([output, width], dim=1), x_t, x0, epsilon, TIMES)
    mean, wide = torch.autograd.grad(loss.sum(), (output, width))
    (alone,) = torch.autograd.grad(Simple(schedule, kind)(output, x_t, x0, epsilon, TIMES).sum(), output)
    assert torch.equal(mean, alone) and wide.abs().min() > 0
    both = Bound(schedule, kind, "learned")(torch.cat([output, width], dim=1), x_t, x0, epsilon, TIMES)
    from_bound = torch.autograd.grad(both.sum(), (output, width))
    assert all(gradient.abs().amax((1, 2, 3)).min() > 0 for gradient in from_bound)


def test_the_learned_variance_settles_where_the_bound_is_least():
    """At an error of the mean d the best variance is post + d^2, as far as the two ends allow."""
    schedule, t = SCHEDULES["linear"], torch.tensor([3, 40])
    post = posterior(schedule, t, t - 1)
    wide = transition(schedule, t, t - 1).sigma
    share = torch.tensor([0.3, 0.8], dtype=torch.float64)
    best = (share * wide.log() + (1 - share) * post.std.log()).exp()
    x0_error = (best**2 - post.std**2).sqrt() / post.x0
    x0 = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    epsilon = torch.ones_like(x0)
    x_t = noised(schedule, x0, t, epsilon)
    width = (2 * share - 1).reshape(2, 1, 1, 1).requires_grad_()
    output = x0 + x0_error.reshape(2, 1, 1, 1)
    loss = Bound(schedule, "x0", "learned")(torch.cat([output, width], dim=1), x_t, x0, epsilon, t)
    (gradient,) = torch.autograd.grad(loss.sum(), width)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


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
        wide = torch.nn.Conv2d(3, 6, 1)
        denoiser = NetworkDenoiser(lambda x, t, labels, layer=wide: layer(x), schedule, kind)
        for objective in (Bound(schedule, kind, "learned"), Hybrid(schedule, kind)):
            loss = objective(denoiser.output(x_t, TIMES), x_t, x0, epsilon, TIMES)
            assert loss.dtype == torch.float32 and loss.shape == TIMES.shape and loss.isfinite().all()
            loss.mean().backward()
            assert wide.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_term_leads_back_from_any_error(dtype):
    """Ho's floor under the probability has no gradient from seven widths on; the Gaussian's own is error / std^2."""
    std, x0 = torch.tensor(0.0074, dtype=dtype), torch.tensor([-1.0, 1 / 127.5, 1.0], dtype=dtype)
    for error in (0.2, -0.2, 2.0, -2.0):
        guess = torch.full_like(x0, error).requires_grad_()
        nll = decoder_nll(x0, guess, std)
        (gradient,) = torch.autograd.grad(nll.sum(), guess)
        outward = torch.tensor([error < 0, False, error > 0])  # beyond the outermost level nothing is lost
        expected = (error - math.copysign(1 / 255, error)) / std**2  # of the bin's nearer end
        assert nll.isfinite().all() and (nll[outward] < 1e-6).all() and (gradient[outward].abs() < 1e-6).all()
        assert gradient[~outward].tolist() == pytest.approx([float(expected)] * int((~outward).sum()), rel=0.03)


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
    for objective in (Bound(schedule, kind, "learned"), Hybrid(schedule, kind)):
        assert objective(torch.cat([output, output], dim=1), x_t, x0, x0, t).shape == (4,)


def test_the_papers_unstable_rows_are_known():
    unstable = [Simple(SCHEDULES["linear"], "mu"), Bound(SCHEDULES["linear"], "epsilon", "learned")]
    stable = [Simple(SCHEDULES["linear"]), Hybrid(SCHEDULES["linear"]), DSM(SCHEDULES["linear"])]
    stable += [Bound(SCHEDULES["linear"], kind, v) for kind in ("epsilon", "mu") for v in ("small", "large")]
    stable += [Bound(SCHEDULES["linear"], "mu", "learned")]
    assert all("unstable" in o.unstable and "Ho et al. 2020" in o.unstable for o in unstable)
    assert all(o.unstable is None for o in stable)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: Simple(s, "noise"), "objective.prediction=noise"),
        (lambda s: Bound(s, "epsilon", "learnt"), "objective.variance=learnt must be one of small, large, learned"),
        (lambda s: Hybrid(s, "v", "small"), "objective.variance=small: .* objective=v"),
        (lambda s: Hybrid(s, vlb_weight=0.0), "objective.vlb_weight=0.0"),
        (lambda s: DSM(s, "score", "sigma"), "objective.weight=sigma must be one of sigma2, one"),
        (lambda s: Bound(vp_linear(1)), "schedule.num_timesteps=1"),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_key(make, message):
    with pytest.raises(ValueError, match=message):
        make(SCHEDULES["linear"])
