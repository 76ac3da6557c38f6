"""The loss on images that are not trained on: recomputed, the same on two ranks and after an interruption."""

import csv
import hashlib
import signal
import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_resume import finish, start

from diffusion.build.door import trained
from diffusion.build.extractors import prepare_digits
from diffusion.build.run import parts_of
from diffusion.config.compose import composed
from diffusion.config.effect import never_held_out
from diffusion.data.digit_sets import SPLITS
from diffusion.data.digits import DigitsDataModule, HeldOutDigitsDataModule
from diffusion.data.mixture import MixtureDataModule
from diffusion.data.shards.index import read_index
from diffusion.training.held_out import HeldOut, split_of

WORDS = ["data=digits_held_out", "trainer=cpu", "trainer.threads=1", "callbacks=none", "data.batch_size=16"]
WORDS += ["trainer.max_steps=20", "log_every=5", "held_out.every_steps=10"]
NAMES = ["held_out/loss", *(f"held_out/loss_q{q}" for q in (1, 2, 3, 4))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The digits with a split test, and their classifier."""
    root = tmp_path_factory.mktemp("data") / "digits_held_out"
    prepare_digits(root, "digits_held_out")
    return root


def table(run) -> dict[int, dict[str, str]]:
    """The rows of metrics.csv by their steps, without what belongs to the machine."""
    with open(run / "metrics.csv") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    return {step: {k: v for k, v in row.items() if "per_second" not in k} for step, row in rows.items()}


def measured(run, step: int) -> list[float]:
    return [float(table(run)[step][name]) for name in NAMES]


# ---- the data ----


def test_one_digit_in_five_is_held_out_by_a_hash_of_its_number(root, digits):
    pixels, labels = np.round(load_digits().images * (255 / 16)).astype(np.uint8), load_digits().target
    held_out = np.array([int(hashlib.sha256(b"%d" % i).hexdigest(), 16) % 5 == 0 for i in range(1797)])
    assert 0.18 < held_out.mean() < 0.22 and read_index(root).splits == SPLITS["digits_held_out"]
    for split, wanted in (("train", ~held_out), ("test", held_out)):
        module = HeldOutDigitsDataModule(root, batch_size=1, split=split)
        images, found, _ = module.samples.batch(np.arange(module.num_images))
        assert np.array_equal(images[:, 0], pixels[wanted]) and np.array_equal(found, labels[wanted])
    assert DigitsDataModule(digits, batch_size=1).num_images == 1797


def test_the_digits_without_a_split_have_the_bytes_they_always_had(digits):
    shards = b"".join(path.read_bytes() for path in sorted(digits.glob("train-*.tar")))
    assert hashlib.sha256(shards).hexdigest().startswith("04a00370bf80e2e03abb3a988651d553")


def test_prepare_makes_the_set_and_says_how_to_train_on_it(call, tmp_path):
    status, output = call("prepare", "source=digits", "dataset=digits_held_out")
    assert status == 0 and "1,431 of split train, 366 of split test" in output
    assert "python -m diffusion.train data=digits_held_out name=digits_held_out\n" in output
    assert read_index(tmp_path / "data/digits_held_out").name == "digits_held_out"
    status, output = call("prepare", f"source={tmp_path}", "dataset=digits_held_out")
    assert status == 2 and "source=digits makes dataset=digits or digits_held_out" in output


# ---- the measurement ----


def mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def word(*counters) -> np.ndarray:
    with np.errstate(over="ignore"):
        found = np.uint64(0)
        for counter in counters:
            found = mixed(np.asarray(found + np.asarray(counter, dtype=np.uint64)))
        return found


def recomputed(run, root, seed: int = 0, stream: int = 14) -> list[float]:
    """The losses of the last checkpoint's raw weights, from the definition, in float64 but for the network."""
    model = trained(str(run), ema=False)
    module = HeldOutDigitsDataModule(root, batch_size=1, split="test")
    numbers = np.arange(module.num_images)
    images, labels, _ = module.samples.batch(numbers)
    x0 = images.double() / 127.5 - 1
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = torch.from_numpy(np.cumprod(1 - betas))
    t = 1 + ((word(seed, stream, 0, numbers) >> np.uint64(32)) * np.uint64(1000) >> np.uint64(32)).astype(np.int64)
    with np.errstate(over="ignore"):
        words = word(seed, stream, 1, numbers)[:, None] + np.arange(32, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        words = mixed(words)
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)).astype(float) + 1) / 2**32))
    angle = (words & np.uint64(0xFFFFFFFF)).astype(float) * (2 * np.pi / 2**32)
    epsilon = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    epsilon = torch.from_numpy(epsilon).reshape(x0.shape)
    level = abar[t - 1].reshape(-1, 1, 1, 1)
    x_t = (level.sqrt() * x0 + (1 - level).sqrt() * epsilon).float()
    with torch.no_grad():
        output = model.denoiser.network(x_t, torch.from_numpy(t).float(), labels)
    loss = ((output.double() - epsilon) ** 2).mean(dim=(1, 2, 3)).numpy()
    quartile = (4 * (t - 1)) // 1000
    return [loss.mean(), *(loss[quartile == q].mean() for q in range(4))]


def test_it_is_the_loss_of_the_raw_weights_on_images_of_another_split(root, command_inside, tmp_path):
    done = command_inside("train", *WORDS, f"data.root={root}", "run_dir=run", "trainer.max_steps=10", check=0)
    assert "366 held-out images of split test, every 10 steps" in done.stdout
    found = measured(tmp_path / "run", 10)
    assert found == pytest.approx(recomputed(tmp_path / "run", root), rel=1e-5)

    command_inside("train", *WORDS, f"data.root={root}", "run_dir=run", check=0)
    longer = measured(tmp_path / "run", 20)
    assert longer == pytest.approx(recomputed(tmp_path / "run", root), rel=1e-5) and longer[0] < found[0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Loss on images not trained on" in page

    words = ["run_dir=without", "held_out.every_steps=0"]
    command_inside("train", *WORDS, f"data.root={root}", *words, check=0)
    assert not any("held_out" in key for key in table(tmp_path / "without")[20])
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "without")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)  # and training is the same


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(root, tmp_path):
    words = [*WORDS, f"data.root={root}", "held_out.batch_size=50", "held_out.num_images=120"]
    finish(start([*words, "run_dir=one"], tmp_path))
    finish(start([*words, "run_dir=two", "trainer.devices=2"], tmp_path))
    for step in (10, 20):
        assert measured(tmp_path / "one", step) == pytest.approx(measured(tmp_path / "two", step), rel=1e-4)
    counted = "120 held-out images of split test"
    assert counted in finish(start([*words, "run_dir=three", "trainer.max_steps=1"], tmp_path))


@pytest.mark.slow
def test_one_that_a_signal_has_ended_is_made_when_the_run_goes_on(root, tmp_path):
    words = [*WORDS, f"data.root={root}", "log_every=1", "held_out.batch_size=1"]
    finish(start([*words, "run_dir=whole"], tmp_path))
    process, stopped = start([*words, "run_dir=stopped"], tmp_path), tmp_path / "stopped"
    while not (stopped / "metrics.csv").exists() or 10 not in table(stopped):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # inside the measurement of step 10, which takes seconds
    assert "Stopped by signal 15 at step 10" in finish(process, 128 + 15)
    assert (stopped / "checkpoints/step_00000010.ckpt").exists() and not table(stopped)[10].get("held_out/loss")
    assert "continuing from step 10" in finish(start([*words, "run_dir=stopped"], tmp_path))
    assert table(stopped) == table(tmp_path / "whole")


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["held_out.split=validation"], "held_out.split=validation is not a split of the set"),
        (["held_out.split=train"], "held_out.split=train is the training split"),
        (["held_out.every_steps=-1"], "held_out.every_steps=-1 must be at least 0"),
        (["held_out.num_images=0"], "held_out.num_images=0 must be at least 1"),
        (["held_out.batch_size=2.5"], "held_out.batch_size=2.5 is not an integer"),
        (["held_out.every_steps=0", "held_out.num_images=5"], "held_out.num_images=5 has no effect"),
        (["held_out=null"], "held_out=null: this group of settings cannot be switched off"),
    ],
)
def test_wrong_settings_are_refused_before_the_run(words, complaint, root, call, tmp_path):
    status, output = call("train", *WORDS, f"data.root={root}", "run_dir=run", *words)
    assert status == 2 and complaint in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["+experiment=gmm", "held_out.split=train"], "held_out.split=train is the training split"),
        (["+experiment=gmm", "held_out.split=test"], "held_out.split=test is not a split of the set modes, which has"),
        (["+experiment=gmm", "held_out.num_images=5"], "held_out.num_images=5 has no effect: data=mixture has no spl"),
        (["data.root={digits}", "held_out.every_steps=5"], "held_out.every_steps=5 has no effect: data=digits has no"),
        (["data.root=nowhere", "held_out.batch_size=5"], "held_out.batch_size=5 has no effect: data=digits has no"),
    ],
)
def test_data_without_a_split_for_it_are_refused_before_the_run(words, complaint, digits, call, tmp_path):
    status, output = call("train", *(word.format(digits=digits) for word in words), "run_dir=run")
    assert status == 2 and complaint in output and not list(tmp_path.iterdir()), output


def test_the_digits_in_a_folder_with_a_split_test_measure_it(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["+experiment=digits", f"data.root={root}", "held_out.num_images=5", "held_out.split=test"]
    assert parts_of([*words, "run_dir=run"]).held_out.num_images == 5
    assert never_held_out(composed("train", ["+experiment=digits", f"data.root={root}", "data.split=test"]))


def test_a_run_is_not_built_that_holds_out_what_it_is_trained_on(tmp_path):
    with pytest.raises(ValueError, match="held_out.split=train is the training split"):
        split_of(HeldOut(split="train"), MixtureDataModule("modes", 8, 4))
    assert split_of(HeldOut(), MixtureDataModule("modes", 8, 4)) is None
    assert split_of(HeldOut(every_steps=0, split="test"), MixtureDataModule("modes", 8, 4)) is None


def test_a_set_that_is_yet_to_be_made_is_asked_for_its_splits_as_well(call, tmp_path):
    status, output = call("train", *WORDS, "data.root=nowhere", "run_dir=run", "data.split=validation")
    assert status == 2 and "data.split=validation is not a split of the set in data.root=nowhere" in output
    assert not (tmp_path / "nowhere").exists()


def test_the_digits_without_a_split_are_not_taken_for_those_with_one(digits, call, tmp_path):
    status, output = call("train", *WORDS, f"data.root={digits}", "run_dir=run")
    assert status == 2 and f"data.root={digits} holds a set without the split test" in output
    assert not (tmp_path / "run").exists()
