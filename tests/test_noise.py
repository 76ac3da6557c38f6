"""The sources of randomness: the same numbers everywhere, and the right law."""

import numpy as np
import pytest
import torch

from diffusion import noise
from diffusion.noise import ImageNoise, Stream


def test_keys_on_the_device_are_the_hosts_bit_for_bit():
    positions = torch.cat([torch.arange(1000), torch.tensor([2**31, 2**40 + 3, 2**62])])
    for counters in ((0, 1), (7, Stream.NOISE), (2**63, 5), (-1, 2, 3)):
        device = noise.keys(positions, *counters).numpy().view(np.uint64)
        host = noise.key(*counters, positions.numpy())
        assert np.array_equal(device, host)


def test_keys_are_splitmix64():
    """The first outputs of Vigna's splitmix64.c from seed 1234567."""
    golden, state = np.uint64(0x9E3779B97F4A7C15), np.uint64(1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    with np.errstate(over="ignore"):
        assert [int(noise._splitmix(np.asarray(state + np.uint64(k) * golden))) for k in range(3)] == published


def test_any_counter_changes_the_key():
    words = {int(noise.key(*c)) for c in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (0, 0, 0, 0)]}
    assert len(words) == 6
    many = noise.key(3, np.arange(300)[:, None], np.arange(300))
    assert many.shape == (300, 300) and len(np.unique(many)) == 90_000


def test_permutations_permute_and_follow_their_counters():
    order = noise.permutation(1000, 1, 2)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, noise.permutation(1000, 1, 2))
    assert (order != noise.permutation(1000, 1, 3)).mean() > 0.98
    assert 0 <= noise.seed63(5, 6) < 2**63


def test_integers_are_uniform_and_in_range():
    drawn = noise.uniform_int(noise.keys(torch.arange(100_000), 11, Stream.TIME), 1000)
    assert drawn.min() == 0 and drawn.max() == 999
    counts = torch.bincount(drawn, minlength=1000).double()
    chi2 = float(((counts - 100) ** 2 / 100).sum())
    assert 800 < chi2 < 1200  # 999 degrees of freedom, standard deviation 45
    assert noise.uniform_int(noise.keys(torch.arange(1000), 1), 1).max() == 0


def test_fractions_are_uniform():
    u = noise.uniform(noise.keys(torch.arange(100_000), 12)).sort().values
    assert 0 <= u[0] and u[-1] < 1
    assert (u - (torch.arange(100_000) + 0.5) / 100_000).abs().max() < 0.006  # Kolmogorov, p about 0.001


def test_fractions_of_an_image_are_uniform_and_its_own():
    keys = noise.keys(torch.arange(100), 14)
    u = noise.uniforms(keys, (3, 20, 20))
    assert (
        u.shape == (100, 3, 20, 20)
        and u.dtype == torch.float32
        and torch.equal(u[7:9], noise.uniforms(keys[7:9], (3, 20, 20)))
    )
    flat = u.flatten().double().sort().values
    assert 0 <= flat[0] and flat[-1] < 1
    assert (flat - (torch.arange(len(flat)) + 0.5) / len(flat)).abs().max() < 1.95 / len(flat) ** 0.5
    centred = u.flatten(1) - 0.5
    for lag in (1, 20, 400):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean()) < 5 / 12 / len(flat) ** 0.5 * 1.5


def test_noise_is_standard_normal_and_independent():
    z = noise.normal(noise.keys(torch.arange(500), 13), (2, 20, 50), torch.float64).flatten(1)
    num = z.numel()
    assert abs(z.mean()) < 5 / num**0.5 and abs(z.var() - 1) < 5 * (2 / num) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / num) ** 0.5 and abs((z**4).mean() - 3) < 5 * (96 / num) ** 0.5
    flat = z.flatten().sort().values
    exact = torch.special.ndtr(flat)
    assert (exact - (torch.arange(num) + 0.5) / num).abs().max() < 1.95 / num**0.5
    bound = 5 / num**0.5
    for lag in (1, 2, 50, 1000):  # along an image, and from image to image
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 1.5 * bound
    assert abs((z[1:] * z[:-1]).mean()) < bound
    half = z.shape[1] // 2  # the two halves of a pair share a radius and an angle
    first, second = z[:, :half], z[:, half:]
    assert abs((first * second).mean()) < 1.5 * bound and abs(((first**2 - 1) * (second**2 - 1)).mean()) < 4 * bound


def test_a_row_is_of_its_own_key_alone():
    keys = noise.keys(torch.arange(16), 3, Stream.NOISE)
    whole = noise.normal(keys, (3, 5, 5))
    assert torch.equal(whole[4:9], noise.normal(keys[4:9], (3, 5, 5)))
    assert whole.dtype == torch.float32 and whole.shape == (16, 3, 5, 5)
    assert whole[0].numel() % 2 == 1, "an odd size uses half of its last pair"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_and_bounded(dtype):
    z = noise.normal(noise.keys(torch.arange(2000), 5), (1000,), dtype)
    assert z.isfinite().all() and 4.5 < z.abs().max() < 6.7


def test_noise_of_an_image_is_a_function_of_seed_image_and_draw():
    x = torch.zeros(4, 1, 3, 3)
    numbers = torch.tensor([9, 2, 5, 0])
    noise_of_all, noise_of_some = ImageNoise(1, numbers), ImageNoise(1, numbers[1:3])
    first, second = noise_of_all(x), noise_of_all(x)
    assert torch.equal(first[1:3], noise_of_some(x[1:3])) and torch.equal(second[1:3], noise_of_some(x[1:3]))
    assert (first - second).abs().min() > 0
    assert not torch.equal(first, ImageNoise(2, numbers)(x))
    assert not torch.equal(first, ImageNoise(1, numbers, Stream.PRIOR)(x))
