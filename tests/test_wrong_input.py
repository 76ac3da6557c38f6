"""What a user gets wrong is answered with one message that names it, exit status 2, and nothing written."""

import shutil

import pytest
import torch
from conftest import inside

WRONG = {
    "unknown experiment": ("train", ["+experiment=digts"], ["experiment=digts", "digits", "cifar10"]),
    "experiment without plus is understood, its name is not": ("train", ["experiment=x"], ["experiment=x"]),
    "misspelt group": ("train", ["modl=unet_8"], ["modl", "model"]),
    "unknown option": ("train", ["sampler=dim"], ["sampler=dim", "ddim", "ancestral"]),
    "misspelt key": ("train", ["trainer.max_step=4"], ["trainer.max_step", "trainer.max_steps"]),
    "key inside a partial": ("train", ["+sampler.etta=0.5"], ["sampler.etta", "eta"]),
    "key inside a partial of another package": ("train", ["+optimizer.lrr=1"], ["optimizer", "lrr"]),
    "wrong type": ("train", ["optimizer.lr=fast"], ["optimizer.lr=fast", "a number"]),
    "wrong type of integer": ("train", ["data.batch_size=1.5"], ["data.batch_size=1.5", "an integer"]),
    "negative lr": ("train", ["optimizer.lr=-1e-3"], ["optimizer.lr=-0.001", "above 0"]),
    "batch not divisible": (
        "train", ["data.batch_size=10", "trainer.devices=3"], ["data.batch_size=10", "trainer.devices", "_size=12"],
    ),
    "accumulation not divisible": ("train", ["trainer.accumulate=5"], ["data.batch_size=64", "trainer.accumulate=5"]),
    "more steps than levels": ("train", ["sampler.num_steps=1001"], ["sampler.num_steps=1001", "1000"]),
    "eta of 2": ("train", ["sampler.eta=2"], ["sampler.eta=2", "[0, 1]"]),
    "missing data": (
        "train", ["+experiment=lsun_church"],
        ["data/lsun_church", "python -m diffusion.prepare source=church_outdoor_train_lmdb dataset=lsun_church"],
    ),
    "bare word": ("train", ["digits"], ["'digits'", "+experiment=digits"]),
    "unknown metric": ("train", ["metrics=[fid,fit]"], ["metrics", "fit"]),
    "guidance without classes": ("train", ["model.num_classes=0", "objective.label_dropout=0"], ["guidance.scale=2.0"]),
    "null where a value is needed": ("train", ["save.keep=null"], ["save.keep=null", "an integer"]),
    "text where the default is null": ("train", ["trainer.threads=two"], ["trainer.threads=two", "an integer"]),
    "a number that is no option": ("train", ["extractor.name=foo"], ["extractor.name=foo", "inception, digits"]),
    "guidance of a model that always saw its labels": (
        "train", ["objective.label_dropout=0"], ["guidance.scale=2.0", "objective.label_dropout"],
    ),
    "no checkpoint given": ("sample", ["out=x"], ["checkpoint"]),
    "checkpoint that is not there": ("sample", ["checkpoint=nowhere", "out=x"], ["checkpoint=nowhere"]),
    "neither checkpoint nor images": ("evaluate", [], ["checkpoint=PATH", "images=PATH"]),
    "images without reference": ("evaluate", ["images=x"], ["reference=PATH"]),
    "unknown source": ("prepare", ["source=nothing"], ["source=nothing", "digits"]),
}  # fmt: skip


def assert_refused(done, mentions, folder, before=()):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stdout + done.stderr
    for word in mentions:
        assert word in done.stderr, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == sorted(before)


@pytest.mark.parametrize("name, words, mentions", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(name, words, mentions, command, tmp_path):
    assert_refused(command(name, *words), mentions, tmp_path)


def test_debug_adds_the_traceback(command):
    done = command("train", "sampler.eta=2", "debug=true")
    assert done.returncode == 2 and "Traceback" in done.stderr and "sampler.eta=2" in done.stderr


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "prepare", "report"])
def test_help_shows_what_can_be_set(name, command):
    done = command(name, "--help", check=0)
    assert f"python -m diffusion.{name}" in done.stdout and "debug=false" in done.stdout


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, digits):
    """A run of two steps, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("small")
    words = ["callbacks=none", "trainer.max_steps=2", "save.every_steps=1", "data.batch_size=8", f"data.root={digits}"]
    assert inside("train", [*words, "run_dir=run"], folder) == 0
    return folder / "run", words


def test_a_run_folder_of_another_configuration_is_refused(small_run, command, tmp_path):
    run, words = small_run
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    done = command("train", *words, "run_dir=run", "optimizer.lr=1e-3", "model.width=64")
    mentions = ["optimizer.lr: was 0.002, is 0.001", "model.width: was 32, is 64", "run_dir=run_2"]
    assert_refused(done, mentions, tmp_path, ["run"])
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_what_changes_nothing_that_is_trained_may_differ(small_run, command, tmp_path):
    run, words = small_run
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    done = command("train", *words, "run_dir=run", "sampler.num_steps=7", "save.keep=1", "data.num_workers=1", check=0)
    assert "Already complete (2 steps)" in done.stdout


def test_a_folder_of_something_else_is_refused(command, tmp_path, digits):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = command("train", "run_dir=mine", f"data.root={digits}")
    assert_refused(done, ["run_dir=mine", "no config.yaml"], tmp_path, ["mine"])


@pytest.mark.parametrize("kind", ["truncated", "of another model", "of another program", "no checkpoint"])
def test_a_wrong_checkpoint_is_refused(kind, small_run, command_inside, tmp_path):
    source = (small_run[0] / "checkpoints" / "last.ckpt").resolve()
    path = tmp_path / "given.ckpt"
    if kind == "truncated":
        path.write_bytes(source.read_bytes()[:100_000])
    elif kind == "of another model":
        content = torch.load(source, weights_only=True)
        content["config"]["model"]["multipliers"] = [1, 2, 2]
        torch.save(content, path)
    elif kind == "of another program":
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    else:
        path.write_text("thesis")
    done = command_inside("sample", "checkpoint=given.ckpt", "out=samples")
    assert_refused(done, ["checkpoint=given.ckpt"], tmp_path, ["given.ckpt"])


def test_paths_may_hold_anything(small_run, command_inside, tmp_path):
    odd = "a b=c,[d]{e} 'f' (g)"
    (tmp_path / odd).mkdir()
    shutil.copytree(small_run[0], tmp_path / odd / "run", symlinks=True)
    quick = ["num_images=2", "sampler.num_steps=2"]
    command_inside("sample", f"checkpoint={odd}/run", f"out={odd}/out", *quick, check=0)
    command_inside("sample", f"checkpoint={odd}/run/checkpoints/last.ckpt", f"out={odd}/out, too", *quick, check=0)
    for name in ("out", "out, too"):
        assert sorted(p.name for p in (tmp_path / odd / name).iterdir()) == ["grid.png", "samples.npz"]
    done = command_inside("sample", f"checkpoint={odd}/run", f"out={odd}/out", *quick)
    assert done.returncode == 2 and "overwrite=true" in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(small_run, command_inside, tmp_path):
    run, words = small_run
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / "checkpoints" / "step_00000002.ckpt"
    whole = torch.load(path, weights_only=True)["state_dict"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    done = command_inside("train", *words, "run_dir=run", check=0)
    assert "step_00000002.ckpt is not used: its sha256" in done.stdout and "continuing from step 1" in done.stdout
    assert path.with_suffix(".ckpt.damaged").is_file()
    again = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(whole[k], again[k]) for k in whole)
