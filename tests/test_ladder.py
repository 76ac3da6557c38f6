"""NCSNv2's techniques: what its published ladders obey, and what the rules give."""

import math

import pytest
import torch

from diffusion.process.grids import times
from diffusion.process.ladder import (
    PUBLISHED_OVERLAP,
    Ladder,
    ladder,
    ladder_ratio,
    largest_distance,
    num_levels,
    overlap,
    ratio_of_overlap,
    settled,
    step_size,
)
from diffusion.process.schedule import ve_geometric
from diffusion.process.toy import Gaussian
from diffusion.samplers.annealed import AnnealedLangevin

SIGMA_MIN = 0.01
# dim, sigma_max, levels, updates a level, epsilon, and s_T^2 / sigma^2 (Song & Ermon 2020, app. B)
PUBLISHED = {
    "cifar10": (3 * 32**2, 50, 232, 5, 6.2e-6, 1.0555),
    "celeba_64": (3 * 64**2, 90, 500, 5, 3.3e-6, 1.0314),
    "church_96": (3 * 96**2, 140, 788, 4, 4.9e-6, 1.0247),
    "bedroom_128": (3 * 128**2, 190, 1086, 3, 1.8e-6, 1.0174),
    "ffhq_256": (3 * 256**2, 348, 2311, 3, 0.9e-6, 1.0089),
}
every_published = pytest.mark.parametrize("name", PUBLISHED)


@every_published
def test_the_published_ladders_overlap_by_0_567(name):
    dim, sigma_max, levels, *_ = PUBLISHED[name]
    ratio = ladder_ratio(SIGMA_MIN, sigma_max, levels)
    assert overlap(ratio, dim) == pytest.approx(PUBLISHED_OVERLAP, abs=1e-3)
    assert num_levels(SIGMA_MIN, sigma_max, ratio_of_overlap(dim, PUBLISHED_OVERLAP)) == pytest.approx(levels, rel=2e-3)


@every_published
def test_the_published_steps_settle_as_published(name):
    _, sigma_max, levels, visits, epsilon, expected = PUBLISHED[name]
    ratio, step = ladder_ratio(SIGMA_MIN, sigma_max, levels), epsilon / SIGMA_MIN**2
    assert settled(ratio, step, visits) == pytest.approx(expected, abs=1e-3)
    if name != "church_96":
        assert step_size(ratio, visits) == pytest.approx(step, rel=0.03), "technique 4 gives the published step"
    assert settled(ratio, step_size(ratio, visits), visits) <= settled(ratio, step, visits) + 1e-12


def test_the_stated_rule_gives_a_coarser_ladder_than_the_published_one():
    assert ratio_of_overlap(3 * 32**2, 0.5) == pytest.approx(1.0398, abs=5e-5)
    found = ladder(SIGMA_MIN, 50, 3 * 32**2, visits=5)
    assert found.num_timesteps == 219 and found.overlap == pytest.approx(0.5, abs=2e-3)
    published = ladder(SIGMA_MIN, 50, 3 * 32**2, visits=5, wanted=PUBLISHED_OVERLAP)
    assert published.num_timesteps == 232 and published.step_size == pytest.approx(0.062, rel=0.01)
    assert isinstance(published, Ladder) and published.visits == 5


def test_a_ladder_does_not_depend_on_the_unit():
    here, there = ladder(0.01, 50, 3072, 5), ladder(0.02, 100, 3072, 5)
    assert here[2:] == pytest.approx(there[2:], rel=1e-9)


@pytest.mark.parametrize("dim, ratio", [(8, 1.5), (64, 1.36), (3072, 1.0376)])
def test_the_overlap_is_the_share_of_noise_that_reaches_the_next_shell(dim, ratio):
    """Counted: radii of the lower level's noise within three deviations, gamma / sqrt(2), of the upper level's radius.

    The formula takes the radius as normal about sqrt(D), which in 8 dimensions is off by a few per cent.
    """
    radius = torch.randn(8000, dim, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    inside = ((radius - ratio * math.sqrt(dim)).abs() < 3 * ratio / math.sqrt(2)).double().mean()
    assert overlap(ratio, dim) == pytest.approx(float(inside), abs=0.06 if dim == 8 else 0.03)


@pytest.mark.parametrize("convention, factor", [("code", 1), ("paper", 2)])
@pytest.mark.parametrize("step, visits", [(0.062, 5), (0.2, 100), (0.5, 1)])
def test_settled_is_what_the_sampler_does_to_a_single_point(step, visits, convention, factor):
    """Data at one point, a start with the law of the level above: every update is affine, so its law is exact."""
    schedule, toy, level = ve_geometric(20, 0.01, 1.0), Gaussian(0.3, 0.0), 12
    sampler = AnnealedLangevin(schedule, factor * step, convention)
    gain, noise = [], []
    for visited in times(20, 20, visits=visits):
        if visited == level:
            x = torch.tensor([0.3, 1.3], dtype=torch.float64)  # at the point, and one unit off
            zero = sampler.step(toy.denoiser(schedule), x, level, level, torch.zeros_like)
            moved = sampler.step(toy.denoiser(schedule), x, level, level, torch.ones_like)
            gain.append(float(zero[1] - zero[0])), noise.append(float(moved[0] - zero[0]))
    sigma, above = float(schedule(level).sigma), float(schedule(level + 1).sigma)
    variance = above**2
    for a, c in zip(gain, noise, strict=True):
        variance = a**2 * variance + c**2
    assert len(gain) == visits
    assert variance / sigma**2 == pytest.approx(settled(above / sigma, step, visits), rel=1e-12)


def test_the_largest_distance_is_found_among_all_pairs():
    points = torch.randn(300, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    points[17] += 3
    points[281] -= 3
    expected = float((points[17] - points[281]).norm())
    for chunk in (7, 1024):
        assert largest_distance(points, chunk) == pytest.approx(expected, rel=1e-6)


def test_what_no_ladder_can_have_is_refused():
    with pytest.raises(ValueError, match="with dim=2 every ratio gives a larger overlap"):
        ratio_of_overlap(2)
    with pytest.raises(ValueError, match=r"overlap=0.999 is outside \(0, 0.9973\)"):
        ratio_of_overlap(3072, 0.999)
