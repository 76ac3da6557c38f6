"""Several ranks train what one trains; killed and gone on with, they end with the very bits of those that were not."""

import csv
import signal
import time

import pytest
from chaos import metrics
from test_resume import STEPS, assert_same, finish, start, wait_for

from diffusion.build.door import checkpoint_path
from diffusion.runs.folder import RunFolder

pytestmark = pytest.mark.slow
WORDS = ["callbacks=none", "trainer=cpu", "trainer.threads=1", "data.batch_size=16", "save.every_steps=6"]
WORDS += ["log_every=1"]
TIMING = {"train/images_per_second"}


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_one_two_and_four_ranks_train_the_same(digits, tmp_path):
    words = [*WORDS, "model.dropout=0", "trainer.max_steps=50", f"data.root={digits}"]
    files = {}
    for ranks in (1, 2, 4):
        finish(start([*words, f"trainer.devices={ranks}", f"run_dir={ranks}"], tmp_path))
        folder = tmp_path / f"{ranks}"
        files[ranks] = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert files[1] == files[2] == files[4]
    one = rows(tmp_path / "1")
    assert len(one) == 50
    for ranks in (2, 4):
        found = rows(tmp_path / f"{ranks}")
        sent = [float(row.pop("train/allreduced_mb")) for row in found]
        assert sent == [pytest.approx(4 * 1_003_137 / 1e6, rel=1e-3)] * 50
        for ours, theirs in zip(one, found, strict=True):
            assert ours.keys() - TIMING == theirs.keys() - TIMING
            for key in ours.keys() - TIMING:
                if not ours[key]:  # no image of that step had its t in this quartile
                    assert not theirs[key]
                    continue
                assert float(theirs[key]) == pytest.approx(float(ours[key]), abs=1e-4, rel=1e-4), (ours["step"], key)


def test_four_ranks_killed_and_gone_on_with_end_with_the_same_bits(digits, tmp_path):
    words = [*WORDS, "trainer.devices=4", "deterministic=true", f"trainer.max_steps={STEPS}", f"data.root={digits}"]
    finish(start([*words, "run_dir=whole"], tmp_path))
    killed = tmp_path / "killed"
    for step, number in ((6, signal.SIGKILL), (18, signal.SIGTERM), (30, signal.SIGKILL)):
        process = start([*words, "run_dir=killed"], tmp_path)
        wait_for(killed / "checkpoints" / f"step_{step:08d}.ckpt", process)
        time.sleep(0.02 * step)
        process.send_signal(number)  # rank 0, whose end the others see
        output, _ = process.communicate(timeout=120)  # until the last of them has closed it
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), output
    finish(start([*words, "run_dir=killed"], tmp_path))
    assert_same(tmp_path / "whole", killed)
    assert not RunFolder(killed).latest_valid()[2]


def test_metrics_of_three_ranks_are_the_same_bytes_interrupted_or_not(digits, tmp_path):
    """Also where a row is of steps before and after the interruption, and the first after a start."""
    words = [*WORDS, "trainer.devices=3", "data.batch_size=12", "data.lanes=12", "save.every_steps=5", "log_every=4"]
    words += ["trainer.max_steps=24", "data.num_workers=1", f"data.root={digits}"]
    finish(start([*words, "run_dir=whole"], tmp_path))
    killed = tmp_path / "killed"
    for step, number in ((5, signal.SIGKILL), (10, signal.SIGTERM)):
        process = start([*words, "run_dir=killed"], tmp_path)
        wait_for(killed / "checkpoints" / f"step_{step:08d}.ckpt", process)
        process.send_signal(number)
        process.communicate(timeout=120)
    finish(start([*words, "run_dir=killed"], tmp_path))
    whole, found = metrics(tmp_path / "whole"), metrics(killed)
    assert whole == found and len(whole) == 7
    assert all(row[whole[0].index("train/allreduced_mb")] for row in whole)


def test_two_ranks_that_save_by_minutes_do_not_save_twice(digits, tmp_path):
    """They hear of each other's clocks a step late: of a clock that has run out already in every step, every second."""
    words = ["callbacks=none", "trainer=cpu", "trainer.devices=2", "trainer.threads=1", "data.batch_size=16"]
    words += ["save.every_steps=0", "save.every_minutes=1e-6", "save.keep=20", "trainer.max_steps=9"]
    finish(start([*words, f"data.root={digits}", "run_dir=run"], tmp_path))
    assert sorted(RunFolder(tmp_path / "run").steps()) == [2, 4, 6, 8, 9]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_every_rank_finds_damaged_is_said_by_the_first_alone(rank, tmp_path, capfd, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.results_path.write_text("half a li")
    (folder.checkpoints / "step_00000001.ckpt").write_text("damaged")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert folder.results() == []
    with pytest.raises(ValueError, match="has no usable checkpoint"):
        checkpoint_path(str(folder.path))
    out, err = capfd.readouterr()
    assert ("line 1 is not a valid result" in err, "step_00000001.ckpt is not used" in out) == (rank == 0, rank == 0)
