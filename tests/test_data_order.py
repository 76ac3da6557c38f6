"""The order of the samples: every one once per epoch, whatever the numbers, the ranks and the interruptions."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from diffusion.data.shards.layout import Layout, check_batch, check_lanes, choose_lanes
from diffusion.data.shards.order import Plan

UNEVEN = np.random.default_rng(0).integers(40, 260, 64)
SETS = {
    "10000 in 64 uneven shards": np.concatenate([UNEVEN[:63], [10_000 - UNEVEN[:63].sum()]]),
    "10007 in 13 uneven shards": np.array([1, 3, 2000, 17, 1003, 999, 1, 1, 2500, 1400, 83, 1000, 999]),
    "997 in one shard": np.array([997]),
    "5, fewer than lanes": np.array([2, 3]),
}


def epochs_of(plan: Plan, first: int, stop: int) -> dict[int, np.ndarray]:
    epoch, sample = plan.locate(np.arange(first, stop))
    return {int(e): sample[epoch == e] for e in np.unique(epoch)}


@pytest.mark.parametrize("lanes", [1, 8, 30])
@pytest.mark.parametrize("counts", SETS.values(), ids=SETS)
def test_each_sample_comes_once_per_epoch(counts, lanes):
    plan = Plan(counts, batch_size=120, lanes=lanes, seed=5)
    n = plan.num_samples
    epochs = epochs_of(plan, 0, 3 * n + 240)
    for epoch in range(3):
        assert sorted(epochs[epoch]) == list(range(n))


@pytest.mark.parametrize("counts", SETS.values(), ids=SETS)
def test_an_epoch_ends_within_a_batch_for_all_lanes(counts):
    plan = Plan(counts, batch_size=120, lanes=30, seed=5)
    places = np.arange(3 * plan.num_samples)
    epoch, _ = plan.locate(places)
    assert (plan.num_samples * epoch <= places + 120).all()
    assert (places < plan.num_samples * (epoch + 1) + 120).all()


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_global_batches_are_the_same_in_every_layout(ranks, accumulate):
    batch_size = 5040  # divides by ranks * accumulate for all of them
    plan = Plan(SETS["10000 in 64 uneven shards"], batch_size, lanes=16, seed=1)
    _, whole = plan.locate(np.arange(4 * batch_size, 8 * batch_size))
    micro_batches = []
    for rank in range(ranks):
        mine = Plan(plan.counts, batch_size, lanes=16, seed=1)  # each process has its own
        layout = Layout(batch_size, rank, ranks, accumulate)
        micro_steps = range(4 * accumulate, 8 * accumulate)
        micro_batches.append(np.stack([mine.locate(layout.places(m))[1] for m in micro_steps]))
    together = np.stack(micro_batches).reshape(ranks, 4, accumulate, -1).transpose(1, 0, 2, 3)
    assert (together.ravel() == whole).all()


def test_a_look_up_does_not_depend_on_what_was_looked_up_before():
    counts, rng = SETS["10007 in 13 uneven shards"], np.random.default_rng(3)
    walked = Plan(counts, batch_size=24, lanes=8, seed=2)
    _, in_order = walked.locate(np.arange(50_000))
    jumping = Plan(counts, batch_size=24, lanes=8, seed=2)
    for first in rng.integers(0, 49_000, 40):
        assert (jumping.locate(np.arange(first, first + 100))[1] == in_order[first : first + 100]).all()
    scattered = rng.permutation(50_000)[:500]
    assert (jumping.locate(scattered)[1] == in_order[scattered]).all()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_all_ranks_together_read_each_shard_about_once(ranks):
    plan = Plan(SETS["10000 in 64 uneven shards"], batch_size=128, lanes=64, seed=0)
    epoch, sample = plan.locate(np.arange(3 * plan.num_samples))
    rank = np.arange(3 * plan.num_samples) % 128 // (128 // ranks)
    for e in range(3):
        used = [np.unique(plan.shard_of(sample[(rank == r) & (epoch == e)])) for r in range(ranks)]
        assert sum(plan.counts[shards].sum() for shards in used) <= 1.15 * plan.num_samples


def test_at_most_a_window_of_shards_of_a_lane_is_in_use():
    plan = Plan(np.full(400, 50), batch_size=8, lanes=4, seed=0)
    _, sample = plan.locate(np.arange(4000))
    of_lane_0 = plan.shard_of(sample[np.arange(4000) % 8 < 2])
    last_use = {shard: place for place, shard in enumerate(of_lane_0)}
    first_use = {shard: place for place, shard in reversed(list(enumerate(of_lane_0)))}
    in_use = [sum(first_use[s] <= place <= last_use[s] for s in first_use) for place in range(0, len(of_lane_0), 7)]
    assert max(in_use) == 4


def test_epochs_and_seeds_are_shuffled_differently():
    counts = SETS["10000 in 64 uneven shards"]
    orders = [epochs_of(Plan(counts, 100, 1, seed), 0, 20_000)[epoch] for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(10_000))[0, 1]) < 0.5  # whole shards are moved, samples within windows
        assert (np.diff(a) == 1).sum() < 50
        assert all((a == b).mean() < 0.01 for b in orders[:i])


@pytest.mark.parametrize("lanes", [8, 64])
def test_neighbours_in_a_shard_part(lanes):
    """128 shards of 1,000, batches of 128: what lay side by side comes far apart, and a batch is from many shards."""
    plan = Plan(np.full(128, 1000), batch_size=128, lanes=lanes, seed=0)
    n = plan.num_samples
    _, samples = plan.locate(np.arange(n))
    place = np.empty(n, dtype=np.int64)
    place[samples] = np.arange(n)
    in_one_shard = np.arange(n - 1) // 1000 == np.arange(1, n) // 1000
    assert ((np.diff(place // 128) == 0) & in_one_shard).mean() < 5 * 128 / n  # in one batch: chance times five
    assert np.median(np.abs(np.diff(place))[in_one_shard]) > 0.05 * n  # a twentieth of the epoch apart
    assert np.mean([len(np.unique(plan.shard_of(batch))) for batch in samples.reshape(-1, 128)]) > 30
    assert (np.abs(np.diff(samples)) == 1).mean() < 1e-3


def test_the_first_sample_is_drawn_evenly_from_its_window():
    counts, draws = [2, 2, 2], 4000
    first = [int(Plan(counts, 4, 2, seed).locate(np.zeros(1, dtype=int))[1][0]) for seed in range(draws)]
    # lane 0 shuffles the first 3 of the 6 samples that lie in line once the three shards are shuffled
    expected = np.zeros(6)
    for shards in itertools.permutations([[0, 1], [2, 3], [4, 5]]):
        expected[sum(shards, [])[:3]] += draws / 6 / 3
    assert ((np.bincount(first, minlength=6) - expected) ** 2 / expected).sum() < 20.5  # chi2, 5 degrees: p = 0.001


def test_look_ups_among_1e8_samples_are_possible():
    plan = Plan(np.full(10_000, 10_000), batch_size=256, lanes=64, seed=0)
    epoch, sample = plan.locate(np.arange(7 * 10**11, 7 * 10**11 + 512))
    assert set(epoch) == {7000} and len(np.unique(sample)) == 512
    assert 0 <= sample.min() and sample.max() < 10**8
    assert len(np.unique(plan.shard_of(sample))) > 64  # and each lane from its own shards


def test_lanes_follow_from_the_data_set_and_the_batch():
    assert choose_lanes(8, 64) == 8
    assert choose_lanes(1000, 128) == 64
    assert choose_lanes(5, 128) == 4
    assert choose_lanes(64, 120) == 8
    assert choose_lanes(64, 63) == 1
    with pytest.raises(ValueError, match=r"data\.lanes=5 .*data\.batch_size=64.*\[1, 2, 4, 8, 16, 32, 64\]"):
        check_lanes(5, 64)


def test_a_batch_that_does_not_divide_names_the_keys_and_the_nearest_sizes():
    with pytest.raises(
        ValueError,
        match=r"data\.batch_size=100 .*trainer\.devices.*accumulate=2.* data\.batch_size=96 or data\.batch_size=108\.",
    ):
        check_batch(100, ranks=6, accumulate=2)
    with pytest.raises(ValueError, match=r"data\.batch_size=3 .* Give data\.batch_size=8\."):
        check_batch(3, ranks=8)
    with pytest.raises(ValueError, match=r"data\.batch_size=0 "):
        check_batch(0, ranks=1)


def test_what_the_config_checker_imports_is_light():
    modules = "diffusion.data.shards.index, diffusion.data.shards.layout"
    code = f"import sys, {modules}; print(*{{'torch', 'webdataset', 'PIL'}} & {{*sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == ""
