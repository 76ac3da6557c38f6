"""Shares of modes, and modes in the plane while noise comes and goes."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from diffusion.lab import plane
from diffusion.lab.modes import class_weights, judged, shares, wilson
from diffusion.process.grids import times
from diffusion.process.schedule import sub_vp, ve_geometric, vp_linear
from diffusion.process.toy import Gaussian, checkerboard, modes, moons, rings
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.ddim import DDIM

SCHEDULES = {"vp": vp_linear(), "ve": ve_geometric(), "sub-vp": sub_vp()}
on_all = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
TOY = modes()


# ---- counting ----


@pytest.mark.parametrize("count, number", [(0, 50), (3, 50), (25, 50), (50, 50), (1234, 20_000)])
def test_an_interval_is_wilsons(count, number):
    known = binomtest(count, number).proportion_ci(0.95, method="wilson")
    found = wilson(count, number)
    assert (found.low, found.high) == pytest.approx((known.low, known.high)) and found.share == count / number
    assert wilson(count, number, 0.5).high <= found.high


def test_points_of_the_data_have_the_weights_and_others_have_not():
    x = TOY.sample(20_000, torch.Generator().manual_seed(0))
    found = shares(TOY, x)
    assert sum(found.counts) == 20_000 and found.expected == pytest.approx([k / 36 for k in range(1, 9)])
    assert found.p > 1e-3 and all(
        i.low < w < i.high for i, w in zip(found.intervals(0.999), found.expected, strict=True)
    )
    even = modes([1.0] * 8).sample(20_000, torch.Generator().manual_seed(0))
    assert shares(TOY, even).p < 1e-100


def test_a_class_of_many_components_has_their_weight_together():
    toy = rings((0.4, 0.8))
    assert class_weights(toy).tolist() == pytest.approx([1 / 3, 2 / 3])
    x = torch.tensor([[0.4, 0.0], [0.0, -0.8], [0.85, 0.0]], dtype=torch.float64)
    assert judged(toy, x).tolist() == [0, 1, 1]
    assert shares(Gaussian([0.0, 0.0], std=1.0), torch.zeros(10, 2, dtype=torch.float64)).p == 1.0


# ---- in the plane ----


@on_all
@pytest.mark.parametrize("t", [0, 100, 1000])
def test_a_field_is_a_density_of_mass_one_and_its_score_points_uphill(schedule, t):
    found = plane.field(TOY, schedule, t, points=201, half=4.5)
    cell = (9 / 200) ** 2
    assert found.density.sum() * cell == pytest.approx(1, rel=0.02)
    line = np.linspace(-4.5, 4.5, 201)
    up = np.stack(np.gradient(np.log(np.maximum(found.density, 1e-290)), line, line)[::-1], axis=-1)
    k = [int(np.argmin(abs(line - v))) for v in found.places[50]]
    if found.density[k[1], k[0]] > 1e-3:  # where differences are good enough
        np.testing.assert_allclose(found.scores[50], up[k[1], k[0]], rtol=0.3, atol=0.3)
    assert found.places.shape == found.scores.shape == (169, 2)


def test_modes_merge_to_one_and_are_counted():
    def counted(toy, *times):
        return [plane.peaks_at(toy, SCHEDULES["vp"], t) for t in times]

    assert counted(TOY, 0, 20, 1000) == [8, 8, 1]
    assert counted(rings(), 1, 1000) == [2, 1], "ripples along a ring are none"
    assert counted(moons(), 1, 300) == [2, 1] and counted(checkerboard(), 1, 600) == [8, 1]


@on_all
def test_a_marginal_is_the_field_summed_over_the_other_coordinate(schedule):
    for t in (20, 400):
        across = plane.marginal(TOY, schedule, [t], points=101)[:, 0]
        field = plane.field(TOY, schedule, t, points=101, half=plane.HALF)
        summed = field.density.sum(0) * 2 * plane.HALF / 100
        inside = summed > 0.05 * summed.max()
        np.testing.assert_allclose(summed[inside], across[inside], rtol=0.06)


@on_all
def test_noise_takes_what_is_known_of_the_class(schedule):
    x0 = TOY.sample(1000, torch.Generator().manual_seed(0))
    whole = -sum(k / 36 * math.log2(k / 36) for k in range(1, 9))
    found = [plane.class_bits(TOY, schedule, t, x0, 0) for t in (1, 250, 1000)]
    assert found[0] == pytest.approx(whole, rel=0.02) and found[0] > found[1] > found[2] and abs(found[2]) < 0.02
    assert float(plane.entropy(torch.tensor([0.5, 0.5, 0.0]))) == pytest.approx(1)


@on_all
def test_points_that_noise_takes_away_and_brings_back(schedule):
    x0 = TOY.sample(300, torch.Generator().manual_seed(0))
    gone = plane.noising(TOY, schedule, [0, 1, 1000], x0, 0)
    np.testing.assert_allclose(gone.places[0], x0.numpy())
    assert gone.decided[0] == 1 and gone.decided[-1] < 0.4 and abs(gone.places[-1].std() - 1) < 0.15
    for sampler in (DDIM(schedule), Ancestral(schedule)):
        grid = times(1000, 40, "trailing")
        back = plane.denoising(TOY, sampler, TOY.denoiser(schedule), grid, 300, 0)
        assert back.places.shape == (41, 300, 2) and len(back.times) == 41
        assert back.decided[-1] == 1 and back.decided[0] < 0.6 and set(back.classes) <= set(range(8))
        assert abs(back.places[0].std() - 1) < 0.1 and np.linalg.norm(back.places[-1], axis=1).mean() < 0.9
