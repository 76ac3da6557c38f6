"""prepare stopped at any point, by a kill or a full disk, and started again: the same bytes, and nothing lost."""

import ctypes
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, inside
from test_prepare_set import contents, image, made_church  # noqa: F401  (the fixture church)
from test_prepare_sources import filled

from diffusion import prepare
from diffusion.config.compose import composed
from diffusion.data.prepare.processes import over_processes
from diffusion.data.shards.index import read_index

RNG = np.random.default_rng(13)


def in_group(group):
    """Running processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == group and state != "Z":
            found.append(path.parent.name)
    return found


def started(cfg, folder):
    """prepare in a process of its own, from a composed configuration: composing takes longer than the rest."""

    def run():
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        prepare.main.__wrapped__(cfg)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def finished(cfg, folder):
    """Run prepare to its end; the seconds it took."""
    began, child = time.monotonic(), started(cfg, folder)
    child.join()
    assert child.exitcode == 0
    return time.monotonic() - began


def killed_after(cfg, folder, seconds):
    """Whether prepare, killed with -9, was still at work; its workers are gone then too."""
    child = started(cfg, folder)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline = time.monotonic() + 20
    while in_group(child.pid):
        assert time.monotonic() < deadline, "workers outlived the process that started them"
        time.sleep(0.01)
    return child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("points", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_and_started_again_it_gives_the_same_bytes(points, church, tmp_path):
    words, whole = church
    cfg = composed("prepare", [*words, "out=again", "processes=2"])
    usual, kills = finished(cfg, tmp_path), 0
    assert contents(tmp_path / "again") == whole
    while kills < points:
        cfg.processes = 1 + kills % 3
        shutil.rmtree(tmp_path / "again")
        for _ in range(RNG.integers(1, 4)):
            kills += killed_after(cfg, tmp_path, RNG.uniform(0, usual))
        finished(cfg, tmp_path)
        assert contents(tmp_path / "again") == whole


def test_what_is_finished_is_not_made_again_after_a_kill(tmp_path):
    """The command itself, killed while it works: it leaves no index, and goes on with the shards it has."""
    filled(tmp_path / "c", {f"{n}.png": image(96, 96) for n in range(150)}, "folder")
    words = [sys.executable, "-m", "diffusion.prepare", "source=c", "image_size=64", "shard_samples=1", "processes=1"]
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen(words, **options)
    out = tmp_path / "data" / "c"
    while len(list((out / ".prepare").glob("*.json"))) < 5 and child.poll() is None:
        time.sleep(0.002)
    child.kill()
    child.wait()
    time.sleep(0.2)  # the worker notices at its next image
    assert not (out / "index.json").exists()
    finished = {p.name.removesuffix(".json"): (out / p.name.removesuffix(".json")).stat().st_mtime_ns
                for p in (out / ".prepare").glob("*.json")}  # fmt: skip
    assert 5 <= len(finished) < 150
    assert inside("prepare", words[3:], tmp_path) == 0
    assert read_index(out).count("train") == 150
    assert all((out / name).stat().st_mtime_ns == at for name, at in finished.items())
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_full_disk_is_named_and_what_is_finished_stays(tmp_path, capfd):
    filled(tmp_path / "x.zip", {f"{n}.png": image(64, 64) for n in range(8)} | {"9.png": image(400, 400)}, "zip")
    words = ["source=x.zip", "image_size=64", "crop=none", "shard_samples=4", "processes=1"]

    def run(folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond, as on a full disk
        os._exit(inside("prepare", words, folder))

    child = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 2 and "out=data/x: File too large. Finished files are kept" in capfd.readouterr().err
    assert not list((tmp_path / "data").rglob("*.tmp")) and not list((tmp_path / "data").rglob("index.json"))
    assert inside("prepare", words, tmp_path) == 0


def with_a_disk_of(size, work):
    """What `work(enlarge)` returns in a process with a disk of so many bytes at `full`; OSError if that may not be."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, again = 0x20000, 0x10000000, 0x44000, 32

    def mount(target, kind, flags, data):
        if libc.mount(b"none", target, kind, flags, data):
            raise OSError(ctypes.get_errno(), "mount")

    def run(sender):
        libc.unshare(new_mounts if os.geteuid() == 0 else new_mounts | new_user)
        try:
            mount(b"/", None, private, None)
            mount(b"full", b"tmpfs", 0, b"size=%d" % size)
        except OSError as error:
            sender.send(error)
        else:
            sender.send(work(lambda more: mount(b"full", b"tmpfs", again, b"size=%d" % more)))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(sender,))
    child.start()
    found = receiver.recv()
    child.join()
    return found


@pytest.mark.parametrize("size", [4096, 40_000, 100_000, 150_000, 180_000])
def test_on_a_small_disk_it_says_so_and_goes_on_when_there_is_room(size, church, tmp_path, monkeypatch, capfd):
    words, whole = church
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path)
    source = (tmp_path / "c.zip").read_bytes()

    def work(enlarge):
        first = inside("prepare", [*words, "out=full/set"], tmp_path)
        left = contents(Path("full"))
        enlarge(10_000_000)
        return first, left, inside("prepare", [*words, "out=full/set"], tmp_path), contents(Path("full/set"))

    found = with_a_disk_of(size, work)
    if isinstance(found, OSError):
        pytest.skip(f"no file system may be mounted here: {found}")
    first, left, second, made = found
    message = r"error: out=full/set: No space left on device: [\d.]+ kB are needed for about \d+ images, "
    assert first == 2 and re.match(message, capfd.readouterr().err)
    assert not [name for name in left if name.endswith((".tmp", "index.json"))]
    assert second == 0 and made == whole and (tmp_path / "c.zip").read_bytes() == source


def test_a_worker_that_is_killed_is_told_with_what_it_was_at():
    def work(item, tick):
        if item == "third":
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(RuntimeError, match="ended by signal 9 at third"):
        list(over_processes(["first", "second", "third"], work, 1, lambda done: None))
