"""Checkpoints are whole or not used; nothing in them is executed."""

import io
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffusion.noise import key
from diffusion.runs.folder import RunFolder, damage, differences, flatten
from diffusion.training.checkpoint import CheckpointWriter, WriteFailed, contents, load

CONTENT = {
    "global_step": 7,
    "state_dict": {"network.w": torch.arange(40_000, dtype=torch.float32)},
    "ema": {"w": torch.arange(40_000, dtype=torch.float32) / 3},
    "config": {"name": "test"},
}


@pytest.fixture
def folder(tmp_path):
    """A run folder with checkpoints of steps 5 and 7."""
    run = RunFolder(tmp_path / "run")
    for step in (5, 7):
        written(CONTENT | {"global_step": step}, run.checkpoint_path(step))
    return run


def written(content, path):
    writer = CheckpointWriter()
    writer.save_checkpoint(content, path)
    writer.wait()


def cut(data: bytes, k: int) -> bytes:
    return data[: len(data) * k // 20]


def flipped(data: bytes, k: int) -> bytes:
    place = int(key(1, k)) % len(data)
    return data[:place] + bytes([data[place] ^ (1 << int(key(2, k)) % 8)]) + data[place + 1 :]


@pytest.mark.parametrize("harm", [cut, flipped])
def test_damage_at_twenty_places_is_recognised_and_the_one_before_is_used(folder, harm):
    path = folder.checkpoint_path(7)
    whole = path.read_bytes()
    assert folder.latest_valid() == (7, path, [])
    for k in range(20):
        path.write_bytes(harm(whole, k))
        step, found, complaints = folder.latest_valid()
        assert (step, found) == (5, folder.checkpoint_path(5))
        assert len(complaints) == 1 and str(path) in complaints[0]
        with pytest.raises(ValueError, match="checkpoint="):
            load(path)


def test_without_its_digest_a_cut_file_and_flipped_weights_are_still_recognised(folder):
    path = folder.checkpoint_path(7)
    whole = path.read_bytes()
    path.with_suffix(".sha256").unlink()
    assert damage(path) is None
    for k in range(20):
        path.write_bytes(cut(whole, k))
        assert damage(path)
    weights = CONTENT["state_dict"]["network.w"].numpy().tobytes()
    start = whole.index(weights)
    for k in range(20):
        place = start + int(key(3, k)) % len(weights)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "damaged" in damage(path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = tmp_path / "x.ckpt"
    torch.save(CONTENT | {"config": Harm()}, path)
    with pytest.raises(ValueError, match="it is unsafe: loading it would call io.open"):
        load(path)
    assert not (tmp_path / "harm").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(folder, monkeypatch):
    path = folder.checkpoint_path(7)
    before = sorted(p.name for p in folder.checkpoints.iterdir())

    def full(checkpoint, f):
        f.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(WriteFailed, match="step_00000007.ckpt cannot be written: No space left on device"):
        written(CONTENT, path)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == before
    assert damage(path) is None


def test_what_is_saved_is_what_was_there_when_the_save_returned(folder, monkeypatch):
    """The next step changes the weights in place while the file is being written."""
    weights, go_on, save = torch.zeros(1000), threading.Event(), torch.save

    def slow(checkpoint, f):
        assert go_on.wait(30)
        save(checkpoint, f)

    monkeypatch.setattr(torch, "save", slow)
    writer, path, order = CheckpointWriter(), folder.checkpoint_path(9), []
    counters = {"seen": [1]}
    content = CONTENT | {"state_dict": {"network.w": weights}, "counters": counters}
    writer.save_checkpoint(content, path, lambda: order.append(path.is_file()))
    weights += 1
    counters["seen"].append(2)
    assert not path.exists() and order == []
    go_on.set()
    writer.wait()
    assert order == [True]  # told once it was there
    found = contents(path)
    assert (found["state_dict"]["network.w"] == 0).all() and found["counters"] == {"seen": [1]}


@pytest.mark.slow
def test_a_process_does_not_end_with_a_write_under_way(tmp_path):
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
from diffusion.training.checkpoint import CheckpointWriter
content = {{"global_step": 1, "state_dict": {{"w": torch.ones(20_000_000)}}, "ema": {{}}, "config": {{}}}}
CheckpointWriter().save_checkpoint(content, {str(tmp_path / "x.ckpt")!r})
sys.exit(143)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 143
    assert load(tmp_path / "x.ckpt").state_dict["w"].sum() == 20_000_000


def test_the_best_by_fid_is_kept_and_pointed_to(folder):
    assert folder.point_best() is None
    rows = [(5, 3.0, "train"), (7, 4.0, "train"), (6, 1.0, "train"), (7, 2.0, "evaluate")]  # none of 6 is there
    folder.add_results(
        [{"by": by, "name": "fid", "metric": "FID", "step": step, "value": value} for step, value, by in rows]
    )
    assert folder.point_best() == 5
    assert load(folder.checkpoints / "best.ckpt").step == 5


def test_leftovers_of_a_kill_go_when_the_folder_is_taken(folder):
    left = folder.checkpoints / ".step_00000009.ckpt.abc.tmp"
    left.write_bytes(b"half")
    digest = folder.checkpoints / "step_00000009.sha256"  # written before the checkpoint gets its name
    digest.write_text("0" * 64)
    there = sorted(path.name for path in folder.checkpoints.iterdir() if path not in (left, digest))
    with folder.locked():
        assert sorted(path.name for path in folder.checkpoints.iterdir()) == there


def test_last_points_to_a_checkpoint(folder):
    folder.point_last_to(folder.checkpoint_path(5))
    folder.point_last_to(folder.checkpoint_path(7))
    assert load(folder.last).step == 7


def test_damage_is_told_from_other_zip_files(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", np.arange(10).tobytes())
    (tmp_path / "x.ckpt").write_bytes(buffer.getvalue())
    assert damage(tmp_path / "x.ckpt") is None
    with pytest.raises(ValueError, match="checkpoint="):
        load(tmp_path / "x.ckpt")


def test_differences_name_what_is_trained_and_nothing_else():
    old = {"optimizer": {"lr": 1.0}, "trainer": {"devices": 1}, "data": {"lanes": 8, "root": "a"}, "seed": 0}
    new = {"optimizer": {"lr": 2.0}, "trainer": {"devices": 4}, "data": {"lanes": None, "root": "b"}, "seed": 0}
    assert differences(old, new) == ["optimizer.lr: was 1.0, is 2.0"]
    assert differences(old, old | {"data": {"lanes": 4, "root": "a"}}) == ["data.lanes: was 8, is 4"]
    assert flatten({"a": {"b": {"c": [1]}}, "d": {}}) == {"a.b.c": [1], "d": {}}
