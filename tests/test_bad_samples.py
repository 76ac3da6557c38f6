"""Samples that cannot be decoded: named, and either an error or replaced by a neighbour, the same in every layout."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from changing import without_digests
from numbered import BATCH, CLASSES, damaged, number_of, pixels, plan_of, take

from diffusion.data.shards.changes import BadSample, DataChanged
from diffusion.data.shards.index import read_index
from diffusion.data.shards.layout import Layout
from diffusion.data.shards.order import Plan
from diffusion.data.shards.samples import Samples
from diffusion.data.shards.stream import StreamLoader
from diffusion.data.shards.writer import ShardWriter


def test_another_sample_of_the_shard_stands_in_for_a_bad_one_in_every_layout(root, tmp_path, capfd):
    bad = [3, 4, 92, 500]
    index = read_index(damaged(root, tmp_path / "set", bad))
    stands_in = {3: 5, 4: 5, 92: 0, 500: 501}
    expected = plan_of(Samples(index)).locate(np.arange(4 * BATCH))[1]
    wanted = np.array([stands_in.get(number, number) for number in expected])
    for ranks, workers in ((1, 0), (4, 0), (2, 2)):
        samples = Samples(index, on_bad_sample="skip")
        met, marked = [], []
        for rank in range(ranks):
            loader = StreamLoader(samples, plan_of(samples), Layout(BATCH, rank, ranks), num_workers=workers)
            batches = take(loader, 4)
            met.append(torch.stack([number_of(batch["image"]) for batch in batches]))
            marked.append(torch.stack([batch["stand_in"] for batch in batches]))
            assert all((batch["label"] == number_of(batch["image"]) % CLASSES).all() for batch in batches)
        assert (torch.cat(met, dim=1).ravel().numpy() == wanted).all()
        assert (torch.cat(marked, dim=1).ravel().numpy() == np.isin(expected, bad)).all()
        said = capfd.readouterr().err
        named = re.findall(r"skipped: .* shard train-\d+\.tar has changed: sample \d+ \('(\d+)\.png'\) does not", said)
        if not workers:  # of several workers each may meet it before the others know
            assert sorted(map(int, named)) == bad
        assert set(map(int, named)) == set(bad)


def test_more_bad_samples_than_allowed_are_an_error(root, tmp_path):
    index = read_index(damaged(root, tmp_path / "set", range(200, 220)))
    for share, fails in ((0.01, True), (0.0199, False), (0.0198, True)):
        samples = Samples(index, on_bad_sample="skip", max_bad_share=share)
        loader = StreamLoader(samples, plan_of(samples), Layout(BATCH))
        if fails:
            with pytest.raises(BadSample, match=rf"of 1009 samples cannot be decoded, .*data\.max_bad_share={share:g}"):
                take(loader, 4)
        else:
            assert sum(batch["stand_in"].sum().item() for batch in take(loader, 3)) >= 20


def test_where_it_is_an_error_the_loader_says_which_sample_wherever_it_was_decoded(root, tmp_path):
    index = read_index(damaged(root, tmp_path / "set", [7]))
    for workers in (0, 2):
        samples = Samples(index)
        with pytest.raises(
            DataChanged, match=r"^data\.root=.*: shard train-0+\.tar has changed: sample 7 \('0+7\.png'\)"
        ):
            take(StreamLoader(samples, plan_of(samples), Layout(BATCH), num_workers=workers), 3)


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_shard_that_is_gone_is_an_error_whatever_is_skipped(root, tmp_path, on_bad_sample):
    """Not as many bad samples: it would rather be a file system that is not mounted, or another data set."""
    shutil.copytree(root, tmp_path / "set")
    index = read_index(tmp_path / "set")
    (tmp_path / "set" / "train-00004.tar").unlink()
    samples = Samples(index, on_bad_sample=on_bad_sample, max_bad_share=1.0)
    with pytest.raises(DataChanged, match="shard train-00004.tar has changed: the file is missing"):
        take(StreamLoader(samples, plan_of(samples), Layout(BATCH)), 2)


@pytest.mark.parametrize("data", [b"no image", b"\x89PNG\r\n\x1a\n and then nonsense"])
def test_a_sample_that_was_never_an_image_is_no_change(tmp_path, data):
    with ShardWriter(tmp_path / "set", "odd", image_size=2, channels=1, classes=0) as writer:
        for image in (pixels(0), data, pixels(2)):
            writer.write(image)
    for made in (tmp_path / "set", without_digests(tmp_path / "set")):
        with pytest.raises(BadSample, match=r"cannot read sample 1 .* of shard .* has not changed\.$") as caught:
            Samples(read_index(made))[1]
        assert not isinstance(caught.value, DataChanged)
        images, _, stand_ins = Samples(read_index(made), on_bad_sample="skip", max_bad_share=0.5).batch(np.arange(3))
        assert number_of(images).tolist() == [0, 2, 2] and stand_ins.tolist() == [False, True, False]


# ---- in training ----

WORDS = ["callbacks=none", "data.batch_size=64", "data.lanes=8", "log_every=2"]


def test_training_goes_on_counts_and_says_so(digits, command_inside, tmp_path):
    bad = list(range(0, 1797, 60))
    data = damaged(digits, tmp_path / "set", bad, per_shard=225)
    words = [*WORDS, f"data.root={data}", "save.every_steps=3", "data.on_bad_sample=skip"]
    words += ["data.max_bad_share=0.02"]
    index = read_index(data)
    met = np.isin(Plan([shard.samples for shard in index.shards], 64, 8, seed=0).locate(np.arange(640))[1], bad)
    for steps in (5, 10):  # the second goes on counting
        done = command_inside("train", *words, "trainer.accumulate=2", f"trainer.max_steps={steps}", check=0)
        with open(tmp_path / "runs" / "digits" / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {int(row["step"]): int(row["train/stand_ins"]) for row in rows} == {
            step: met[: 64 * step].sum() for step in (2, 4, 5, 6, 8, 10) if step <= steps
        }
        assert f"Bad samples: {met[: 64 * steps].sum()} damaged images were replaced" in done.stdout
        assert len(re.findall("^skipped: ", done.stderr, re.M)) >= met[320 * (steps > 5) : 64 * steps].sum() > 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_training_with_its_name_and_no_traceback(digits, command_inside, tmp_path, workers):
    index = read_index(digits)
    order = Plan([shard.samples for shard in index.shards], 64, 8, seed=0).locate(np.arange(640))[1]
    data = damaged(digits, tmp_path / "set", [order[200]], per_shard=225)  # met in the fourth batch
    words = [*WORDS, f"data.root={data}", "trainer.max_steps=5", "save.every_steps=1", f"data.num_workers={workers}"]
    done = command_inside("train", *words, check=2)
    message = rf"error: data\.root=.*: shard train-\d+\.tar has changed: sample \d+ \('{order[200]:09}\.png'\) does not"
    assert re.search(message, done.stderr) and "Traceback" not in done.stderr
    assert "Training ended at step 2. Run the same command to continue from step 2." in done.stderr  # fetched ahead
    done = command_inside("train", *words, "data.on_bad_sample=skip", check=0)  # the cure
    assert "continuing from step 2" in done.stdout
