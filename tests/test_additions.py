"""A sampler, a schedule and a metric are added to the package by one new file and one YAML each, and nothing else."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import own_parts
import pytest
from conftest import ROOT, rows

SAMPLER = '''
"""DDIM's step, taken as one of half the way and one of the rest."""

from typing import Annotated

from diffusion.samplers.base import Sampler
from diffusion.samplers.ddim import DDIM
from diffusion.settings import Between, settings


@settings("sampler")
class Halves(Sampler):
    """Two steps of DDIM in one.

    Args:
        part: of the way that the first of them goes.
    """

    calls_per_step = 2  # but for the last

    def __init__(self, schedule, part: Annotated[float, Between(0, 1, ends="()")] = 0.5) -> None:
        super().__init__(schedule)
        self.part, self.inner = part, DDIM(schedule)

    def step(self, denoise, x_t, t, s, randn, past=()):
        between = t + self.part * (s - t)
        if between < 1:
            return self.inner.step(denoise, x_t, t, s, randn)
        x = self.inner.step(denoise, x_t, t, between, randn)
        return self.inner.step(denoise, x, between, s, randn)
'''
SCHEDULE = """
\"\"\"Variance preserving, with a sigmoid of time for the betas.\"\"\"

import torch

from diffusion.process.schedule import Level, Schedule
from diffusion.settings import Count, Positive, settings


""" + inspect.getsource(own_parts.Sigmoid)
METRIC = """
\"\"\"How far apart the mean features of two sets of images are.\"\"\"

from diffusion.metrics.metric import Metric


""" + inspect.getsource(own_parts.Centre)
ADDED = {
    "diffusion/samplers/halves.py": SAMPLER,
    "conf/sampler/halves.yaml": "# Two steps of DDIM in one.\ndefaults: [_plan, _self_]\n"
    "_target_: diffusion.samplers.halves.Halves\n_partial_: true\nnum_steps: 5\npart: 0.5\n",
    "diffusion/process/sigmoid.py": SCHEDULE,
    "conf/schedule/vp_sigmoid.yaml": "# A sigmoid of time.\n_target_: diffusion.process.sigmoid.Sigmoid\n"
    "num_timesteps: 1000\nwidth: 5.0\n",
    "diffusion/metrics/centre.py": METRIC,
    "conf/metric/centre.yaml": "# Distance of the means.\n_target_: diffusion.metrics.centre.Centre\n",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A checkout with the additions."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("diffusion", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in ADDED.items():
        assert not (copy / name).exists()
        (copy / name).write_text(text.lstrip())
    return copy


@pytest.mark.slow
def test_they_are_trained_with_sampled_with_and_scored_by(copy, digits, tmp_path):
    def call(name, *words, status=0):
        env = dict(os.environ, PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
        done = subprocess.run(
            [sys.executable, "-m", f"diffusion.{name}", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    words = ["schedule=vp_sigmoid", "schedule.width=6", "sampler=halves", "metrics=[fid,centre]", "run_dir=run"]
    words += ["trainer=cpu", "trainer.max_steps=4", "callbacks.grid.num_images=4", "callbacks.score.num_images=20"]
    call("train", *words, f"data.root={digits}")
    found = rows(tmp_path / "run" / "results.jsonl")
    assert found["centre"]["value"] > 0 and found["centre"]["metric"] == "digits-centre distance"
    assert found["fid"]["sampler"] == "halves" and found["fid"]["part"] == 0.5 and found["fid"]["nfe"] == 18
    assert "centre distance" in (tmp_path / "run" / "report.html").read_text()

    call("sample", "checkpoint=run", "num_images=3", "out=a", "sampler=halves", "sampler.part=0.4")
    listed = call("sample", "checkpoint=run", "num_images=3", "out=b", "sampler=halves", "sampler.part=1", status=2)
    assert "sampler.part=1 is outside (0, 1)" in listed
    listed = call("evaluate", "checkpoint=run", "num_images=2", "metrics=[centre]", status=2)
    assert "num_images=2: centre needs at least 3 images" in listed
    swept = ["task=sweep", "num_images=20", "sweep.num_steps=[2]", "sweep.eta=[]", "sweep.samplers=['halves part=0.3']"]
    call("evaluate", "checkpoint=run", *swept)
    assert "halves" in (tmp_path / "run" / "report.html").read_text()
