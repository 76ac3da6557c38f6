"""Folders that cannot be written to, and disks that are full: what can be done is done, the rest is refused by name."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, inside

from diffusion import files
from diffusion.files import Room, Unwritable, append, locked, writing
from diffusion.runs.folder import RunFolder
from diffusion.scoring.sampling import Sampling
from diffusion.training.checkpoint import CheckpointWriter

QUICK = ["sampler.num_steps=2", "trainer.accelerator=cpu"]
OWN_STEPS = ("task=sweep", "metrics=[bits_per_dim]")  # what takes no steps of a sampler
BARE = ["trainer=cpu", "data.batch_size=16", "trainer.max_steps=2", "sampler.num_steps=2"]
TRAIN = [*BARE, "callbacks.grid.num_images=4", "callbacks.score.num_images=20"]
mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


def quick(words: list[str]) -> list[str]:
    """QUICK, as far as it has an effect."""
    return [word for word in QUICK if not (word.startswith("sampler.") and set(words) & set(OWN_STEPS))]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder; None of what is no file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory, digits):
    """A run of the digits and its data set, which has no features of the real images beside it yet."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(digits, folder / "data", ignore=shutil.ignore_patterns("reference_*"))
    words = [*BARE, "callbacks=none", "schedule.num_timesteps=100", f"data.root={folder / 'data'}", "run_dir=run"]
    assert inside("train", words, folder) == 0
    return folder


@pytest.fixture
def mounted(tmp_path_factory):
    """`mounted(words of mount)`: a folder on a file system of its own."""
    folders = []

    def mount(*words: str, source: str | Path = "tmpfs") -> Path:
        folder = tmp_path_factory.mktemp("mounted")
        subprocess.run(["mount", *words, source, folder], check=True)
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def read_only(mounted):
    """`read_only(folder)`: the folder as it is seen on a file system that is read-only."""

    def see(folder: Path) -> Path:
        seen = mounted("--bind", source=folder)
        subprocess.run(["mount", "-o", "remount,bind,ro", seen], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (seen / "written").touch()
        return seen

    return see


@pytest.fixture
def disk(mounted):
    """`disk("64k")`: a small file system."""
    return lambda size: mounted("-t", "tmpfs", "-o", f"size={size}")


def fill(folder: Path) -> None:
    """Take all the room there is."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


def refused(output: str) -> str:
    """The one message of a refusal."""
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    return output[output.index("error: ") :]


# ---- a run that is only read ----

SCORED = ["num_images=20", "batch_size=10", "extractor=digits"]
COMMANDS = {
    "metrics": (
        ["evaluate", *SCORED, "metrics=[fid,is,kid,precision,recall,nearest]", "per_class=true"],
        "out/r.jsonl",
    ),
    "bits": (["evaluate", "metrics=[bits_per_dim]", "likelihood.num_images=4"], "out/r.jsonl"),
    "sweep": (
        ["evaluate", "task=sweep", *SCORED, "sweep.num_steps=[2]", "sweep.eta=[0.0]", "sweep.large=false"],
        "out",
    ),
    "samples": (["evaluate", *SCORED, "metrics=[fid]", "samples=samples"], "out/r.jsonl"),
    "sample": (["sample", "num_images=6", "png=true"], "out"),
    "lab": (["lab", "task=errors", "errors.num_images=4", "errors.times=2"], "out"),
}


@mounts
@pytest.mark.parametrize("which", COMMANDS)
def test_a_run_that_is_only_read_is_used_with_out_elsewhere(made, call, read_only, tmp_path, which):
    (name, *words), out = COMMANDS[which]
    seen, before = read_only(made / "run"), tree(made / "run")
    status, output = call(name, f"checkpoint={seen}", *words, *quick(words), f"out={out}")
    assert status == 0, output
    assert tree(made / "run") == before
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "samples"}
    assert not [p for p in tmp_path.rglob(".*")] and not list(tmp_path.rglob("samples_*"))


@pytest.mark.parametrize("which", COMMANDS)
def test_with_out_nothing_is_written_beside_the_checkpoint(made, call, tmp_path, which, monkeypatch):
    """Not for a moment: what an interrupted command leaves lies below out as well."""
    (name, *words), out = COMMANDS[which]
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    before = tree(tmp_path / "run")
    written = []
    replacing = files.replacing

    def watched(path):
        written.append(Path(path).absolute())
        return replacing(path)

    for module in ("files", "scoring.pieces", "scoring.gallery", "scoring.bits"):
        with contextlib.suppress(AttributeError):
            monkeypatch.setattr(f"diffusion.{module}.replacing", watched)
    status, output = call(name, "checkpoint=run", *words, *quick(words), f"out={out}")
    assert status == 0, output
    assert tree(tmp_path / "run") == before and written
    assert not [path for path in written if tmp_path / "run" in path.parents]


@mounts
@pytest.mark.parametrize("task, cure", [("score", "out=FILE"), ("sweep", "out=FOLDER")])
def test_a_run_that_is_only_read_needs_out(made, call, read_only, task, cure, tmp_path):
    seen = read_only(made / "run")
    status, output = call("evaluate", f"checkpoint={seen}", f"task={task}", *SCORED, *quick([f"task={task}"]))
    message = f"error: checkpoint={seen}: {seen} cannot be written to, so nothing can be kept there: give {cure}.\n"
    assert status == 2 and refused(output) == message
    assert not list(tmp_path.iterdir())


# ---- a data root that is only read ----


@mounts
@pytest.mark.parametrize("classifier", [True, False])
def test_digits_that_are_only_read_are_trained_on_and_scored(
    digits, call, read_only, tmp_path, classifier, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    left_out = shutil.ignore_patterns("reference_*", *([] if classifier else ["classifier.safetensors"]))
    shutil.copytree(digits, tmp_path / "data", ignore=left_out)
    seen, before = read_only(tmp_path / "data"), tree(tmp_path / "data")
    words = [*TRAIN, f"data.root={seen}"]
    status, output = call("train", *words, "run_dir=run")
    assert status == 0 and "digits-FID" in output and "reference: 1797 images" in output, output
    assert tree(tmp_path / "data") == before
    kept = {p.parent.name for p in (tmp_path / "cache" / "diffusion").rglob("*.safetensors")}
    assert kept == {"references"} | (set() if classifier else {"classifiers"})
    status, output = call("evaluate", "checkpoint=run", *SCORED, *QUICK, "metrics=[fid]", f"reference={seen}")
    assert status == 0 and "reference:" not in output, output
    scored = [json.loads(line)["extractor_sha256"] for line in (tmp_path / "run" / "results.jsonl").open()]
    assert len(set(scored)) == 1  # by one classifier


@mounts
@pytest.mark.slow
def test_a_data_root_and_a_cache_that_are_only_read_say_what_to_do(digits, call, read_only, tmp_path, monkeypatch):
    """The features of real images are then worked out each time; without a classifier there is no score."""
    shutil.copytree(digits, tmp_path / "data", ignore=shutil.ignore_patterns("reference_*"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only(tmp_path / "cache")))
    status, output = call("train", *TRAIN, f"data.root={read_only(tmp_path / 'data')}", "run_dir=run")
    assert status == 0 and "The features of the real images are not kept: " in output, output
    (tmp_path / "data" / "classifier.safetensors").unlink()
    status, output = call("train", *TRAIN, f"data.root={read_only(tmp_path / 'data')}", "run_dir=run2")
    assert status != 0 and "The digit classifier (341 kB) cannot be stored: " in refused(output), output
    assert "extractor.weights=PATH" in output and "XDG_CACHE_HOME" in output


@mounts
def test_digits_that_cannot_be_made_are_refused(call, read_only, tmp_path):
    (tmp_path / "empty").mkdir()
    seen = read_only(tmp_path / "empty")
    for name, words, key in (("train", TRAIN, "data.root"), ("prepare", ["source=digits"], "out")):
        status, output = call(name, *words, f"{key}={seen / 'digits'}")
        assert status == 2 and refused(output).startswith(f"error: {key}={seen / 'digits'}: ")
        assert "Read-only file system" in output or "cannot be written to" in output
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


# ---- a full disk: before the work starts ----


@mounts
def test_samples_that_have_no_room_are_refused(made, call, disk):
    small = disk("64k")
    status, output = call("sample", f"checkpoint={made / 'run'}", *QUICK, "num_images=1000", f"out={small / 'a' / 'b'}")
    expected = f"out={small}/a/b: 128 kB are needed for 1,000 images, 65.5 kB are free."
    assert status == 2 and refused(output) == f"error: {expected}\n" and not list(small.iterdir())


@mounts
@pytest.mark.parametrize("key", ["out", "samples", "checkpoint"])
def test_an_evaluation_that_has_no_room_is_refused(made, call, disk, key, tmp_path):
    small = disk("200k" if key != "checkpoint" else "20m")
    given = {
        "out": [f"out={small / 'r.jsonl'}"],
        "samples": [f"samples={small / 's'}", "out=r.jsonl"],
        "checkpoint": [],
    }
    run, number = made / "run", 2000
    if key == "checkpoint":
        (small / "checkpoints").mkdir()
        for path in (run / "checkpoints").glob("step_*"):
            shutil.copy(path, small / "checkpoints")
        shutil.copy(run / "config.yaml", small)
        run, number = small, 50_000
    before = tree(small)
    words = [*SCORED[1:], f"num_images={number}", *QUICK, "metrics=[fid]"]
    status, output = call("evaluate", f"checkpoint={run}", *words, *given[key])
    folder = {"out": small, "samples": small / "s", "checkpoint": small}[key]
    expected = rf"error: {key}={folder}: [\d.]+ [kM]B are needed for {number:,} images, [\d.]+ [kM]B are free\.\n"
    assert status == 2 and re.fullmatch(expected, refused(output)), output
    assert tree(small) == before and not list(tmp_path.iterdir())


@mounts
def test_a_likelihood_that_has_no_room_is_refused(made, call, disk):
    small = disk("64k")
    words = [f"checkpoint={made / 'run'}", "metrics=[bits_per_dim]", f"out={small / 'r.jsonl'}"]
    status, output = call("evaluate", *words)
    expected = f"error: out={small}: 4.34 MB are needed for the likelihood of 1,797 images, 65.5 kB are free.\n"
    assert status == 2 and refused(output) == expected and not list(small.iterdir())


@mounts
def test_a_run_that_has_no_room_for_its_checkpoints_is_refused(digits, call, disk):
    small = disk("20m")
    words = [*BARE, "callbacks=none", f"data.root={digits}", f"run_dir={small / 'run'}", "trainer.max_steps=9"]
    status, output = call("train", *words, "save.every_steps=1", "save.keep=3")
    expected = rf"error: run_dir={small}/run: [\d.]+ MB are needed for 4 checkpoints of [\d.]+ MB, 21 MB are free\.\n"
    assert status == 2 and re.fullmatch(expected, refused(output)), output
    assert not list(small.iterdir())


# ---- a disk that fills up meanwhile ----


@pytest.fixture
def filling(monkeypatch):
    """`filling(disk, count)`: the disk becomes full when so many batches have been sampled."""

    def start(folder: Path, count: int) -> None:
        sample, made = Sampling.images, [0]

        def images(sampling, numbers):
            made[0] += 1
            if made[0] > count:
                fill(folder)
            return sample(sampling, numbers)

        monkeypatch.setattr(Sampling, "images", images)

    return start


def full(key: str, folder: Path, what: str) -> str:
    """What is said of a disk that has filled up."""
    needed = rf"[\d.]+ k?M?B are needed for {what}, " if what else ""
    cure = r"Finished files are kept\. Free some space and run the same command\."
    return rf"{key}={re.escape(str(folder))}: No space left on device: {needed}[\d.]+ k?B are free\. {cure}"


@mounts
@pytest.mark.parametrize("key", ["out", "samples"])
def test_a_disk_that_fills_up_while_sampling_is_named_and_the_images_stay(made, call, disk, filling, key, monkeypatch):
    small, first = disk("400k"), [f"checkpoint={made / 'run'}", *QUICK, "num_images=30", "batch_size=10"]
    words = ["sample", *first, f"out={small / 's'}"]
    if key == "samples":
        words = ["evaluate", *first, "extractor=digits", "metrics=[fid]", "out=r.jsonl", f"samples={small / 's'}"]
    with monkeypatch.context():
        filling(small, 2)
        status, output = call(*words)
    assert status == 2 and re.fullmatch(f"error: {full(key, small / 's', '30 images')}\n", refused(output)), output
    batches = small / "s" / ".batches"
    assert len(list(batches.glob("images_*.npz"))) == 2 and not (small / "s" / ".batches.lock").exists()
    assert not list(batches.glob(".*"))
    (small / "filler").unlink()
    monkeypatch.undo()
    status, output = call(*words)
    assert status == 0 and "20 of them existed" in output, output


@mounts
def test_a_disk_that_fills_up_while_training_is_named_and_the_run_goes_on_later(digits, call, disk, monkeypatch):
    small, write = disk("60m"), CheckpointWriter._write
    words = ["train", *BARE, "callbacks=none", f"data.root={digits}", f"run_dir={small / 'run'}", "save.keep=1"]
    words += ["trainer.max_steps=4", "save.every_steps=1"]

    def filling(writer, checkpoint, path, then):
        if checkpoint["global_step"] == 3:
            fill(small)
        write(writer, checkpoint, path, then)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "_write", filling)
        status, output = call(*words)
    assert status == 1 and "Run the same command to continue from step 2." in refused(output)
    assert re.search(full("run_dir", small / "run", r"1 checkpoint of [\d.]+ MB"), output), output
    assert RunFolder(small / "run").latest_valid()[0] == 2 and not list((small / "run").rglob("*.tmp"))
    (small / "filler").unlink()
    assert call(*words)[0] == 0


@mounts
def test_other_commands_name_the_full_disk_too(made, call, disk, tmp_path):
    small = disk("1m")
    fill(small)
    shutil.copytree(made / "run", tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "results.jsonl").write_text('{"metric": "FID", "name": "fid", "value": 1.0}\n')
    np.savez(tmp_path / "set.npz", arr_0=np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8))
    digits = "the digits and their classifier"
    for words, key, what in (
        (["lab", "task=forward", "forward.frames=0", "forward.num_points=20"], "out", ""),
        (["report"], "out", ""),
        (["prepare", "source=digits"], "out", digits),
        (["prepare", "source=set.npz", "processes=1"], "out", "about 200 images"),
        (["train", *TRAIN, "run_dir=run"], "data.root", "the digits"),
    ):
        folder = small / key / "x"
        status, output = call(*words, f"{key}={folder}")
        assert status == 2 and re.fullmatch(f"error: {full(key, folder, what)}\n", refused(output)), output
        assert [p.name for p in small.iterdir()] == ["filler"], words
    assert not (tmp_path / "run").exists()


# ---- the parts ----


def test_a_room_says_what_is_needed_and_what_is_free(tmp_path):
    Room("out", tmp_path, 1000, "a picture").check()
    with pytest.raises(Unwritable, match=r"^out=.*/a/b: 1e\+06 TB are needed for 3 images, [\d.]+ .B are free\.$"):
        Room("out", tmp_path / "a" / "b", 10**18, "3 images").check()
    with pytest.raises(FileNotFoundError), writing(Room("out", tmp_path)):
        (tmp_path / "no" / "file").read_text()
    elsewhere = OSError(28, "No space left on device", "/somewhere/else")
    with pytest.raises(OSError, match="else"), writing(Room("out", tmp_path)):
        raise elsewhere
    with pytest.raises(Unwritable, match=f"^samples={tmp_path}/b: No space"), \
            writing(Room("out", tmp_path / "a"), Room("samples", tmp_path / "b")):  # fmt: skip
        raise OSError(28, "No space left on device", str(tmp_path / "b" / "file"))


def test_a_lock_is_gone_when_it_is_released_and_folders_made_for_it_too(tmp_path):
    lock = tmp_path / "a" / "b" / ".lock"
    with locked(lock, "out=a"):
        assert lock.read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    assert not list(tmp_path.iterdir())
    with locked(lock, "out=a"):
        (lock.parent / "file").touch()
    assert [p.name for p in lock.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_added_to_the_target_of_a_link(tmp_path, kind):
    path, victim = tmp_path / "metrics.csv", tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    with pytest.raises(OSError, match="is not a regular file"):
        append(path, "row\n")
    assert victim.read_text() == "precious"
    append(tmp_path / "new.csv", "row\n")
    append(tmp_path / "new.csv", "row\n")
    assert (tmp_path / "new.csv").read_text() == "row\nrow\n"


def test_two_processes_that_wait_for_a_lock_have_it_one_after_the_other(tmp_path):
    """Though the one that releases it removes the file."""
    code = """if True:
        import sys, time
        from diffusion.files import locked
        for _ in range(40):
            with locked(sys.argv[1], "x", wait=True):
                number = int(open(sys.argv[2]).read())
                time.sleep(0.001)
                open(sys.argv[2], "w").write(str(number + 1))
    """
    (tmp_path / "count").write_text("0")
    words = [sys.executable, "-c", code, str(tmp_path / "lock"), str(tmp_path / "count")]
    processes = [subprocess.Popen(words, cwd=ROOT) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "120" and not (tmp_path / "lock").exists()
