"""The score-based experiments as their commands run them.

FULL_SIZE=1 pytest -m slow tests/test_score_runs.py      the digits with all of their 1,600 steps, else 1,200
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import inside

from diffusion.build import door, extractors
from diffusion.lab.training_error import POINTS_OF_A_QUARTER, loss_by_quarter

pytestmark = pytest.mark.slow


@pytest.fixture
def digits_run(tmp_path):
    """The run folder of `python -m diffusion.train +experiment=ncsn_digits`."""
    shorter = [] if os.environ.get("FULL_SIZE") else ["trainer.max_steps=1200", "callbacks.grid.num_images=10"]
    assert inside("train", ["+experiment=ncsn_digits", *shorter], tmp_path) == 0
    return tmp_path / "runs" / "ncsn_digits"


def test_annealed_langevin_makes_digits(digits_run, tmp_path):
    """By the digit classifier: nine in ten are recognised with confidence 0.9, all classes within a factor of three;
    digits-FID below 82.5, three times that of the guided DDPM run with as many images."""
    rows = {r["name"]: r for r in map(json.loads, (digits_run / "results.jsonl").read_text().splitlines())}
    assert rows["fid"]["value"] < 82.5 and rows["fid"]["sampler"] == "annealedlangevin" and rows["fid"]["nfe"] == 161
    words = [f"checkpoint={digits_run}", "out=s", "num_images=500", "sampler=annealed_langevin", "sampler.num_steps=40"]
    assert inside("sample", [*words, "sampler.visits=4", "sampler.step_size=0.19"], tmp_path) == 0
    images = torch.from_numpy(np.load(tmp_path / "s" / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    classifier = extractors.digit_extractor([tmp_path / "data" / "digits" / extractors.CLASSIFIER], None, None)
    sure, judged = classifier([images]).logits.softmax(1).max(1)
    counts = judged.bincount(minlength=10)
    assert (sure >= 0.9).double().mean() >= 0.9
    assert counts.min() >= 500 / 10 / 3 and counts.max() <= 500 / 10 * 3


@pytest.mark.parametrize("toy", ["modes", "checkerboard"])
def test_a_trained_network_is_near_the_exact_score_in_every_quarter_of_time(toy, tmp_path):
    """Excess of v's loss over that of the exact denoiser: at most 5 %."""
    assert inside("train", ["+experiment=gmm", f"data.toy={toy}"], tmp_path) == 0
    model = door.trained(str(tmp_path / "runs" / "gmm"))
    mixture = door.data_of(model).mixture
    points = mixture.sample(POINTS_OF_A_QUARTER, torch.Generator().manual_seed(0))
    found = loss_by_quarter(model.denoiser, mixture, model.denoiser.schedule, "v", points, 0)
    for quarter, (irreducible, excess) in enumerate(found, 1):
        print(f"{toy}, quarter {quarter}: excess {excess / irreducible:.2%} of the irreducible loss")
        assert excess <= 0.05 * irreducible
