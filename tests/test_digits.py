"""The embedded default at full size: what a newcomer sees minutes after the first command."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

pytestmark = pytest.mark.slow


def distances(a, b):
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of `python -m diffusion.train`."""
    from conftest import inside

    folder = tmp_path_factory.mktemp("digits")
    assert inside("train", [], folder) == 0
    return folder / "runs" / "digits"


def test_guided_samples_are_digits_of_the_asked_class_and_no_copies(trained, tmp_path):
    """500 samples, scale 2, 50 DDIM steps, judged by a support vector machine that has seen real digits only."""
    from conftest import inside

    words = [f"checkpoint={trained}", "out=s", "num_images=500", "guidance=classifier_free", "guidance.scale=2"]
    assert inside("sample", [*words, "sampler=ddim", "sampler.num_steps=50"], tmp_path) == 0
    samples = np.load(tmp_path / "s" / "samples.npz")
    images = samples["arr_0"].reshape(500, 64).astype(float) * 16 / 255
    labels, (real, real_labels) = samples["arr_1"], load_digits(return_X_y=True)
    judged = SVC(gamma=0.001, C=10).fit(real, real_labels).predict(images)
    assert (judged == labels).mean() >= 0.97
    assert set(judged) == set(range(10))
    ratios = [images[labels == c].std(0).mean() / real[real_labels == c].std(0).mean() for c in range(10)]
    nearest = distances(images, real).min(1)
    figures = {
        "right": (judged == labels).mean(),
        "spread": np.mean(ratios),
        "median nearest": np.median(nearest),
        "nearest": nearest.min(),
    }
    print({k: round(float(v), 3) for k, v in figures.items()})
    assert 0.8 <= figures["spread"] <= 1.25
    assert 0.8 * 18.7 <= figures["median nearest"] <= 1.25 * 18.7
    assert figures["nearest"] > 1  # no exact copy, nor one up to rounding


def test_scores_and_pictures_are_there(trained):
    rows = {r["metric"]: r for r in map(json.loads, (trained / "results.jsonl").read_text().splitlines())}
    assert rows["digits-FID"]["value"] < 60 and rows["digits-IS"]["value"] > 8
    assert (trained / "report.html").is_file()
