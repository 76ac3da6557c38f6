"""bf16 is inside the network and nowhere else, seen in a run of two processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, inside
from precision_probe import ProbedRun

pytestmark = pytest.mark.slow

WORDS = ["callbacks=none", "trainer=cpu", "trainer.threads=1", "trainer.max_steps=3", "log_every=1"]
WORDS += ["data.batch_size=32", "model.dropout=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """Precision -> the folder of a finished run: of two gloo processes in bf16-mixed, of this process alone in 32."""
    folder = tmp_path_factory.mktemp("precision")
    words = [*WORDS, f"data.root={digits}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.run.Run", ProbedRun)
        assert inside("train", [*words, "run_dir=32"], folder) == 0
    words = [*words, "trainer.precision=bf16-mixed", "trainer.devices=2", "run_dir=bf16-mixed"]
    command = [sys.executable, str(ROOT / "tests" / "precision_probe.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {precision: folder / precision for precision in ("32", "bf16-mixed")}


def dtypes(run: Path, rank: int) -> dict[str, list[str]]:
    return json.loads((run / f"dtypes_rank_{rank:04d}.json").read_text())


def losses(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as f:
        return [float(row["train/loss"]) for row in csv.DictReader(f)]


@pytest.mark.parametrize("rank", [0, 1])
def test_in_bf16_convolutions_compute_in_bf16_and_all_around_the_network_is_float32(runs, rank):
    inside = {"convolution": ["bfloat16"], "network": ["bfloat16"]}
    around = "x_t x0 epsilon output loss weights gradient ema".split()
    assert dtypes(runs["bf16-mixed"], rank) == inside | {name: ["float32"] for name in around}


def test_in_float32_all_of_it_is_float32(runs):
    assert {tuple(found) for found in dtypes(runs["32"], 0).values()} == {("float32",)}


def test_what_a_bf16_run_saves_is_float32_to_its_last_bits(runs):
    checkpoint = torch.load(runs["bf16-mixed"] / "checkpoints" / "last.ckpt", weights_only=True)
    moments = [v for s in checkpoint["optimizer_states"][0]["state"].values() for k, v in s.items() if k != "step"]
    for tensors in (checkpoint["state_dict"].values(), checkpoint["ema"].values(), moments):
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        finer = [(tensor != tensor.bfloat16().float()).float().mean() for tensor in tensors if tensor.ndim > 1]
        assert min(finer) > 0.5  # not float32 numbers that bf16 could hold as well


def test_the_first_loss_in_bf16_is_within_a_hundredth_of_that_in_float32(runs):
    (exact, *_), (rounded, *_) = losses(runs["32"]), losses(runs["bf16-mixed"])
    assert 0 < abs(rounded - exact) < 0.01 * exact  # 0 would be of an output without a part in it
