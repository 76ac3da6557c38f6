"""A SLURM on this machine, by tests/slurm-testbed, and what a user does with it: for test_slurm.py, chaos_slurm.py."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

TESTBED = Path(__file__).with_name("slurm-testbed")
LIVING = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED", "PREEMPTED")


class Cluster:
    """What a user does with a cluster: submit from the checkout, look, signal, wait."""

    def __init__(self, directory: Path, env: dict[str, str], nodes: int) -> None:
        self.directory, self.env = directory, env
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._looked = time.monotonic()

    def run(self, *words: object) -> str:
        done = subprocess.run(list(map(str, words)), cwd=ROOT, env=self.env, text=True, capture_output=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def submit(self, output: Path, *words: object) -> str:
        """The job's id; `output` takes what it prints."""
        return self.run("sbatch", "--parsable", f"--output={output}", *words)

    def info(self, job: str, key: str) -> str:
        """JobState, Restarts, ExitCode, ... of a job or of one task of an array, JOB_TASK."""
        self.look_after_the_nodes()
        return re.search(rf"\b{key}=(\S+)", self.run("scontrol", "-o", "show", "job", job))[1]

    def attempt(self, *words: object) -> bool:
        """Whether SLURM has done it."""
        return subprocess.run(list(map(str, words)), cwd=ROOT, env=self.env, capture_output=True).returncode == 0

    def signal(self, job: str, name: str = "USR1") -> bool:
        """A signal to the processes of a job or of one task of an array, as before its time limit; False before it has
        any.

        To the step: `scancel ARRAY_TASK` tries again and again while other tasks of the array are pending.
        """
        return self.attempt("scancel", f"--signal={name}", self.info(job, "JobId") + ".0")

    def until(self, what, job: str, output: Path, seconds: float = 240) -> None:
        """Wait for what() while the job is not over. A requeued job is pending for 6 s."""
        end = time.monotonic() + seconds
        while not what():
            state = self.info(job, "JobState")
            assert state in LIVING or what(), f"job {job} is {state}\n{text(output)}"  # what() may have been its end
            assert time.monotonic() < end, f"job {job} is {state} after {seconds} s\n{text(output)}"
            time.sleep(0.1)

    def finish(self, job: str, output: Path, state: str = "COMPLETED", seconds: float = 240) -> None:
        """Wait for the job's end, which has to be this one."""
        end = time.monotonic() + seconds
        while (found := self.info(job, "JobState")) in LIVING:
            assert time.monotonic() < end, f"job {job} is {found} after {seconds} s\n{text(output)}"
            time.sleep(0.2)
        assert found == state, f"job {job} is {found}\n{text(output)}"

    def look_after_the_nodes(self) -> None:
        """Start a slurmd again that has died, as systemd does on a cluster: that of SLURM 22.05 may, of a double free,
        when it launches several tasks of an array at once. Its jobs live on."""
        if time.monotonic() - self._looked > 3:
            self._looked = time.monotonic()
            for node in self.nodes:
                self.testbed("node", node, "start")

    def kill_node(self, node: str) -> None:
        """A power failure, which SLURM is told of at once, and its end."""
        self.testbed("node", node, "kill")
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
        self.testbed("node", node, "start")

    @contextlib.contextmanager
    def paused(self, node: str) -> Iterator[None]:
        """Inside, the node does not answer."""
        pid = int((self.directory / "run" / f"slurmd.{node}.proc").read_text().split()[0])
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def testbed(self, *words: str) -> None:
        subprocess.run([TESTBED, words[0], self.directory, *words[1:]], check=True, capture_output=True)


class NoCluster(Exception):
    """A cluster cannot be had here."""


@contextlib.contextmanager
def up(directory: Path, nodes: int = 2, *flags: str) -> Iterator[Cluster]:
    """A cluster whose files are in this folder. Raises NoCluster without its packages, or without root."""
    if os.geteuid() != 0:
        raise NoCluster("a SLURM of our own can be started by root only")
    words = ["--nodes", str(nodes), *flags]
    if os.environ.get("SLURM_TESTBED_INSTALL") != "1":
        words.append("--no-install")
    started = subprocess.run([TESTBED, "up", directory, *words], text=True, capture_output=True)
    if started.returncode == 4:
        raise NoCluster(f"{started.stderr.strip()}; with SLURM_TESTBED_INSTALL=1 the packages are installed")
    assert started.returncode == 0, started.stderr
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "WANDB_", "PYTEST_"))}
    env |= {"DIFFUSION_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    env.update(word.split("=", 1) for word in shlex.split(started.stdout) if "=" in word)
    try:
        yield Cluster(directory, env, nodes)
    finally:
        subprocess.run([TESTBED, "down", directory], capture_output=True)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    """A cluster of two nodes for tests, which are skipped where there can be none."""
    try:
        # KillWait: as on most clusters, so that a busy machine has time to save. GPUs: names without devices.
        with up(directory, 2, "--gpus", "2", "--set", "KillWait=30") as cluster:
            yield cluster
    except NoCluster as error:
        pytest.skip(str(error))


def text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def training(run: Path) -> int:
    """How many processes train in a run folder, or import what they need to; neither srun nor task.sh is one."""
    found = 0
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = command.read_bytes().split(b"\0")
            found += words[1:3] == [b"-m", b"diffusion.train"] and f"run_dir={run}".encode() in words
    return found


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(p.stem.removeprefix("step_")) for p in folder.glob("checkpoints/step_*.ckpt")), default=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Network, EMA and optimizer of a finished run."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found = {"step": torch.tensor(checkpoint["global_step"])}
    found |= {f"weights {k}": v for k, v in checkpoint["state_dict"].items()}
    found |= {f"ema {k}": v for k, v in checkpoint["ema"].items()}
    for i, state in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"optimizer {i} {k}": torch.as_tensor(v) for k, v in state.items()}
    return found


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
