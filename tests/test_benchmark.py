"""The check of a GPU, with the CPU in its place: what must agree agrees, what differs is found, and exit statuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from diffusion.benchmark import gpu_check
from diffusion.benchmark.gpu_check import BF16, CPU, FLOAT32, Comparison, Step, Way, compare, timed_training
from diffusion.training.module import DiffusionModule

CPU_BF16 = Way("CPU bf16", ("trainer=cpu", "trainer.precision=bf16-mixed", "trainer.memory_format=channels_last"))
NO_GPU = "task=gpu_check needs a CUDA device, but torch finds none. Nothing was compared.\n"


def test_the_same_way_twice_differs_in_nothing():
    found = compare("digits", CPU, FLOAT32)
    assert len(found) == 6 and all(c.holds for c in found)
    assert {c.difference for c in found} == {0}


def test_bf16_differs_within_its_tolerance():
    found = {c.figure: c for c in compare("digits", CPU_BF16, BF16)}
    assert all(c.holds for c in found.values()), [c.line() for c in found.values()]
    assert found["gradient"].difference > 1e-3 and found["sample, root mean square"].difference > 1e-3
    assert found["update of the weights"].difference < 1e-6  # bf16 is over when the gradient is there


def test_float32_tolerances_find_bf16_out():
    out = {c.figure for c in compare("digits", CPU_BF16, FLOAT32) if not c.holds}
    assert out >= {"loss", "gradient", "gradient norm", "sample, root mean square"}
    assert "update of the weights" not in out


@pytest.mark.parametrize("figure", Step._fields)
def test_every_figure_of_a_step_is_compared(figure, monkeypatch):
    """A step that is two per cent off, in one of its figures."""
    compare("digits", CPU, FLOAT32)  # the reference is kept
    right = gpu_check.training_step

    def wrong(*arguments, **named):
        step = right(*arguments, **named)
        return step._replace(**{figure: 1.02 * getattr(step, figure)})

    monkeypatch.setattr(gpu_check, "training_step", wrong)
    out = {c.figure for c in compare("digits", CPU, FLOAT32) if not c.holds}
    expected = {"loss": {"loss"}, "gradient": {"gradient", "gradient norm"}, "update": {"update of the weights"}}
    assert out == expected[figure]


def test_nothing_compared_is_trivial():
    """The network's output, its gradient and the sample are all at work, so that a difference could show."""
    step, images = gpu_check._references("digits", CPU)
    assert step.gradient.norm() > 1 and (step.gradient.abs() > 1e-6).float().mean() > 0.5
    assert step.update.norm() > 0.1
    assert images.abs().max() <= 1 and (images.abs() < 0.99).float().mean() > 0.1


def test_what_is_no_number_does_not_hold():
    assert not Comparison("digits", "GPU", "loss", float("nan"), 1.0).holds
    assert "FAILED" in Comparison("digits", "GPU", "loss", 2.0, 1.0).line()


@pytest.mark.slow
def test_training_is_timed_as_a_user_runs_it():
    words = ["trainer=cpu", "trainer.threads=1", "log_every=2", "data.batch_size=8"]
    figures = timed_training("digits", 6, *words)
    assert figures["steps"] == 6 and figures["batch_size"] == 8
    assert figures["images_per_second"] == pytest.approx(8 * figures["steps_per_second"])
    assert figures["steps_per_second"] * figures["seconds"] > 6  # the command imports and builds as well
    assert 0 < figures["last_loss"] < 2


@pytest.fixture
def pretended(monkeypatch):
    """The CPU in the GPU's place; the three parts that need one are played."""
    played = {
        "EXPERIMENTS": ("digits",),
        "GPU": CPU,
        "GPU_BF16": CPU_BF16,
        "machine": lambda: {"gpu": "a GPU", "torch": "2", "cuda": "13"},
        "host_waits": lambda experiment, way: None,
        "timed_training": lambda *a: {"steps_per_second": 2.0, "images_per_second": 256.0, "peak_memory_gb": 3.0},
    }
    for name, value in played.items():
        monkeypatch.setattr(gpu_check, name, value)
    return monkeypatch


def test_all_of_it_holds(pretended, call, tmp_path):
    status, output = call("benchmark", "task=gpu_check", "out=figures.json")
    assert status == 0 and "All checks passed." in output and "2.00 steps/s, 256 images/s" in output
    found = json.loads((tmp_path / "figures.json").read_text())
    assert len(found["comparisons"]) == 12 and found["holds"] and found["host_waits"] is None
    for row in found["comparisons"]:
        assert f"{row['experiment']}, {row['way']}: {row['figure']}" in output and f"{row['difference']:.2e}" in output


@pytest.mark.parametrize("difference, waits, said", [(0.1, "a copy", "the host wait: a copy"), (2.0, None, "FAILED")])
def test_what_does_not_hold_is_exit_1(difference, waits, said, pretended, call):
    pretended.setattr(gpu_check, "compare", lambda *_: [Comparison("digits", "GPU", "loss", difference, 1.0)])
    pretended.setattr(gpu_check, "host_waits", lambda *_: waits)
    status, output = call("benchmark", "task=gpu_check")
    assert status == 1 and said in output and "Not all checks passed." in output


def test_what_makes_the_host_wait_is_reported(monkeypatch):
    """torch's own watch is played: it is set for the steps that follow the first two, and taken back."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert gpu_check.host_waits("digits", CPU) is None
    assert modes == ["error", "default"]

    count = DiffusionModule.count

    def waiting(module, loss, t, *stand_in):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore of it")
        count(module, loss, t, *stand_in)

    monkeypatch.setattr(DiffusionModule, "count", waiting)
    assert gpu_check.host_waits("digits", CPU) == "called a synchronizing CUDA operation"
    assert modes[-1] == "default"


def test_without_a_gpu_the_command_says_so_and_exits_3(command, tmp_path):
    done = command("benchmark", "task=gpu_check", "out=figures.json", check=3, CUDA_VISIBLE_DEVICES="")
    assert done.stdout == NO_GPU and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script_takes_the_interpreter_it_is_given():
    environment = os.environ | {"DIFFUSION_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", str(ROOT / "launch" / "gpu_check.sh")]
    done = subprocess.run(script, cwd="/", env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (3, NO_GPU), done.stderr


@pytest.mark.parametrize(
    "words, mentions",
    [
        ([], ["task=NAME"]),
        (["task=gpu"], ["task=gpu", "gpu_check"]),
        (["task=gpu_check", "gpu_check.steps=9"], ["gpu_check.steps=9", "at least 100"]),
        (["task=gpu_check", "out=."], ["out=.", ".json"]),
    ],
)
def test_wrong_words_are_refused(words, mentions, command, tmp_path):
    done = command("benchmark", *words, check=2)
    assert done.stderr.count("error:") == 1 and all(m in done.stderr for m in mentions)
    assert not any(tmp_path.iterdir())


def test_help_names_the_task(command):
    assert "task=gpu_check" in command("benchmark", "--help", check=0).stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_all_of_it_holds(command):
    done = command("benchmark", "task=gpu_check", OMP_NUM_THREADS="")
    assert done.returncode == 0, done.stdout + done.stderr
