"""Runs that an older program has made: they go on to the bits that it would have come to, are sampled and scored."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, inside

OLD = ROOT / "tests" / "old_runs"
COMMON = ["trainer=cpu", "trainer.threads=1", "fingerprint_every=1"]
GMM = ["+experiment=gmm", "data.toy=rings", "model.width=16", "model.blocks=1", "data.num_points=4096"]
GMM += ["data.batch_size=64", "lr_schedule.warmup_steps=10", "log_every=5", "save.every_steps=10", "run_dir=gmm"]
DIGITS = ["+experiment=digits", "model=mlp", "model.width=16", "model.blocks=1", "model.num_classes=10"]
DIGITS += ["data.batch_size=16", "log_every=2", "sampler.num_steps=4", "save.every_steps=4", "run_dir=digits"]
DIGITS += ["callbacks.grid.num_images=10", "callbacks.score.num_images=20"]


@pytest.fixture
def place(digits, tmp_path):
    """A folder with the old runs in it, and the digits where they were."""
    for name in ("gmm", "digits"):
        shutil.copytree(OLD / name, tmp_path / name, symlinks=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    return tmp_path


@pytest.mark.parametrize("name, words, step", [("gmm", GMM, 30), ("digits", DIGITS, 12)])
def test_an_old_run_goes_on_to_the_bits_of_its_own_program(name, words, step, place):
    assert inside("train", [*words, *COMMON, f"trainer.max_steps={step}"], place) == 0
    found = torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)
    found = {**found["state_dict"], **{f"ema {k}": v for k, v in found["ema"].items()}}
    with np.load(OLD / f"{name}_step_{step}.npz") as expected:
        assert found.keys() == set(expected.files)
        assert all((found[key].numpy() == expected[key]).all() for key in expected.files)
    with open(place / name / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == step and len({row["step"] for row in rows}) == len(rows)


def test_an_old_run_is_not_gone_on_with_as_another(place):
    assert inside("train", [*GMM, *COMMON, "lr_schedule.warmup_steps=11", "trainer.max_steps=30"], place) == 2
    assert inside("train", [*GMM, *COMMON, "ema.decays=[0.5]", "trainer.max_steps=30"], place) == 2


def test_an_old_run_is_sampled_and_scored_as_by_its_own_program(place):
    words = ["checkpoint=digits", "num_images=20", "sampler.num_steps=5"]
    assert inside("sample", [*words, "out=s", "labels=[3,7]", "guidance=classifier_free"], place) == 0
    with np.load(place / "s" / "samples.npz") as found, np.load(OLD / "digits_samples.npz") as expected:
        assert (found["arr_0"] == expected["images"]).all() and (found["arr_1"] == expected["labels"]).all()
    assert inside("evaluate", [*words, "metrics=[fid,is]", "out=r.jsonl"], place) == 0
    found, expected = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (place / "r.jsonl", OLD / "digits_scores.jsonl")
    )
    changed = ("commit", "versions", "reference", "neighbours")
    for row, old in zip(found, expected, strict=True):
        assert {k: v for k, v in old.items() if k not in changed} == {k: row.get(k) for k in old if k not in changed}


def test_points_of_an_old_run_are_measured(place):
    words = ["task=errors", "checkpoint=gmm", "errors.num_points=200", "errors.times=5", "errors.num_steps=[10,20]"]
    assert inside("lab", [*words, "samplers=[ddim]", "sampler.num_steps=10", "out=lab"], place) == 0
    assert (place / "lab" / "errors" / "parts.csv").is_file()
    assert inside("report", ["run_dir=gmm"], place) == 0
