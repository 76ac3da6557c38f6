"""The course of the learning rate: its formulas, its length, what is reported of it, and runs of former versions."""

import csv
import math

import pytest
import torch
import yaml
from conftest import inside

from diffusion.training.lr_schedule import Constant, Cosine, InverseSqrt

WORDS = ["trainer=cpu", "callbacks=none", "data.batch_size=8", "log_every=1", "model.blocks_per_level=1"]


def test_courses_are_their_formulas():
    assert [Constant(4)(n) for n in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = Cosine(warmup_steps=10, num_steps=110, final=0.1)
    for n in (0, 5, 9):
        assert cosine(n) == pytest.approx((n + 1) / 10)
    for n in (10, 35, 60, 109):
        assert cosine(n) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (n - 10) / 100)) / 2)
    assert cosine(110) == cosine(5000) == pytest.approx(0.1)
    inverse = InverseSqrt(warmup_steps=100)
    assert inverse(49) == 0.5 and inverse(99) == 1 and inverse(399) == pytest.approx(0.5)
    assert InverseSqrt(reference_steps=25)(99) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lr_schedule.num_steps=10 must be above lr_schedule.warmup_steps=10"):
        Cosine(10, 10)


def rates(run):
    with open(run / "metrics.csv") as file:
        return [float(row["train/lr"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("option, course", [
    ("constant", Constant(3)), ("cosine", Cosine(3, 8)), ("inverse_sqrt", InverseSqrt(3)),
])  # fmt: skip
def test_the_rate_that_is_reported_is_that_of_the_step(option, course, digits, tmp_path):
    words = [*WORDS, f"lr_schedule={option}", "lr_schedule.warmup_steps=3", "optimizer.lr=1e-3", f"data.root={digits}"]
    assert inside("train", [*words, "trainer.max_steps=8", "run_dir=run"], tmp_path) == 0
    assert rates(tmp_path / "run") == pytest.approx([1e-3 * course(n) for n in range(8)], rel=1e-6)


def test_a_larger_max_steps_on_resume_does_not_move_the_course(digits, tmp_path):
    words = [*WORDS, "lr_schedule=cosine", "lr_schedule.warmup_steps=2", "optimizer.lr=1e-3", f"data.root={digits}"]
    assert inside("train", [*words, "trainer.max_steps=6", "run_dir=run"], tmp_path) == 0
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["lr_schedule"]["num_steps"] == 6
    assert inside("train", [*words, "trainer.max_steps=9", "run_dir=run"], tmp_path) == 0
    course = Cosine(2, 6)
    assert rates(tmp_path / "run") == pytest.approx([1e-3 * course(n) for n in range(9)], rel=1e-6, abs=1e-12)
    assert inside("train", [*words, "lr_schedule.num_steps=9", "trainer.max_steps=9", "run_dir=run"], tmp_path) == 2


def test_a_key_that_has_moved_is_answered_with_where_it_is(command_inside):
    done = command_inside("train", "optimizer.warmup_steps=3", check=2)
    assert "Unknown setting: optimizer.warmup_steps. It is lr_schedule.warmup_steps now." in done.stderr


def test_the_optimizer_is_stepped_with_that_rate(digits, tmp_path):
    """SGD of one step: the weights move by the rate times the gradient, whose norm is clipped to 1."""
    words = [*WORDS, "lr_schedule.warmup_steps=4", "optimizer.lr=1e-2", f"data.root={digits}", "save.every_steps=1"]
    assert inside("train", [*words, "trainer.max_steps=2", "save.keep=3", "run_dir=run"], tmp_path) == 0
    one, two = (
        torch.load(tmp_path / "run" / "checkpoints" / f"step_0000000{k}.ckpt", weights_only=True) for k in (1, 2)
    )
    assert one["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-2 * 2 / 4)  # of the step to come
    assert two["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-2 * 3 / 4)
