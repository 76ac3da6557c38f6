"""What can only fail after training is looked at before it: refused in the first seconds, with nothing written."""

import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import inside
from inceptions import OWN
from torch import nn

from diffusion.build.parts import metrics
from diffusion.data.shards.writer import ShardWriter
from diffusion.metrics.extractors import Extractor
from diffusion.metrics.metric import try_out
from diffusion.metrics.takes import Takes

TINY = ["trainer=cpu", "trainer.max_steps=1", "data.batch_size=4", "model.multipliers=[1]", "schedule.num_timesteps=20"]
TINY += ["model.attention_resolutions=[]", "model.blocks_per_level=1", "schedule.beta_end=0.6", "sampler.num_steps=2"]
FEW = ["callbacks.grid.num_images=4", "callbacks.score.num_images=10", "metrics=[fid]"]


class Odd(nn.Module):
    """uint8 (B, 1, 8, 8) -> whatever is wrong in the way its name says."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong, self.dense = wrong, nn.Linear(64, 3)

    def forward(self, images):
        features = self.dense(images.flatten(1).float())
        if self.wrong == "fails":
            raise RuntimeError("sizes do not match")
        if self.wrong == "nan":
            return features / 0 * 0, features
        answers = {"one": features, "flat": (features[:, 0], features), "row": (features[:1], features)}
        return answers.get(self.wrong, (features, features[:, :1]))


def flat():
    return Odd("flat")


@pytest.fixture
def copy(digits, tmp_path):
    """A data set of digits of this test's own, with its classifier."""
    shutil.copytree(digits, tmp_path / "set")
    return tmp_path / "set"


def assert_refused(status, out, mention, folder, before):
    """One message that says this, exit status 2, before training, and nothing written."""
    assert status == 2 and out.count("error:") == 1 and "Traceback" not in out, out
    assert mention in out, out
    assert "Training" not in out, "training has begun"
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)


def test_scores_while_training_in_more_steps_than_there_are_levels_are_refused(copy, call, tmp_path):
    words = [*TINY, *FEW, f"data.root={copy}", "run_dir=run", "callbacks.score.during.num_steps=21"]
    before = [path.name for path in tmp_path.iterdir()]
    status, out = call("train", *words, "callbacks.score.every_steps=1")
    assert_refused(status, out, "callbacks.score.during.num_steps=21 must be at most 20", tmp_path, before)


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(d, marks=pytest.mark.slow) for d in ("of another network", "text"))]
)
def test_a_damaged_classifier_is_named_before_the_first_step(damage, copy, call, tmp_path):
    path = copy / "classifier.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("thesis")
    else:
        from safetensors.torch import save_file

        save_file({"conv_1.weight": torch.zeros(3)}, path)
    status, out = call("train", *TINY, *FEW, f"data.root={copy}", "run_dir=run")
    assert_refused(status, out, f"extractor.weights={path} is damaged, or not a digit classifier", tmp_path, ["set"])
    assert "Remove it" in out
    path.unlink()
    assert call("train", *TINY, *FEW, f"data.root={copy}", "run_dir=run")[0] == 0


@pytest.mark.parametrize(
    "words, mention",
    [
        (["data.split=tset"], "data.split=tset is not a split"),
        (["logger=wandb", "logger.mode=offline"], "logger=wandb: the package wandb cannot be imported"),
        ([*OWN[:2], "extractor.target=test_early.flat", "extractor.channels=1"], "extractor=own gives [(2,), (2, 3)]"),
        ([*OWN, "extractor.channels=1"], "extractor=own fails on images (2, 1, 8, 8)"),
        ([*OWN], "extractor=own takes 3-channel images"),
    ],
)
def test_what_scores_and_logs_need_is_tried_first(words, mention, digits, call, tmp_path, monkeypatch):
    if "logger=wandb" in words:
        monkeypatch.setitem(sys.modules, "wandb", None)
    status, out = call("train", *TINY, *FEW, *words, f"data.root={digits}", "run_dir=run")
    assert_refused(status, out, mention, tmp_path, [])


@pytest.mark.parametrize("wrong, says", [
    ("fails", "fails on images"), ("nan", "not finite"), ("one", "gives Tensor"), ("flat", "expected (features (B, F)"),
    ("row", "for 2 images"), ("one class", "is needs logits of at least 2 classes"),
])  # fmt: skip
def test_an_extractor_is_tried_on_two_images(wrong, says):
    extractor = Extractor("own", Odd(wrong), Takes(1), "")
    with pytest.raises(ValueError, match="own") as refused:
        try_out(extractor, 1, 8, metrics(["fid", "is"]))
    assert says in str(refused.value)
    if wrong == "one class":
        try_out(extractor, 1, 8, metrics(["fid"]))


def test_a_metric_needs_enough_real_images(digits, call, tmp_path):
    with ShardWriter(tmp_path / "set", "digits", image_size=8, channels=1, classes=10, max_samples=4) as writer:
        for number in range(3):
            writer.write(np.full((1, 8, 8), number, np.uint8), number)
    shutil.copy(digits / "classifier.safetensors", tmp_path / "set")
    words = [*TINY, *FEW, "data.batch_size=1", "metrics=[precision]", f"data.root={tmp_path / 'set'}", "run_dir=run"]
    status, out = call("train", *words)
    assert_refused(status, out, "precision needs at least 4 real images, here are 3", tmp_path, ["set"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A run of one step without scores."""
    folder = tmp_path_factory.mktemp("early")
    assert inside("train", [*TINY, "callbacks=none", f"data.root={digits}", "run_dir=run"], folder) == 0
    return folder / "run"


BLOCKED = {  # name: (what stands in its place, what the message says)
    "report.html": "report.html is a folder",
    "results.jsonl": "results.jsonl is a folder",
    "evaluations": "evaluations is a file",
}
OF_TRAINING = {"metrics.csv": "metrics.csv is a folder", "samples": "samples is a file", "wandb": "wandb is a file"}


def block(run, name):
    """Put a folder in the place of a file, or a file in that of a folder."""
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir() if "." in name else path.touch()


@pytest.mark.parametrize("name, says", (BLOCKED | OF_TRAINING).items())
def test_a_run_folder_whose_files_cannot_be_written_is_refused(name, says, trained, digits, call, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    block(tmp_path / "run", name)
    words = [*TINY, "callbacks=none", f"data.root={digits}", "run_dir=run", "trainer.max_steps=2"]
    status, out = call("train", *words)
    assert_refused(status, out, says, tmp_path, ["run"])


@pytest.mark.parametrize("name, says", BLOCKED.items())
def test_evaluate_looks_where_its_results_go(name, says, trained, call, tmp_path):
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    block(tmp_path / "run", name)
    status, out = call("evaluate", "checkpoint=run", "num_images=12", "sampler.num_steps=2", "metrics=[fid]")
    assert_refused(status, out, says, tmp_path, ["run"])


def test_evaluate_looks_at_the_file_that_its_results_are_added_to(trained, call, tmp_path):
    (tmp_path / "out.jsonl").write_bytes(b"\xff\xfe\x00")
    words = [f"checkpoint={trained}", "num_images=12", "sampler.num_steps=2", "metrics=[fid]", "out=out.jsonl"]
    status, out = call("evaluate", *words)
    assert_refused(status, out, "out=out.jsonl is not a text file", tmp_path, ["out.jsonl"])
