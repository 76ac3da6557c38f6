"""Code of a user's own, in a file and a YAML outside the checkout: a network trains, resumes, samples, scores, reports;
what a checkpoint names is built only if it is of its kind and trusted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, rows

import diffusion

SMALL = ["+experiment=digits", "model=dit", "trainer=cpu", "trainer.threads=1", "trainer.max_steps=24"]
SMALL += ["save.every_steps=6", "callbacks.score.num_images=20", "callbacks.grid.num_images=4"]
SMALL += ["sampler.num_steps=2", "data.batch_size=16"]
YAML = """_target_: own_network.DiT
image_size: ${data.image_size}
channels: ${data.channels}
num_classes: ${data.num_classes}
width: 16
activation: {_target_: own_network.Swish}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of a user's own: the module, and conf/model/dit.yaml beside it."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(ROOT / "tests" / "own_network.py", folder)
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "dit.yaml").write_text(YAML)
    return folder


def start(place: Path, name: str, *words: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"diffusion.{name}", *words], cwd=place, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def ended(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def run(place, digits):
    """A run that was killed once and went on, beside one that nothing interrupted: runs/killed and runs/whole."""
    words = ["--config-dir", "conf", *SMALL, f"data.root={digits}"]
    process, end = start(place, "train", *words, "run_dir=runs/killed"), time.monotonic() + 120
    while not (place / "runs/killed/checkpoints/step_00000006.ckpt").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = ended(start(place, "train", *words, "run_dir=runs/killed"))
    assert "continuing from step" in first
    second = ended(start(place, "train", *words[2:], "run_dir=runs/whole", "hydra.searchpath=[conf]"))
    assert "trust=[own_network]" in second, "training says what loading will need"
    return place / "runs" / "killed"


@pytest.mark.slow
def test_it_resumes_to_the_same_bits(run):
    ours, theirs = (
        torch.load(run.parent / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("killed", "whole")
    )
    for key in ("state_dict", "ema"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in theirs[key])


@pytest.mark.parametrize(
    "name, words",
    [
        pytest.param("sample", ["out=samples", "num_images=2"], marks=pytest.mark.slow),
        pytest.param("evaluate", ["num_images=20", "metrics=[fid]", "sampler.num_steps=2"], marks=pytest.mark.slow),
        pytest.param(
            "lab",
            ["task=errors", "errors.num_images=4", "errors.times=2", "sampler.num_steps=2", "out=lab"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sample", "evaluate", "lab"],
)
def test_each_command_loads_it_when_its_module_is_trusted_and_else_names_the_cure(run, name, words, place):
    without = ended(start(place, name, f"checkpoint={run}", *words), 2)
    assert "model._target_=own_network.DiT" in without and "give 'trust=[own_network]'" in without
    assert without.count("\n") == 1
    ended(start(place, name, f"checkpoint={run}", *words, "trust=[own_network]"))


@pytest.mark.slow
def test_its_scores_are_in_the_report(run, place):
    assert rows(run / "results.jsonl")["fid"]["value"] > 0
    ended(start(place, "report", "runs=runs"))


@pytest.fixture
def inside_place(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(place)
    return place


def changed(run: Path, folder: Path, change) -> Path:
    """A copy of the checkpoint with another configuration."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    change(content["config"])
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


TARGETS = [  # (key of the configuration, what it names, modules that are trusted)
    ("model", "os.system", ["own_network"]),
    ("model", "os.system", ["os"]),
    ("model", "subprocess.Popen", ["subprocess"]),
    ("model", "diffusion.files.write_atomically", ["diffusion"]),
    ("model", "diffusion.process.schedule.vp_linear", ["diffusion.process.schedule"]),
    ("model", "own_network.write_canary", ["own_network"]),
    ("model.activation", "own_network.write_canary", ["own_network"]),
    ("model.activation", "os.system", ["own_network"]),
    ("model.activation", "builtins.exec", ["own_network", "builtins"]),
    ("schedule", "own_network.write_canary", ["own_network"]),
    ("schedule", "own_network.DiT", ["own_network"]),
    ("schedule", "os.system", ["own_network", "os"]),
    ("model", "own_network.Missing", ["own_network"]),
    ("model", "nowhere.Net", ["nowhere"]),
    ("model", "DiT", ["own_network"]),
    ("model", 3, ["own_network"]),
]


@pytest.mark.parametrize("group, target, trust", TARGETS, ids=[f"{g}-{t}-{'+'.join(m)}" for g, t, m in TARGETS])
def test_what_is_of_another_kind_or_not_trusted_is_named_and_not_built(
    run, group, target, trust, inside_place, tmp_path, call, monkeypatch
):
    def change(config):
        *path, last = group.split(".")
        for name in path:
            config = config[name]
        config[last] = {"_target_": target, "path": "canary", "command": "touch canary"} | (
            {k: v for k, v in config[last].items() if k != "_target_"} if group == "model" else {}
        )

    monkeypatch.chdir(tmp_path)
    path = changed(run, tmp_path, change)
    status, out = call("sample", f"checkpoint={path}", "out=samples", f"trust=[{','.join(trust)}]")
    assert status == 2 and str(target) in out and out.count("error:") == 1 and "Traceback" not in out, out
    assert not list(tmp_path.rglob("canary")) and not (tmp_path / "samples").exists()


def test_an_own_network_is_loaded_whole_with_what_is_in_no_checkpoint(run, inside_place):
    from diffusion.build import door

    state = torch.get_rng_state()
    network = door.trained(str(run), trust=["own_network"]).denoiser.network
    assert torch.equal(torch.get_rng_state(), state)
    side = torch.linspace(-1, 1, 16)[:, None] * torch.arange(1, 17)
    assert torch.equal(network.position, side.sin()) and np.isfinite(network.position.numpy()).all()
    assert type(network.time[1]).__name__ == "Swish"


TINY = ["callbacks=none", "trainer=cpu", "trainer.threads=1", "model.blocks_per_level=1", "data.batch_size=8"]
TINY += ["log_every=2", "save.every_steps=2", "run_dir=run", "trainer.max_steps=4"]


@pytest.fixture
def tiny(inside_place, digits, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words, name="train": call(name, *TINY, f"data.root={digits}", *words)


def test_a_callback_is_added_by_name_and_goes_on_with_its_state(tiny, tmp_path):
    words = [
        "+callbacks.steps._target_=own_network.Steps",
        "+callbacks.steps.path=seen.json",
        "+callbacks.steps.every=7",
    ]
    assert tiny(*words)[0] == 0
    assert tiny(*words, "trainer.max_steps=6")[0] == 0
    assert json.loads((tmp_path / "seen.json").read_text()) == {"seen": 6, "every": 7}


def test_a_logger_is_added_by_name_or_chosen_and_one_that_fails_does_not_end_the_run(tiny, tmp_path):
    """Its rows are those of metrics.csv."""
    status, out = tiny("+logger.rows._target_=own_network.Rows", "+logger.rows.save_dir=.")
    assert status == 0, out
    table = [line.split(",") for line in (tmp_path / "own" / "version_0" / "metrics.csv").read_text().splitlines()]
    ours = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    loss, theirs = ours[0].index("train/loss"), table[0].index("train/loss")
    assert [float(row[theirs]) for row in table[1:]] == pytest.approx([float(row[loss]) for row in ours[1:]])
    status, out = tiny("run_dir=other", "+logger.rows={_target_: own_network.Rows, save_dir: b, fail_at: 4}")
    assert status == 0 and out.count("logger.rows has failed. The run continues without it. the server is gone") == 1


def test_arguments_of_lightnings_trainer_are_passed_on(tiny, tmp_path):
    status, out = tiny("+trainer.profiler=simple", "+trainer.enable_model_summary=true")
    assert status == 0 and "Total params" in out, out
    assert "run_training_batch" in (tmp_path / "run" / "fit-profile.txt").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["+callbacks.steps.path=x"],
            "callbacks.steps has no _target_. To add a part",
        ),
        (["+callbacks.scor.every_steps=3"], "Did you mean score?"),
        (["callbacks.steps._target_=own_network.Steps"], "Unknown setting: callbacks.steps._target_"),
        (["+callbacks.steps._target_=own_network.Steps"], "callbacks.steps"),
        (["+callbacks.steps._target_=own_network.Nothing"], "callbacks.steps"),
        (["+callbacks.steps._target_=own_network.Swish"], "must be a subclass of pytorch_lightning.Callback"),
        (["+logger.rows._target_=own_network.Swish"], "must be a subclass of pytorch_lightning.loggers.Logger"),
        (["+trainer.profilr=simple"], "Did you mean profiler?"),
        (["+trainer.profiler=5"], "trainer"),
        (["+trainer.max_epochs=5"], "+trainer.max_epochs cannot be given: give trainer.max_steps."),
        (["trainer.profiler=simple"], "Unknown setting: trainer.profiler"),
        (["--config-dir", "nowhere"], "nowhere: config folder not found"),
        (["hydra.searchpath=nowhere"], "a list of config folders is needed"),
        (["model=dit"], "Unknown option: model=dit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_part_that_cannot_be_is_refused_by_name(tiny, words, message, tmp_path):
    status, out = tiny(*words)
    assert status == 2 and message in out and out.count("error:") == 1 and "Traceback" not in out, out
    assert not (tmp_path / "run").exists()


PARTS = {
    "sampler/two_step.yaml": "# Two steps at once.\ndefaults: [_plan, _self_]\n_target_: own_parts.TwoStep\n"
    "_partial_: true\nnum_steps: 5\nweight: 0.5  # of the step before\n",
    "schedule/sigmoid.yaml": "_target_: own_parts.Sigmoid\nnum_timesteps: 1000\nwidth: 5.0\n",
    "objective/huber.yaml": "_target_: own_parts.Huber\n_partial_: true\nprediction: epsilon\nbeta: 1.0\n"
    "label_dropout: 0.0\n",
    "data/stripes.yaml": "# Stripes.\n_target_: own_parts.Stripes\nname: stripes\nroot: null\nsplit: train\n"
    "image_size: 8\nchannels: 1\nnum_classes: 2\nbatch_size: 8\nflip: false\nlanes: null\ndigest: null\nnumber: 64\n"
    "side: 8\n",
    "metric/centre.yaml": "# Distance of the means.\n_target_: own_parts.Centre\n",
}


@pytest.fixture
def parts(tmp_path):
    """A folder with conf/, which has an option for each class of own_parts.py, a module on the path of the tests."""
    for name, text in PARTS.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    return tmp_path


def test_a_sampler_a_schedule_an_objective_and_a_metric_work_everywhere_ours_do(parts, digits, call):
    def done(name, *words, status=0):
        found, out = call(name, "--config-dir", "conf", *words)
        assert found == status, out
        return out

    words = ["schedule=sigmoid", "schedule.width=6", "sampler=two_step", "objective=huber", "metrics=[fid,centre]"]
    words += ["callbacks.score.num_images=20", "callbacks.grid.num_images=4", "run_dir=run", f"data.root={digits}"]
    out = done("train", *words, "trainer=cpu", "trainer.max_steps=4", "data.batch_size=8", "model.blocks_per_level=1")
    assert "trust=[own_parts]" in out
    found = rows(parts / "run" / "results.jsonl")
    assert found["centre"]["metric"] == "digits-centre distance" and found["fid"]["sampler"] == "twostep"
    assert "centre distance" in (parts / "run" / "report.html").read_text()

    trusted = ["checkpoint=run", "trust=[own_parts]"]
    done("sample", *trusted, "num_images=3", "out=a", "sampler=two_step", "sampler.weight=0.4")
    refused = done("sample", *trusted, "out=b", "sampler=two_step", "sampler.weight=2", status=2)
    assert "sampler.weight=2 is outside [0, 1]" in refused
    assert "Did you mean two_step?" in done("sample", *trusted, "out=b", "sampler=two_stepp", status=2)
    assert "centre needs at least 3 images" in done("evaluate", *trusted, "num_images=2", "metrics=[centre]", status=2)
    assert "schedule._target_=own_parts.Sigmoid" in done("sample", "checkpoint=run", "out=b", status=2)
    swept = ["task=sweep", "num_images=20", "sweep.num_steps=[2]", "sweep.eta=[]", "sweep.large=false"]
    done("evaluate", *trusted, *swept, "sweep.samplers=['two_step weight=0.3']", f"data.root={digits}")
    done("lab", "task=errors", "samplers=[two_step,ddim]", "errors.num_steps=[20,40,80]", "out=lab")
    model = diffusion.load(parts / "run", trust=["own_parts"], config_dirs=[parts / "conf"], device="cpu")
    with np.load(parts / "a" / "samples.npz") as made:
        assert np.array_equal(model.sample(3, sampler="two_step", weight=0.4), made["arr_0"])


def test_data_of_ones_own_train_resume_and_score(parts, call):
    """Held-out images of their own split as well; the same batches when the run goes on."""
    words = ["--config-dir", "conf", "data=stripes", "name=stripes", "trainer=cpu", "model.blocks_per_level=1"]
    words += ["model.num_classes=2", "callbacks=none", "held_out.every_steps=2", "log_every=1"]
    for run, steps in (("whole", [6]), ("stopped", [2, 6])):
        for last in steps:
            status, out = call("train", *words, f"run_dir={run}", f"trainer.max_steps={last}", "save.every_steps=2")
            assert status == 0, out
    assert "trust=[own_parts]" in out and "16 held-out images" in out
    ours, theirs = (
        torch.load(parts / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "stopped")
    )
    assert all(torch.equal(ours["state_dict"][k], theirs["state_dict"][k]) for k in ours["state_dict"])
    words = ["checkpoint=whole", "metrics=[fid]", "num_images=12", "sampler.num_steps=2", "extractor=custom"]
    words += ["extractor.name=mine", "extractor.target=own_parts.features", "extractor.channels=1"]
    status, out = call("evaluate", *words)
    assert status == 2 and "give 'trust=[own_parts]'" in out, out
    status, out = call("evaluate", *words, "trust=[own_parts]")
    assert status == 0 and "mine-FID" in out, out


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.image_size=16", "model.attention_resolutions=[8]"], "data.image_size=16"),
        (["data.root=x"], "data.root=x"),
        (["data.number=0"], "data.number=0 must be at least 1"),
        (["data.split=validation"], "data.split=validation"),
        (["data._target_=own_parts.Sigmoid"], "data._target_=own_parts.Sigmoid is not a data module"),
    ],
)
def test_data_of_ones_own_that_cannot_be_are_refused(parts, call, words, message):
    common = ["--config-dir", "conf", "data=stripes", "model.num_classes=2", "callbacks=none", "run_dir=run"]
    status, out = call("train", *common, *words)
    assert status == 2 and message in out and "Traceback" not in out, out
    assert not (parts / "run").exists()
