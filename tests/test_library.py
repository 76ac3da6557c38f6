"""diffusion.load: the images of the command, byte for byte, in a program, in threads and in a notebook."""

import contextlib
import io
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, inside

import diffusion

SMALL = ["trainer=cpu", "trainer.max_steps=3", "callbacks=none", "data.batch_size=8", "model.blocks_per_level=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("library")
    words = [*SMALL, "objective.label_dropout=0.2", f"data.root={digits}", "run_dir=run", "ema.decays=[0.5]"]
    assert inside("train", words, folder) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return diffusion.load(run, device="cpu")


SAME = [  # (arguments of `sample`, words of the command)
    ({}, []),
    ({"seed": 3, "num_steps": 4, "sampler": "ddim", "eta": 0.5}, ["seed=3", "sampler.num_steps=4", "sampler.eta=0.5"]),
    (
        {"sampler": "heun", "num_steps": 3, "guidance": 2.0, "labels": [3, 7]},
        ["sampler=heun", "sampler.num_steps=3", "guidance=classifier_free", "guidance.scale=2.0", "labels=[3,7]"],
    ),
    (
        {"num_steps": 3, "batch_size": 4, "spacing": "quadratic"},
        ["sampler.num_steps=3", "batch_size=4", "sampler.spacing=quadratic"],
    ),
    ({"spacing": [900, 400.5, 1], "clip_x0": False}, ["sampler.spacing=[900,400.5,1]", "sampler.clip_x0=false"]),
]


@pytest.mark.parametrize("arguments, words", SAME, ids=range(len(SAME)))
def test_the_images_are_those_of_the_command(model, run, arguments, words, tmp_path):
    images = model.sample(6, **arguments)
    assert inside("sample", [f"checkpoint={run}", "out=out", "num_images=6", "trainer=cpu", *words], tmp_path) == 0
    with np.load(tmp_path / "out" / "samples.npz") as found:
        assert images.dtype == np.uint8 and np.array_equal(images, found["arr_0"])
        assert np.array_equal(images.labels, found["arr_1"])


@pytest.mark.parametrize("ema, words", [(False, "ema=false"), (0.5, "ema=0.5")])
def test_the_weights_are_chosen_as_in_the_command(run, ema, words, tmp_path):
    images = diffusion.load(str(run), ema=ema, device="cpu").sample(2, num_steps=2)
    command = [f"checkpoint={run}", "out=out", "num_images=2", "sampler.num_steps=2", "trainer=cpu", words]
    assert inside("sample", command, tmp_path) == 0
    with np.load(tmp_path / "out" / "samples.npz") as found:
        assert np.array_equal(images, found["arr_0"])


def test_two_threads_load_and_sample_at_once(run):
    """Each gets the images that it would get alone, and torch's generator is where it was."""
    state, found = torch.get_rng_state(), {}

    def work(k):
        found[k] = diffusion.load(run, device="cpu").sample(3, seed=k, num_steps=2, eta=0.5 * (k % 3))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model = diffusion.load(run, device="cpu")
    for k in range(4):
        assert np.array_equal(found[k], model.sample(3, seed=k, num_steps=2, eta=0.5 * (k % 3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_printed_unless_it_is_asked_for(run):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        model = diffusion.load(run, device="cpu")
        model.sample(2, num_steps=2)
    assert (out.getvalue(), err.getvalue()) == ("", "")
    with contextlib.redirect_stderr(err):
        model.sample(2, num_steps=2, progress=True)
    assert "sampling: 2 images" in err.getvalue()


def test_a_damaged_checkpoint_is_passed_over_with_a_python_warning(run, tmp_path, capfd):
    copy = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (copy / "checkpoints" / "step_00000004.ckpt").write_bytes(b"half")
    capfd.readouterr()
    with pytest.warns(UserWarning, match="step_00000004.ckpt"):
        assert diffusion.load(copy, device="cpu").step == 3
    assert capfd.readouterr() == ("", "")


def test_images_become_pil_images(model):
    images = model.sample(2, num_steps=2)
    (first, second), listed = images.pil(), model.sample(2, num_steps=2, as_pil=True)
    assert first.mode == "L" and first.size == (8, 8) and np.array_equal(np.asarray(second), images[1, ..., 0])
    assert [one.tobytes() for one in listed] == [first.tobytes(), second.tobytes()]
    assert images[0].pil()[0].tobytes() == first.tobytes()


def test_denoiser_schedule_and_walk_are_there(model):
    visits = list(model.walk(2, num_steps=3))
    images = model.sample(2, num_steps=3)
    last = ((visits[-1].x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert len(visits) == 3 and np.array_equal(last.numpy(), images)
    assert model.schedule(1000).alpha < 0.01 and model.num_classes == 10 and model.image_shape == (1, 8, 8)
    x = torch.randn(2, 1, 8, 8)
    assert model.denoiser(x, 500.0, torch.tensor([1, 2])).x0.shape == x.shape
    assert "step 3" in repr(model)


WRONG = [
    ({"num_step": 3}, "Unknown setting: sampler.num_step. Did you mean sampler.num_steps?"),
    ({"num_steps": -1}, "sampler.num_steps=-1 must be at least 1"),
    ({"num_steps": 2000}, "sampler.num_steps=2000"),
    ({"num_steps": 2.5}, "sampler.num_steps=2.5 is not an integer"),
    ({"sampler": "dim"}, "Unknown option: sampler=dim. Did you mean ddim?"),
    ({"labels": [10]}, "labels=[10]: this model has the classes 0 to 9"),
    ({"labels": ["a"]}, "labels=[a] is not a list of integers"),
    ({"eta": 2}, "sampler.eta=2 is outside [0, 1]"),
    ({"eta": float("nan")}, "sampler.eta"),
    ({"rho": 3}, "sampler.rho=3 has no effect"),
    ({"num_images": 0}, "num_images=0 must be at least 1"),
    ({"seed": -1}, "seed=-1 is outside"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"guidance": "strong"}, "guidance.scale=strong is not a number"),
    ({"sampler": "ancestral_learned"}, "learned"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[str(a) for a, _ in WRONG])
def test_a_wrong_setting_is_an_exception_with_the_commands_message(model, arguments, message):
    with pytest.raises(ValueError) as caught:
        model.sample(**{"num_images": 2, **arguments})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given, arguments, message",
    [
        ("nowhere", {}, "checkpoint=nowhere does not exist"),
        (".", {}, "has no usable checkpoint"),
        ("run", {"ema": 0.9}, "ema=0.9"),
        ("run", {"ema": 2}, "ema=2"),
        ("run", {"device": "tpu"}, "trainer.accelerator=tpu must be one of auto, cpu, gpu"),
        ("run", {"precision": "fp8"}, "trainer.precision=fp8"),
        ("run", {"trust": "mine"}, "give a list of modules"),
        ("run", {"trust": ["os.path; x"]}, "trust"),
        ("run", {"config_dirs": ["nowhere"]}, "nowhere: config folder not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_an_exception_with_the_commands_message(run, given, arguments, message, monkeypatch):
    monkeypatch.chdir(run.parent)
    with pytest.raises(ValueError) as caught:
        diffusion.load(given, **arguments)
    assert message in str(caught.value)


def test_importing_takes_no_torch():
    code = "import sys, diffusion; print(diffusion.__version__, 'torch' in sys.modules, 'omegaconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["False", "False"]
    with pytest.raises(AttributeError):
        diffusion.nothing  # noqa: B018
