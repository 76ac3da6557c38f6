"""A run whose data change under it ends with status 2, saves nothing, and goes on exactly once they are restored."""

import mmap
import os
import re
import shutil

import pytest
from changing import cut, delete, overwrite, overwrite_a_sample, replace, swap, without_digests
from conftest import inside
from test_resume import PLAIN, STEPS, assert_same, start, wait_for

from diffusion.data.shards.index import read_index
from diffusion.runs.folder import RunFolder

CHANGED, OTHER = "train-00003.tar", "train-00005.tar"


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert inside("train", [*PLAIN, f"data.root={digits}", "run_dir=whole"], folder) == 0
    return folder / "whole"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def after_saving(monkeypatch):
    """`after_saving(step, what)`: do something as soon as the checkpoint of a step is in place, once."""
    point_last_to = RunFolder.point_last_to

    def on(step, what):
        def pointed(self, path):
            point_last_to(self, path)
            if path == self.checkpoint_path(step) and not done:
                done.append(True)
                what()

        done = []
        monkeypatch.setattr(RunFolder, "point_last_to", pointed)

    return on


def set_of(digits, folder, kind):
    shutil.copytree(digits, folder)
    return without_digests(folder) if kind == "without" else folder


def restored(digits, folder, kind):
    shutil.rmtree(folder)
    return set_of(digits, folder, kind)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind, change, cache, workers",
    [
        ("with", swap, "auto", 0),
        slow("without", overwrite, "none", 2),
        slow("with", overwrite_a_sample, "none", 2),
        slow("with", overwrite, "auto", 2),
        slow("with", delete, "none", 0),
        slow("without", delete, "auto", 2),
        slow("without", cut, "none", 0),
        slow("without", replace, "auto", 0),
    ],
)
def test_a_run_ends_saves_nothing_more_and_goes_on_exactly(
    kind, change, cache, workers, digits, whole, command_inside, after_saving, tmp_path
):
    data, run = set_of(digits, tmp_path / "set", kind), RunFolder(tmp_path / "run")
    words = [*PLAIN, f"data.root={data}", f"data.cache={cache}", f"data.num_workers={workers}", "run_dir=run"]
    after_saving(12, lambda: change(data / CHANGED, data / OTHER))
    done = command_inside("train", *words, check=2)
    names = f"({CHANGED}|{OTHER})" if change is swap else CHANGED
    assert re.search(
        rf"^error: data\.root={data}: shard {names} has changed: .* run the same command\.$", done.stderr, re.M
    )
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    step = run.steps()[0]
    assert f". Run the same command to continue from step {step}." in done.stderr
    assert step in (12, 18)  # the change came when the first was in place, perhaps during the steps to the second
    assert not list(run.checkpoints.glob("*.other_data"))  # nothing of it was used
    if change is not overwrite_a_sample:  # which the steps that are left may not need
        assert command_inside("train", *words).returncode == 2  # not before it is restored
    restored(digits, data, kind)
    assert f"continuing from step {step}" in command_inside("train", *words, check=0).stdout
    assert_same(whole, run.path)


def test_the_last_step_is_not_saved_over_changed_data(digits, whole, command_inside, after_saving, tmp_path):
    """All images are in memory, and nothing is read any more."""
    data, run = set_of(digits, tmp_path / "set", "with"), RunFolder(tmp_path / "run")
    words = [*PLAIN, f"data.root={data}", "run_dir=run"]
    after_saving(36, lambda: delete(data / CHANGED, None))
    assert CHANGED in command_inside("train", *words, check=2).stderr
    assert run.steps()[0] == 36 < STEPS
    restored(digits, data, "with")
    command_inside("train", *words, check=0)
    assert_same(whole, run.path)


def test_checkpoints_that_may_come_from_other_data_are_set_aside(
    digits, whole, command_inside, after_saving, tmp_path, monkeypatch
):
    """A label changes through a mapped page that is dirty already, so that no time of the file shows it."""
    monkeypatch.setattr("diffusion.data.shards.changes.SETTLED", 1000.0)
    data, run = set_of(digits, tmp_path / "set", "without"), RunFolder(tmp_path / "run")
    words = [*PLAIN, f"data.root={data}", "run_dir=run", "data.cache=none"]
    command_inside("train", *words, "trainer.max_steps=6", check=0)
    index = read_index(data)
    places = [int(at) for at in index.offsets(index.shards[3])[:, 2]]
    with open(data / CHANGED, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        before = bytes(content)
        content[:] = before

        def change():
            seen = os.stat(data / CHANGED)
            for at in places:
                content[at] = ord("0") + (content[at] - ord("0") + 1) % 10
            assert os.stat(data / CHANGED).st_mtime_ns == seen.st_mtime_ns
            monkeypatch.setattr("diffusion.data.shards.changes.SETTLED", 0.0)  # as if time went by

        after_saving(18, change)
        done = command_inside("train", *words, check=2)
        content[:] = before
    assert f"shard {CHANGED} has changed: it does not match the sha256 in index.json" in done.stderr
    aside = sorted(path.name for path in run.checkpoints.glob("*.ckpt.other_data"))
    assert aside[:2] == ["step_00000012.ckpt.other_data", "step_00000018.ckpt.other_data"]
    for name in aside:
        assert f"Set aside, because it may come from changed data: run/checkpoints/{name}\n" in done.stderr
    assert done.stderr.strip().endswith("Run the same command to continue from step 6.")
    assert run.steps() == [6] and os.readlink(run.last) == "step_00000006.ckpt"
    for suffix in (".ckpt", ".sha256"):  # what another rank was writing then
        shutil.copy(run.checkpoint_path(6).with_suffix(suffix), run.checkpoint_path(24).with_suffix(suffix))
    restored(digits, data, "without")
    done = command_inside("train", *words, check=0)
    assert "continuing from step 6" in done.stdout and "step_00000024.ckpt.other_data" in done.stdout
    assert not (run.path / "changed_data.json").exists()
    assert_same(whole, run.path)


@pytest.mark.slow
def test_all_ranks_end_with_status_2(digits, tmp_path):
    data, run = set_of(digits, tmp_path / "set", "with"), RunFolder(tmp_path / "run")
    words = ["trainer=cpu", "trainer.devices=2", "trainer.threads=1", "callbacks=none", "data.batch_size=16"]
    words += ["save.every_steps=6", "trainer.max_steps=100000", f"data.root={data}", "run_dir=run"]
    process = start(words, tmp_path)
    wait_for(run.checkpoint_path(6), process)
    delete(data / CHANGED, None)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert f"shard {CHANGED} has changed: the file is missing" in output and "Traceback" not in output
    step = run.steps()[0]
    restored(digits, data, "with")
    output, _ = start([*words, f"trainer.max_steps={step + 2}", "trainer.devices=1"], tmp_path).communicate(timeout=120)
    assert f"continuing from step {step}" in output, output
