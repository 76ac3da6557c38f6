"""The variational bound and the flow's likelihood: against integrals and densities that are known."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.images import from_uint8
from diffusion.likelihood import bound, flow
from diffusion.likelihood.bound import Terms, bound_terms, predicted_at, summarise
from diffusion.likelihood.flow import FlowTerms, dequantised, flow_bits, log_likelihood, probes, summarise_flow
from diffusion.process.bound import HALF_BIN, decoder_nll
from diffusion.process.kernels import posterior, transition
from diffusion.process.schedule import Level, Prediction, ve_geometric, vp_cosine, vp_linear
from diffusion.process.toy import Gaussian, Mixture

LINEAR, VE, COSINE = vp_linear(), ve_geometric(), vp_cosine()
on_all = pytest.mark.parametrize("schedule", [LINEAR, COSINE, VE], ids=["linear", "cosine", "ve"])
LEVELS = np.arange(256) / 127.5 - 1


class Quantised:
    """A Gaussian on uint8 levels: its law, and its exact denoiser, a mixture of points."""

    def __init__(self, mean, std):
        edges = np.concatenate([[-np.inf], np.arange(0.5, 255), [np.inf]])
        mass = np.diff(norm.cdf(edges, mean, std))
        kept = mass > 1e-10
        self.mass, self.levels = mass[kept] / mass[kept].sum(), LEVELS[kept]
        self.toy = Mixture(self.mass, self.levels, stds=np.zeros(kept.sum()))
        self.entropy = float(-(self.mass * np.log2(self.mass)).sum())

    def expected(self, schedule, t, variance, nodes):
        """The bound's term and the squared error of x0, as the likelihood has them, averaged over data and noise."""
        epsilon = np.linspace(-8, 8, nodes)
        weight = np.outer(self.mass, norm.pdf(epsilon) * (epsilon[1] - epsilon[0])).ravel()
        x0 = torch.tensor(np.repeat(self.levels, nodes))
        noise = torch.tensor(np.tile(epsilon, len(self.levels)))
        _, bits, epsilon_mse, x0_mse = bound.measure_at(self.toy.denoiser(schedule), schedule, x0, noise, t, variance)
        return tuple(float((torch.tensor(weight) * each).sum()) for each in (bits, x0_mse, epsilon_mse))

    def integrals(self, schedule, t, variance):
        """The same by a sum over x_t, from nothing but the noise level, in NumPy."""
        alpha, sigma = (float(v) for v in schedule(t))
        low, high = alpha * self.levels.min() - 9 * sigma, alpha * self.levels.max() + 9 * sigma
        x = np.linspace(low, high, 12_001)
        joint = self.mass * norm.pdf(x[:, None], alpha * self.levels, sigma)  # (x, level)
        guess = joint @ self.levels / joint.sum(1).clip(1e-300)
        error = (joint * (guess[:, None] - self.levels) ** 2).sum(1)
        mse = float(error.sum() * (x[1] - x[0]))
        if t == 1:
            (a1, s1), (a2, s2) = (tuple(map(float, schedule(k))) for k in (1, 2))
            std = s1 * math.sqrt(1 - (a2 * s1 / (a1 * s2)) ** 2)  # that of q(x_1 | x_2, x_0)
            upper = np.where(self.levels > 0.999, np.inf, (self.levels + 1 / 255 - guess[:, None]) / std)
            lower = np.where(self.levels < -0.999, -np.inf, (self.levels - 1 / 255 - guess[:, None]) / std)
            turned = lower + upper > 0  # differences of small numbers instead of numbers near 1
            lower, upper = np.where(turned, -upper, lower), np.where(turned, -lower, upper)
            nats = -norm.logcdf(upper) - np.log1p(-np.exp(norm.logcdf(lower) - norm.logcdf(upper)))
            return float((joint * nats).sum() * (x[1] - x[0]) / math.log(2)), mse
        a, s = (float(v) for v in schedule(t - 1))
        kept = (alpha * s / (a * sigma)) ** 2
        post, wide = s**2 * (1 - kept), sigma**2 * (1 - kept)
        var = {"small": post, "large": wide}[variance]
        nats = 0.5 * (post / var - 1 - math.log(post / var)) + (a * (1 - kept)) ** 2 * mse / (2 * var)
        return nats / math.log(2), mse


# ---- the bound ----


@on_all
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("mean, std", [(100.3, 5.0), (1.2, 3.0)], ids=["inside", "at the edge"])
def test_each_term_is_its_integral(schedule, variance, mean, std):
    data = Quantised(mean, std)
    for t in (1, 2, 3, 10, 100, 600, 1000):
        bits, x0_mse, epsilon_mse = data.expected(schedule, t, variance, nodes=161)
        exact, mse = data.integrals(schedule, t, variance)
        assert bits == pytest.approx(exact, abs=1e-6), t
        assert x0_mse == pytest.approx(mse, rel=1e-6)
        alpha, sigma = schedule(t)
        assert epsilon_mse == pytest.approx(float(alpha / sigma) ** 2 * mse, rel=1e-6)  # x_t is the same in both


def test_the_bound_of_the_exact_denoiser_is_above_the_entropy_by_a_known_gap():
    """All 1000 terms, for data 4 levels wide: what fixed widths and a product over dimensions cost."""
    data, gap = Quantised(120.0, 4.0), {}
    alpha, sigma = (float(v) for v in LINEAR(1000))
    first = 0.5 * (sigma**2 + alpha**2 * float(data.mass @ data.levels**2) - 1 - math.log(sigma**2)) / math.log(2)
    for variance in ("small", "large"):
        terms = [data.expected(LINEAR, t, variance, nodes=33)[0] for t in range(1, 1001)]
        gap[variance] = first + sum(terms) - data.entropy
    print(data.entropy, gap)
    assert 0.1 < gap["large"] < gap["small"] < 0.8


def test_nothing_is_lost_between_the_terms_and_the_sum():
    """With known numbers: what is summed, what is averaged, what is a rate."""
    numbers, prior = np.array([7, 2, 5]), np.array([0.1, 0.2, 0.3])
    bits = np.array([[1.0, 0.5, 0.25], [2.0, 0.25, 0.125], [4.0, 0.0, 0.0]])
    mse = np.array([[4.0, 9.0, 16.0], [1.0, 4.0, 9.0], [0.0, 0.0, 1.0]]) / 127.5**2
    whole = Terms(numbers, prior, bits, 2 * mse, mse)
    parts = [Terms(*(a[2:] for a in whole)), Terms(*(a[:2] for a in whole))]
    got = summarise(parts)
    total = prior + bits.sum(1)
    assert got.num_images == 3 and got.bits_per_dim == pytest.approx(total.mean())
    assert got.standard_error == pytest.approx(total.std(ddof=1) / 3**0.5)
    assert (got.L_T, got.L_0) == (pytest.approx(0.2), pytest.approx(7 / 3))
    assert got.rate == pytest.approx(got.bits_per_dim - got.L_0)
    assert got.curve["t"].tolist() == [1, 2, 3] and tuple(got.curve) == bound.COLUMNS
    assert got.curve["rate"] == pytest.approx([0.2 + 0.375, 0.2 + 0.125, 0.2])
    assert got.curve["rmse_255"] == pytest.approx([1.0, 5 / 3, 8 / 3])
    assert got.curve["epsilon_mse"] == pytest.approx(2 * mse.mean(0))
    again = summarise(parts[::-1])
    assert all(np.array_equal(again.curve[c], got.curve[c]) for c in bound.COLUMNS) and again[:7] == got[:7]
    assert summarise([Terms(*(a[:1] for a in whole))]).standard_error is None
    with pytest.raises(AssertionError, match="in two parts"):
        summarise([whole, parts[0]])


SHORT = vp_linear(12, 1e-3, 0.6)


def pictures(num=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, 4, 4), dtype=torch.uint8, generator=generator)


def network(x, time_index, labels):
    return torch.cat([torch.tanh(x + 0.1 * x.roll(1, -1)), torch.sin(3 * x) * 0.5], dim=1)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_an_images_bound_is_of_its_seed_and_number_alone(variance):
    images, numbers = pictures(), torch.tensor([3, 1000, 0, 17, 2**40, 5, 4])
    denoise = Clipped(NetworkDenoiser(network, SHORT), SHORT)
    whole = bound_terms(denoise, SHORT, images, numbers, 5, variance)
    assert whole.bits.shape == (7, 12) and whole.bits.dtype == np.float64 and whole.numbers.tolist() == numbers.tolist()
    order = torch.tensor([6, 2, 0, 4, 1, 3, 5])
    parts = [bound_terms(denoise, SHORT, images[o], numbers[o], 5, variance) for o in order.split(3)]
    joined = Terms(*(np.concatenate(a) for a in zip(*parts, strict=True)))
    for one, other in zip(whole, joined, strict=True):
        np.testing.assert_allclose(one[order], other, rtol=1e-6)
    other = bound_terms(denoise, SHORT, images, numbers, 6, variance)
    assert (other.bits != whole.bits).all() and np.array_equal(other.prior, whole.prior)


def test_the_learned_variance_changes_the_widths_alone():
    """Each term from the share that the network says, in the closed forms of both."""
    images, numbers = pictures(), torch.arange(7)
    denoise = NetworkDenoiser(network, SHORT)
    x0 = from_uint8(images).double()
    for t in (1, 2, 12):
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        said, bits, _, _ = bound.measure_at(denoise, SHORT, x0, noise, t, "learned")
        small = posterior(SHORT, max(t, 2), max(t, 2) - 1).std
        large = transition(SHORT, t, t - 1).sigma
        std = (said.variance * large.log() + (1 - said.variance) * small.log()).exp()
        if t == 1:
            expected = decoder_nll(x0, said.x0 - x0, std)
        else:
            kernel = posterior(SHORT, t, t - 1)
            p = torch.distributions.Normal(kernel.x0 * said.x0, std)
            q = torch.distributions.Normal(kernel.x0 * x0, kernel.std)
            expected = torch.distributions.kl_divergence(q, p)
        torch.testing.assert_close(bits, expected.flatten(1).mean(1) / math.log(2), rtol=1e-6, atol=0)
    fixed = NetworkDenoiser(lambda x, t, labels: network(x, t, labels)[:, :3], SHORT)
    with pytest.raises(ValueError, match="likelihood.variance=learned"):
        bound_terms(fixed, SHORT, images, numbers, 0, "learned")
    assert denoise(x0.float(), 3).variance is not None


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_a_term_is_reckoned_where_its_images_are(variance):
    """A fake GPU: mixing devices is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x0 = torch.empty(2, 3, 4, 4, device="cuda")
        for t in (1, 2, 12):
            found = bound.measure_at(Clipped(NetworkDenoiser(network, SHORT), SHORT), SHORT, x0, x0, t, variance)
            assert all(each.device.type == "cuda" and each.dtype == torch.float64 for each in found[1:])


def test_the_receivers_pictures_are_those_of_the_bound():
    images, numbers = pictures(), torch.arange(10, 17)
    denoise = Clipped(NetworkDenoiser(network, SHORT), SHORT)
    terms = bound_terms(denoise, SHORT, images, numbers, 3)
    seen = predicted_at(denoise, SHORT, images, numbers, 3, [12, 5, 1])
    assert seen.shape == (7, 3, 3, 4, 4) and seen.abs().max() <= 1
    mse = ((seen - from_uint8(images)[:, None]) ** 2).flatten(2).mean(2)
    torch.testing.assert_close(mse.double().numpy(), terms.x0_mse[:, [11, 4, 0]], rtol=1e-5, atol=0)


# ---- the discretised decoder ----


@pytest.mark.parametrize("std", [1e-4, 0.0074, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.997, 0.0, 0.1234, 0.999, 1.0, 7.0])
def test_the_masses_of_all_levels_add_up_to_one(mean, std):
    x0 = torch.tensor(LEVELS)
    mass = (-decoder_nll(x0, mean - x0, torch.tensor(std, dtype=torch.float64))).exp()
    assert (mass >= 0).all() and float(mass.sum()) == pytest.approx(1, abs=1e-11)


def test_the_masses_are_those_of_the_error_function_far_into_the_tail():
    """log of a difference of scipy's own survival functions, where that still is a number: 37 widths out."""
    std, error = torch.tensor(0.01, dtype=torch.float64), torch.linspace(-0.36, 0.36, 97, dtype=torch.float64)
    got = decoder_nll(torch.zeros_like(error), error, std).numpy()
    far = np.abs(error.numpy())
    mass = norm.sf((far - 1 / 255) / 0.01) - norm.sf((far + 1 / 255) / 0.01)
    np.testing.assert_allclose(got, -np.log(mass), rtol=1e-9)
    assert decoder_nll(torch.zeros(1), torch.full((1,), 500.0), torch.tensor(0.01)).isfinite().all()


def test_the_papers_hyperbolic_tangent_is_the_error_function_within_three_ten_thousandths():
    """The code of Ho et al. 2020 has Phi(u) = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2."""
    u = np.linspace(-8, 8, 100_001)
    theirs = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    assert 1e-4 < np.abs(theirs - norm.cdf(u)).max() < 4e-4
    std = float(posterior(LINEAR, 2, 1).std)
    error = np.linspace(-2, 2, 401) * std
    upper, lower = ((sign * HALF_BIN - error) / std for sign in (1, -1))
    tanh_form = [0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in (upper, lower)]
    exact = decoder_nll(torch.zeros(401, dtype=torch.float64), torch.tensor(error), torch.tensor(std).double())
    assert np.abs(-np.log(tanh_form[0] - tanh_form[1]) - exact.numpy()).max() < 0.01


# ---- the flow ----

TOYS = {
    "gaussian": Gaussian(0.0, 0.5),
    "wide": Gaussian(0.0, 1.3),
    "mixture": Mixture([1.0, 2.0, 1.0], [-0.7, 0.0, 0.7], stds=[0.1, 0.2, 0.1]),
}
PLANE = Mixture(
    [1.0, 1.0], [[-0.5, 0.2], [0.5, -0.2]], covariances=[[[0.05, 0.03], [0.03, 0.1]], [[0.2, 0], [0, 0.05]]]
)
SPACE = Gaussian([0.0] * 5, covariance=torch.eye(5) * 0.1 + torch.outer(*[torch.linspace(-0.4, 0.6, 5)] * 2))


@on_all
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_flow_knows_the_density_of_numbers(schedule, toy):
    x = toy.sample(13, torch.Generator().manual_seed(5))
    got = log_likelihood(toy.denoiser(schedule), schedule, x)
    assert got.log_density.shape == (13, 1) and got.nfe > 6
    exact = toy.log_density(x, Level(*(torch.tensor(v).double() for v in (1.0, 0.0))))
    assert (got.log_density[:, 0] - exact).abs().max() < 1e-3


@on_all
def test_the_flow_knows_the_density_of_vectors(schedule):
    x = PLANE.sample(12, torch.Generator().manual_seed(1))
    got = log_likelihood(PLANE.denoiser(schedule), schedule, x)
    exact = PLANE.log_density(x, Level(*(torch.tensor(v).double() for v in (1.0, 0.0))))
    assert (got.log_density[:, 0] - exact).abs().max() < 1e-3 * 2


@on_all
def test_the_flow_arrives_where_the_flow_arrives(schedule):
    toy, x = TOYS["mixture"], torch.linspace(-1, 1, 5, dtype=torch.float64)
    got = log_likelihood(toy.denoiser(schedule), schedule, x, tolerance=1e-8)
    exact = toy.flow(x, schedule, flow.START, 1000)
    torch.testing.assert_close(got.z, exact / schedule.prior_std, rtol=0, atol=1e-5)


def test_the_flow_of_a_network_changes_volume_as_its_own_map_does():
    """The density against the determinant of x -> z_T, taken by finite differences of the flow itself."""
    x = 0.5 * torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def small(x, time_index, labels):
        turned = torch.tanh(x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, -2))
        return turned * (1 + 0.1 * torch.sin(time_index / 100))[:, None, None, None]

    for prediction in ("epsilon", "v"):
        denoise = NetworkDenoiser(small, LINEAR, prediction)
        solve = partial(log_likelihood, denoise, LINEAR, tolerance=1e-7)
        moved = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2) * 1e-3
        up, down = solve(x=torch.cat([x + moved, x - moved])).z.flatten(1).split(4)  # together: with the same steps
        jacobian = (up - down) / 2e-3
        got = solve(x=x)
        expected = -0.5 * (got.z**2 + math.log(2 * math.pi)).sum() + jacobian.det().abs().log()
        assert float(got.log_density) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", flow.PROBES)
def test_hutchinsons_estimate_is_right_within_its_error(kind):
    """Its mean over probes is off by as much as their spread says, image by image."""
    x = SPACE.sample(24, torch.Generator().manual_seed(2))
    denoise, drawn = SPACE.denoiser(LINEAR), probes(torch.arange(24), 3, 64, kind, x)
    exact = log_likelihood(denoise, LINEAR, x).log_density[:, 0]
    got = log_likelihood(denoise, LINEAR, x, drawn).log_density
    error = got.std(1) / 64**0.5
    away = (got.mean(1) - exact) / error
    assert got.std(1).min() > 0.1, "it estimates something"
    assert away.abs().max() < 4.5 and away.std() == pytest.approx(1, abs=0.5) and abs(float(away.mean())) < 4 / 24**0.5


def test_one_rademacher_probe_is_exact_where_dimensions_do_not_mix():
    toy = Gaussian([0.0, 0.1, -0.2], covariance=torch.diag(torch.tensor([0.1, 0.2, 0.3])))
    x = toy.sample(4, torch.Generator().manual_seed(0))
    drawn = probes(torch.arange(4), 0, 1, "rademacher", x)
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    exact = log_likelihood(toy.denoiser(LINEAR), LINEAR, x)
    torch.testing.assert_close(log_likelihood(toy.denoiser(LINEAR), LINEAR, x, drawn).log_density, exact.log_density)


def test_all_levels_alike_are_eight_bits():
    """A uniform density over the bins of all levels, 2 + 2/255 wide, in bits per dimension of the levels."""
    images = pictures(64)
    x = dequantised(images, torch.arange(64), 1)
    assert -1 - 1 / 255 <= x.min() and x.max() <= 1 + 1 / 255
    nearest = ((x + 1) * 127.5).round()
    assert torch.equal(nearest.to(torch.uint8), images) and (x - from_uint8(images)).abs().mean() > 0.24 * 2 / 255
    assert math.log2(2 + 2 / 255) + math.log2(flow.LEVELS_PER_UNIT) == pytest.approx(8, abs=1e-12)


def normal_pictures(num, std):
    """Pictures whose pixels are N(0, std^2), independent, in levels; and the denoiser of that density."""
    z = torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    toy = Gaussian(0.0, std)

    def denoise(x_t, t, labels=None):
        x0, epsilon, _ = toy.denoiser(LINEAR)(x_t.flatten(), t)
        return Prediction(x0.reshape(x_t.shape), epsilon.reshape(x_t.shape))

    return ((std * z + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), denoise


@pytest.mark.parametrize("num_probes", [0, 2])
def test_bits_of_pictures_are_those_of_their_density(num_probes):
    images, denoise = normal_pictures(40, 0.2)
    numbers = torch.arange(40)
    got = flow_bits(denoise, LINEAR, images, numbers, 4, num_probes)
    assert got.bits.shape == (40, max(num_probes, 1)) and (got.nfe > 6).all()
    density = norm.logpdf(dequantised(images, numbers, 4).double().numpy(), 0, 0.2).reshape(40, -1).mean(1)
    expected = -density / math.log(2) + math.log2(127.5)
    np.testing.assert_allclose(got.bits, np.repeat(expected[:, None], got.bits.shape[1], 1), atol=2e-3)
    whole = summarise_flow([got])
    entropy = Quantised(127.5, 0.2 * 127.5).entropy
    assert whole.bits_per_dim == pytest.approx(entropy, abs=4 * whole.standard_error)
    assert (whole.probe_error is None) == (num_probes == 0)


def test_an_images_flow_is_of_its_seed_and_number_within_the_tolerance():
    images, denoise = normal_pictures(6, 0.2)
    numbers, call = torch.tensor([5, 9, 0, 3, 12, 1]), partial(flow_bits, denoise, LINEAR, seed=1, probe="gaussian")
    whole = call(images=images, numbers=numbers)
    parts = [call(images=images[o], numbers=numbers[o]) for o in torch.tensor([4, 0, 3, 1, 2, 5]).split(4)]
    joined = FlowTerms(*(np.concatenate(a) for a in zip(*parts, strict=True)))
    where = np.argsort(whole.numbers), np.argsort(joined.numbers)
    np.testing.assert_allclose(whole.bits[where[0]], joined.bits[where[1]], atol=1e-3)
    assert summarise_flow(parts).bits_per_dim == pytest.approx(summarise_flow([whole]).bits_per_dim, abs=1e-3)
    assert (call(images=images, numbers=numbers + 100).bits != whole.bits).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": 0.0}, "likelihood.start=0.0"),
        ({"start": 1000.0}, "likelihood.start=1000.0"),
        ({"tolerance": 0.0}, "likelihood.tolerance=0.0"),
        ({"num_probes": -1}, "likelihood.probes=-1"),
        ({"probe": "sphere"}, "likelihood.probe=sphere must be one of rademacher, gaussian"),
    ],
)
def test_a_bad_setting_is_refused_by_the_name_of_its_key(change, message):
    images, denoise = normal_pictures(2, 0.2)
    with pytest.raises(ValueError, match=message):
        flow_bits(denoise, LINEAR, images, torch.arange(2), 0, **change)
