"""Whatever fails, the run ends soon on every rank, says why, and leaves a folder that goes on."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from numbered import damaged
from reporting import SIZE, reporting
from test_resume import finish, start, wait_for
from torch.distributed import PrefixStore, TCPStore

from diffusion.data.shards.index import read_index
from diffusion.data.shards.order import Plan
from diffusion.distributed.launcher import Compute
from diffusion.files import Room, reason, shortage
from diffusion.runs.folder import OnError, RunFolder
from diffusion.training.checkpoint import contents
from diffusion.training.fit import Fit, Length
from diffusion.training.meter import MetricsCsv
from diffusion.training.module import DiffusionModule

RANKS = ["trainer=cpu", "trainer.devices=4", "trainer.threads=1", "callbacks=none", "data.batch_size=16", "log_every=2"]
RANKS += ["save.every_steps=4", "data.lanes=8", "trainer.max_steps=100000"]
ALONE = ["callbacks=none", "trainer.threads=1", "data.batch_size=16", "log_every=2", "save.every_steps=2"]


def children(process: subprocess.Popen) -> list[int]:
    """The processes that this one has started, which are the ranks 1, 2, 3, in this order."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == process.pid and b"diffusion.train" in command:
            found.append(int(status.parent.name))
    return sorted(found)


def gone(pids: list[int]) -> bool:
    """None of them runs any more; one that waits to be reaped is no process."""
    states = [Path(f"/proc/{pid}/stat") for pid in pids]
    return all(not s.exists() or s.read_text().rpartition(")")[2].split()[0] == "Z" for s in states)


def goes_on(folder: Path, words: list[str], cwd: Path) -> None:
    """The folder is sound: the newest checkpoint is whole, and the run goes on from it, alone as well."""
    step, path, complaints = RunFolder(folder).latest_valid()
    assert path is not None and not complaints
    words = [*words, "trainer.devices=1", f"trainer.max_steps={step + 2}"]
    assert f"continuing from step {step}" in finish(start(words, cwd))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["KILL", "STOP"])
def test_a_rank_that_is_killed_or_hangs_ends_all_of_them(victim, number, digits, tmp_path):
    words = [*RANKS, f"data.root={digits}", "run_dir=run"]
    process = start(words, tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000004.ckpt", process)
    pids = [process.pid, *children(process)]
    assert len(pids) == 4
    os.kill(pids[victim], number)
    try:
        others = [pid for pid in pids if pid != pids[victim]]
        deadline = time.monotonic() + 60
        while not gone(others):
            assert time.monotonic() < deadline, "some are still there"
            time.sleep(0.1)
    finally:
        for pid in pids:
            if not gone([pid]):
                os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode in ((1,) if victim else (-9,))
    cause = rf"error: rank {victim} \(last at step \d+\) "
    cause += "ended with signal 9" if number == signal.SIGKILL else "sent no heartbeat for 20 s"
    if victim == 0:
        cause = "error: the store of the run does not answer: rank 0 or its machine has failed"
    assert re.search(cause, output), output
    goes_on(tmp_path / "run", words, tmp_path)


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_of_them_and_is_named(digits, tmp_path):
    index = read_index(digits)
    order = Plan([shard.samples for shard in index.shards], 16, 8, seed=0).locate(np.arange(16 * 40))[1]
    data = damaged(digits, tmp_path / "set", [order[16 * 7 + 9]], per_shard=225)  # slot 9 of 16 is rank 2's
    words = [*RANKS, f"data.root={data}", "run_dir=run"]
    process = start(words, tmp_path)
    wait_for(tmp_path / "run" / "config.yaml", process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(r"error: data\.root=.* has changed: sample .*\nTraining of rank 2 ended at step [67]\.", output)
    assert re.search(r"error: rank 2 failed at step [67]: DataChanged: data\.root=.* has changed: sample", output), (
        output
    )
    goes_on(tmp_path / "run", [*words, "data.on_bad_sample=skip"], tmp_path)


# ---- the watchdog alone: processes that do nothing but report ----


@pytest.fixture
def three(tmp_path):
    """`three("works", "raises", "works")`: (exit status, output) of three processes with a watchdog each.

    They are no forks of this process: its store looks up the names of those who connect, in a thread, and a fork made
    at that moment waits for ever for glibc's lock of it.
    """

    def run(*does: str, stopped_for: float = 0) -> list[tuple[int, str]]:
        store, server = TCPStore("127.0.0.1", 0, is_master=True), multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["torch.distributed"])
        outputs = [tmp_path / f"{rank}" for rank in range(SIZE)]
        ranks = [server.Process(target=reporting, args=(k, does[k], store.port, outputs[k])) for k in range(SIZE)]
        try:
            for process in ranks:
                process.start()
            if "dies" in does:
                PrefixStore("diffusion", store).wait([f"beat/{does.index('dies')}"])
                ranks[does.index("dies")].kill()
            if stopped_for:
                PrefixStore("diffusion", store).wait([f"beat/{rank}" for rank in range(SIZE)])
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    for process in ranks:
                        os.kill(process.pid, number)
                    time.sleep(stopped_for if number == signal.SIGSTOP else 0)
            for process in ranks:
                process.join(60)
            return [(process.exitcode, output.read_text()) for process, output in zip(ranks, outputs, strict=True)]
        finally:
            for process in ranks:
                process.kill()
                process.join()

    return run


@pytest.mark.slow
def test_a_rank_that_raises_is_named_by_all(three):
    (first, a), (second, b), (third, c) = three("works", "raises", "works")
    cause = "rank 1 failed at step 4: ValueError: no more"
    assert (first, second, third) == (1, 1, 1) and f"cause: {cause}" in b
    for rank, output in ((0, a), (2, c)):
        assert re.search(rf"error: {cause}\. Rank {rank} ends at step \d+\.\nlast words {rank}", output)


@pytest.mark.slow
def test_a_rank_that_dies_is_named_by_the_others(three):
    results = three("works", "works", "dies")
    assert [status for status, _ in results] == [1, 1, -9]
    for _, output in results[:2]:
        assert re.search(r"error: rank 2 \(last at step \d+\) sent no heartbeat for 4 s", output)


@pytest.mark.slow
def test_a_run_that_gets_no_further_ends_and_the_rank_that_is_behind_is_named(three):
    results = three("hangs", "waits", "hangs")
    assert [status for status, _ in results] == [1, 1, 1]
    for _, output in results:
        assert "no rank made progress for trainer.timeout=6 s; furthest behind: rank 1 (rank 0 at step 5, " in output


def test_ranks_that_end_at_different_times_are_no_failure(three):
    results = three("ends", "ends", "ends")
    assert [(status, output) for status, output in results] == [(0, f"over {rank}\n") for rank in range(3)]


@pytest.mark.slow
def test_ranks_that_were_all_suspended_go_on(three):
    results = three("ends", "ends", "ends", stopped_for=9)
    assert [(status, output) for status, output in results] == [(0, f"over {rank}\n") for rank in range(3)]


# ---- a gradient that is not finite ----


def broken_at(monkeypatch, *steps):
    """Losses of these steps (from 1) are not finite in one image."""
    step = DiffusionModule.training_step

    def objective(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        return loss * torch.where((batch["position"] // 16 + 1 == torch.tensor(steps)[:, None]).any(), math.nan, 1.0)

    monkeypatch.setattr(DiffusionModule, "training_step", objective)


def test_a_loss_that_is_not_finite_stops_the_run_and_its_draws_are_kept(digits, command_inside, tmp_path, monkeypatch):
    broken_at(monkeypatch, 5)
    words = [*ALONE, f"data.root={digits}", "trainer.max_steps=8", "run_dir=run"]
    done = command_inside("train", *words, check=1)
    assert "error: the gradient of step 5 has the norm nan. Its images, t and losses are in" in done.stderr
    assert "Run the same command to continue from step 4." in done.stderr and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "nonfinite" / "step_00000005_rank_0000.json").read_text())
    assert record["step"] == 5 and record["position"] == list(range(64, 80))
    assert len(record["t"]) == len(record["loss"]) == 16 and all(1 <= t <= 1000 for t in record["t"])
    assert RunFolder(tmp_path / "run").steps() == [4, 2]
    monkeypatch.undo()
    command_inside("train", *words, check=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipping_a_step_leaves_all_as_it_was_and_goes_on(digits, command_inside, tmp_path, monkeypatch, accumulate):
    broken_at(monkeypatch, 5, 7)
    words = [*ALONE, f"data.root={digits}", f"trainer.accumulate={accumulate}", "on_nonfinite=skip"]
    words += ["save.every_steps=1", "save.keep=10", "ema.warmup=false", "ema.decay=0.5"]
    done = command_inside("train", *words, "trainer.max_steps=8", "run_dir=run", check=0)
    assert "Not finite: 2 steps were skipped so far" in done.stdout
    at = [contents(tmp_path / "run" / "checkpoints" / f"step_{step:08d}.ckpt") for step in range(1, 9)]
    for before, after, skipped in ((4, 5, True), (5, 6, False), (6, 7, True), (7, 8, False)):
        old, new = at[before - 1], at[after - 1]
        for part in ("state_dict", "ema"):
            assert all(torch.equal(old[part][name], new[part][name]) for name in old[part]) == skipped
        moments = [[s["exp_avg"] for s in c["optimizer_states"][0]["state"].values()] for c in (old, new)]
        assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True)) == skipped
        assert all(v.isfinite().all() for v in new["state_dict"].values())
    losses = [line.split(",")[1] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert len(losses) == 4 and all(math.isfinite(float(loss)) for loss in losses)
    done = command_inside("train", *words, "trainer.max_steps=8", "run_dir=other", "max_nonfinite=1", check=1)
    message = "2 steps had a gradient that is not finite, more than max_nonfinite=1 allows. The last one is step 7"
    assert message in done.stderr


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB: two checkpoints of the digits, and no third."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_or_not_and_leaves_the_checkpoints(digits, command_inside, small_disk, monkeypatch):
    """Found before the run begins, and again when somebody else fills the disk while it trains."""
    run = small_disk / "run"
    words = [*ALONE, f"data.root={digits}", f"run_dir={run}", "save.keep=5"]
    done = command_inside("train", *words, "trainer.max_steps=12", check=2)
    message = rf"error: run_dir={run}: [\d.]+ MB are needed for 6 checkpoints of [\d.]+ MB, [\d.]+ MB are free\.\n"
    assert re.fullmatch(message, done.stderr) and not run.exists()
    with monkeypatch.context() as patched:
        patched.setattr(Room, "check", lambda room: None)  # there was room a moment ago
        done = command_inside("train", *words, "trainer.max_steps=12", check=1)
    assert re.search(r"error: .*step_0+6\.ckpt cannot be written: No space left on device\. Earlier", done.stderr)
    message = rf"run_dir={run}: No space left on device: [\d.]+ MB are needed for \d checkpoints of [\d.]+ MB, "
    assert re.search(message, done.stderr)
    assert "Run the same command to continue from step 4." in done.stderr and "Traceback" not in done.stderr
    assert RunFolder(run).latest_valid()[0] == 4
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.endswith(".tmp")]
    done = command_inside("train", *words, "trainer.max_steps=9", "save.on_error=warn", check=1)
    assert re.search(rf"^warning: run_dir={run}: .* are needed for 3 checkpoints", done.stderr, re.M)
    message = "^warning: .*No space left on device.* Training continues .save.on_error=warn."
    assert len(re.findall(message, done.stderr, re.M)) == 3
    assert "error: The checkpoint of step 9 could not be written.\n" in done.stderr  # trained, but not on disk
    assert RunFolder(run).latest_valid()[0] == 4
    (run / "checkpoints" / "step_00000002.ckpt").unlink()  # there is room again
    command_inside("train", *words, "trainer.max_steps=9", "save.keep=1", "save.on_error=warn", check=0)


def fill(folder: Path) -> Path:
    """Take all the room there is."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    return folder / "filler"


def test_a_row_that_has_no_room_is_not_there_in_part(small_disk, capsys):
    path = small_disk / "metrics.csv"
    rows = {action: MetricsCsv(path, OnError(action)) for action in ("stop", "warn")}
    rows["stop"].log_metrics({"loss": 1.0}, 1)
    fill(small_disk)
    with pytest.raises(OSError, match="No space left on device: .*metrics.csv"):
        for step in range(2, 1000):
            rows["stop"].log_metrics({"loss": 1.0}, step)
    kept = path.read_text()
    assert kept.endswith("\n") and 100 < len(kept.splitlines()) < 1000
    rows["warn"].log_metrics({"loss": 1.0}, 1000)
    said = capsys.readouterr().err
    assert said == f"warning: {path}: No space left on device. Training continues (save.on_error=warn).\n"
    assert path.read_text() == kept


def test_a_disk_that_is_full_at_the_start_is_named(digits, command_inside, small_disk):
    run, words = small_disk / "run", [*ALONE, f"data.root={digits}"]
    command_inside("train", *words, f"run_dir={run}", "trainer.max_steps=2", check=0)
    filler = fill(small_disk)
    done = command_inside("train", *words, f"run_dir={run}", "trainer.max_steps=4", check=2)
    message = rf"error: run_dir={run}: [\d.]+ MB are needed for 1 checkpoint of [\d.]+ MB, [\d.]+ k?B are free\.\n"
    assert re.fullmatch(message, done.stderr)
    done = command_inside("train", *words, f"run_dir={run}", "trainer.max_steps=4", "save.on_error=warn", check=2)
    assert re.search(rf"^error: run_dir={run}: No space left on device: ", done.stderr, re.M)
    filler.unlink()
    command_inside("train", *words, f"run_dir={run}", "trainer.max_steps=4", check=0)


# ---- what a process runs out of ----


def limited(words: list[str], folder: Path, limit: str) -> tuple[int, str]:
    """A training under a limit of the shell's: status and output."""
    script = f'{limit}; exec "{sys.executable}" -m diffusion.train "$@"'
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize("files", [31, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 28, 33, 36, 40))])
def test_too_few_open_files_are_named_with_the_limit_and_the_cure_or_are_enough(files, digits, tmp_path):
    words = [*ALONE, f"data.root={digits}", "trainer.max_steps=4", "data.num_workers=2", "run_dir=run"]
    status, output = limited(words, tmp_path, f"ulimit -n {files}")
    assert "Traceback" not in output and "error: \n" not in output
    if status:
        message = f"error: Too many open files: the limit is {files} per process (ulimit -n). Raise the limit, "
        assert (
            status in (1, 2) and message in output and "a smaller data.num_workers" in output and "sample" not in output
        )
    else:
        assert RunFolder(tmp_path / "run").steps()[0] == 4


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError(), "RuntimeError, without a message."),
        (OSError(), "OSError, without a message."),
        (AssertionError(" "), "AssertionError, without a message."),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "a: No space left on device."),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files: the limit is "),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "No further process or thread can be "),
        (RuntimeError("can't start new thread"), "No further process or thread can be started. "),
        (
            RuntimeError("unable to write to shared memory: No space left on device (28)"),
            "/dev/shm, the shared memory of processes, ",
        ),
        (MemoryError(), "Out of memory."),
    ],
)
def test_a_reason_is_never_empty_and_names_what_has_run_out(error, said):
    assert reason(error).startswith(said)
    outer = ValueError()
    outer.__cause__ = error
    if shortage(error) and not isinstance(error, BlockingIOError):  # of a lock, where it is the cause of another
        assert reason(outer).startswith(said)
    else:
        assert reason(outer) == "ValueError, without a message."


# ---- folders without locks ----


def test_a_file_system_without_locks_is_named_and_nobody_is_said_to_hold_the_folder(tmp_path, monkeypatch):
    """No such file system can be made here: lockf says what that of Lustre without `flock` does."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with (
        pytest.raises(ValueError, match="not support locks .Function not implemented."),
        RunFolder(tmp_path).locked(),
    ):
        pass


# ---- ranks that never meet ----


def test_ranks_that_do_not_meet_end_after_the_timeout(digits, tmp_path):
    """One of two, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "alone"}
    words = [*ALONE, f"data.root={digits}", "run_dir=run", "trainer=ddp", "trainer.accelerator=cpu"]
    process = start([*words, "trainer.timeout=3"], tmp_path, **place)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: the ranks did not connect within trainer.timeout=3 s. Rank 0 on" in output
    assert f"at 127.0.0.1:{port}, waits for the others." in output


@pytest.mark.parametrize(
    "environment, main",
    [
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "LOCAL_RANK": "1"}, True),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({}, True),
    ],
)
def test_the_rank_that_writes_is_rank_0_of_whoever_has_started_the_ranks(environment, main, monkeypatch):
    """Also with torchrun in a task of srun, whose numbers are others."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Compute(devices=2, accelerator="cpu").main == main


# ---- how gradients are summed ----


@pytest.mark.parametrize(
    "device, accumulate, deterministic, static",
    [("cuda", 1, False, True), ("cuda", 2, False, False), ("cuda", 1, True, False), ("cpu", 1, False, False)],
)
def test_a_static_graph_is_for_steps_of_one_backward_pass(device, accumulate, deterministic, static):
    fit = Fit.__new__(Fit)
    fit.training = SimpleNamespace(deterministic=deterministic, length=Length(max_steps=1, accumulate=accumulate))
    fit.place = SimpleNamespace(device=torch.device(device))
    assert fit._strategy()._ddp_kwargs["static_graph"] == static
