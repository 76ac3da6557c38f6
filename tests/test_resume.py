"""A run that is killed and started again ends with the very weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, inside

STEPS = 40
PLAIN = ["callbacks=none", "trainer.threads=1", f"trainer.max_steps={STEPS}", "save.every_steps=6", "log_every=10"]
PLAIN += ["data.batch_size=16"]


def start(words, cwd, **environment: str) -> subprocess.Popen:
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | environment
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion.train", *words],
        cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def whole(words, folder: Path, name: str = "whole") -> None:
    """The run that nothing interrupts."""
    assert inside("train", [*words, f"run_dir={name}"], folder) == 0


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


def state(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    flat = {f"weights {k}": v for k, v in checkpoint["state_dict"].items()}
    flat |= {f"ema {k}": v for k, v in checkpoint["ema"].items()}
    for i, values in checkpoint["optimizer_states"][0]["state"].items():
        flat |= {f"optimizer {i} {k}": v for k, v in values.items()}
    return flat


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = state(folder), state(other)
    assert ours.keys() == theirs.keys()
    different = [k for k in ours if not torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k]))]
    assert not different, different


LAYOUTS = [
    pytest.param([], [18], id="plain"),
    pytest.param([], [6, 18, 30], id="plain, three times", marks=pytest.mark.slow),
    pytest.param(
        ["data.num_workers=2", "model.dropout=0.2", "trainer.accumulate=2"],
        [6, 18, 30],
        id="workers, dropout, twice",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("words, steps", LAYOUTS)
def test_killed_and_started_again_it_ends_with_the_same_bits(words, steps, digits, tmp_path):
    words = [*PLAIN, *words, f"data.root={digits}"]
    whole(words, tmp_path)
    killed = tmp_path / "killed"
    for step in steps:
        process = start([*words, "run_dir=killed"], tmp_path)
        wait_for(killed / "checkpoints" / f"step_{step:08d}.ckpt", process)
        time.sleep(0.005 * step)  # somewhere in the steps that follow
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.1)  # 100 ms later the lock must be free
    output = finish(start([*words, "run_dir=killed"], tmp_path))
    assert "continuing from step" in output
    assert_same(tmp_path / "whole", killed)
    rows = [(p / "metrics.csv").read_text().splitlines() for p in (tmp_path / "whole", killed)]
    speed = rows[0][0].split(",").index("train/images_per_second")
    without_speed = [[[f for i, f in enumerate(r.split(",")) if i != speed] for r in lines] for lines in rows]
    assert without_speed[0] == without_speed[1]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=["TERM", "INT", "USR1"],
)
def test_a_signal_saves_and_exits_with_its_number(number, digits, tmp_path):
    words = [*PLAIN, f"data.root={digits}"]
    process = start([*words, "run_dir=stopped", "trainer.max_steps=4000"], tmp_path)
    wait_for(tmp_path / "stopped" / "checkpoints" / "step_00000006.ckpt", process)
    process.send_signal(number)
    output = finish(process, 128 + number)
    last = torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"Stopped by signal {int(number)} at step {last}. Run the same command to continue." in output
    assert last <= STEPS, f"the signal took {last - 6} steps to be obeyed"
    whole(words, tmp_path, "stopped")
    whole(words, tmp_path)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_start_that_gets_further_says_so_to_its_job_and_one_that_does_not_says_nothing(digits, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("DIFFUSION_NOT_YET", str(mark))  # of slurm/job.sh
    words = [*PLAIN, "trainer.max_steps=4", f"data.root={digits}", "run_dir=run"]
    for vain in (False, True):
        mark.touch()
        assert inside("train", words, tmp_path) == 0
        assert mark.exists() == vain


@pytest.mark.slow
def test_accumulation_may_change_on_resume(digits, tmp_path):
    words = [*PLAIN, "model.dropout=0", f"data.root={digits}"]
    whole(words, tmp_path)
    whole([*words, "trainer.max_steps=13"], tmp_path, "other")
    whole([*words, "trainer.accumulate=4"], tmp_path, "other")
    ours, theirs = state(tmp_path / "whole"), state(tmp_path / "other")
    for name, value in ours.items():
        if name.startswith("weights"):
            torch.testing.assert_close(theirs[name], value, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_two_processes_never_share_a_run_folder(digits, tmp_path):
    words = [*PLAIN, f"data.root={digits}", "run_dir=shared", "trainer.max_steps=4000"]
    first = start(words, tmp_path)
    wait_for(tmp_path / "shared" / "checkpoints" / "step_00000006.ckpt", first)
    output = finish(start(words, tmp_path), status=2)
    assert "in use by another process" in output and str(first.pid) in output
    assert first.poll() is None
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_two_processes_train_as_one(digits, tmp_path):
    words = [*PLAIN, "model.dropout=0", "trainer=cpu", "log_every=1", "trainer.max_steps=20", f"data.root={digits}"]
    whole(words, tmp_path, "one")
    finish(start([*words, "run_dir=two", "trainer.devices=2"], tmp_path))

    def losses(name):
        header, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("train/loss")
        return torch.tensor([float(r.split(",")[column]) for r in rows])

    one, two = losses("one"), losses("two")
    assert len(one) == len(two) == 20
    assert (one - two).abs().max() <= 1e-4


@pytest.mark.slow
def test_a_look_that_a_signal_has_ended_is_made_when_the_run_goes_on(digits, tmp_path):
    words = [f"data.root={digits}", "run_dir=run", "trainer.max_steps=6", "callbacks.grid.num_images=10"]
    words += ["sampler.num_steps=2", "trainer.threads=1", "data.batch_size=16", "callbacks.score.every_steps=4"]
    words += ["callbacks.score.num_images=20", "callbacks.score.during.num_steps=2"]
    process = start([*words, "callbacks.score.during.num_images=1000000"], tmp_path)
    wait_for(tmp_path / "run" / "evaluations" / "score_00000004" / "about.json", process)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 128 + signal.SIGTERM)
    assert "Stopped by signal 15 at step 4. Run the same command to continue." in output
    whole([*words, "callbacks.score.during.num_images=30"], tmp_path, "run")
    found = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [(r["step"], r["num_images"]) for r in found if r["name"] == "fid"] == [(4, 30), (6, 20)]
    assert not (tmp_path / "run" / "evaluations").exists()


@pytest.mark.slow
def test_a_signal_during_the_final_scores_ends_the_run_at_once_and_they_are_made_later(digits, tmp_path):
    words = [f"data.root={digits}", "run_dir=run", "trainer.max_steps=2", "callbacks.grid.num_images=10"]
    words += ["sampler.num_steps=2", "trainer.threads=1"]
    process = start([*words, "callbacks.score.num_images=1000000"], tmp_path)
    wait_for(tmp_path / "run" / "samples" / "step_00000002.png", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    whole([*words, "callbacks.score.num_images=20"], tmp_path, "run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 2


def test_a_folder_that_a_kill_has_left_before_its_first_file_was_there_is_a_new_one(tmp_path):
    """Killed in the first write of config.yaml: nothing but the lock, and the file that was to become config.yaml."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on here")
    (tmp_path / "run" / ".config.yaml.a5rld_0_.tmp").write_text("")
    assert inside("train", [*PLAIN, "trainer.max_steps=1", "run_dir=run"], tmp_path) == 0
    assert not list((tmp_path / "run").glob(".*.tmp"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert inside("train", [*PLAIN, "trainer.max_steps=1", "run_dir=other"], tmp_path) == 2
