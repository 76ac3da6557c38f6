"""What counts as progress of a start, which slurm/job.sh is told by a file that disappears; and a run's last piece."""

import os
import signal
import threading
import time

import pytest
from conftest import inside
from slurm_cluster import newest
from test_experiments import composed

from diffusion.build.run import run_parts
from diffusion.distributed.signals import Signals
from diffusion.run import Run
from diffusion.runs.folder import RunFolder

WORDS = ["trainer=cpu", "data.batch_size=8", "model.blocks_per_level=1", "trainer.threads=1"]


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that says that this start has made no progress yet."""
    path = tmp_path / "not_yet"
    path.touch()
    monkeypatch.setenv("DIFFUSION_NOT_YET", str(path))
    return path


def test_the_first_checkpoint_is_progress_whatever_becomes_of_the_start(digits, mark, tmp_path):
    run, seen = tmp_path / "run", []

    def watch():
        while mark.exists() and not (run / "report.html").is_file():
            time.sleep(0.0005)
        seen.append(newest(run))

    watching = threading.Thread(target=watch)
    watching.start()
    words = [*WORDS, "callbacks=none", "trainer.max_steps=40", "save.every_steps=5", f"data.root={digits}"]
    assert inside("train", [*words, f"run_dir={run}"], tmp_path) == 0
    watching.join()
    assert 0 < seen[0] < 40


def test_scores_and_samples_are_progress_of_a_run_that_has_trained(digits, mark, tmp_path):
    words = [*WORDS, "trainer.max_steps=2", f"data.root={digits}", "run_dir=run", "extractor=digits"]
    words += ["sampler.num_steps=2"]
    assert inside("train", [*words, "callbacks=none"], tmp_path) == 0
    mark.touch()
    words += ["callbacks.grid.num_images=10", "callbacks.score.num_images=20"]
    assert inside("train", words, tmp_path) == 0
    assert not mark.exists()


def test_a_signal_does_not_keep_a_run_from_its_report(digits, tmp_path):
    words = ["+experiment=digits", *WORDS, "callbacks=none", "trainer.max_steps=2", f"data.root={digits}"]
    cfg = composed(*words, f"run_dir={tmp_path / 'run'}")
    for warned in (False, True):
        with Signals() as signals, signals.held():
            run = Run(run_parts(cfg, RunFolder(tmp_path / "run")), signals)
            if warned:
                run.folder.report_path.unlink()
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.1)
            assert run.go() == 0
    assert signals.number == signal.SIGUSR1 and run.folder.report_path.is_file()
