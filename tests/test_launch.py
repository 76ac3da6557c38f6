"""launch/: each script says the command that it runs; several processes, machines that come and go, sweeps."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

pytestmark = pytest.mark.slow

PLAIN = ["callbacks=none", "save.every_steps=10", "log_every=5", "data.batch_size=16", "trainer.threads=1"]


def start(script: str, *words: str, output: Path) -> subprocess.Popen:
    """A script of launch/, from the checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB_"))}
    env |= {"DIFFUSION_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    with open(output, "w") as f:
        return subprocess.Popen(
            ["bash", f"launch/{script}", *words], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT
        )  # fmt: skip


def finish(process: subprocess.Popen, output: Path, status: int = 0) -> list[str]:
    """The lines of its output, once it has ended with this status."""
    try:
        assert process.wait(timeout=300) == status, output.read_text()
    finally:
        end(process)
    return output.read_text().splitlines()


def tree(pid: int) -> list[int]:
    """A process and all that descend from it; those of torchrun are in groups of their own."""
    children = [int(c) for f in Path(f"/proc/{pid}/task").glob("*/children") for c in f.read_text().split()]
    return [pid, *(p for c in children for p in tree(c))]


def end(*processes: subprocess.Popen) -> None:
    """As a power cut does."""
    for pid in [p for process in processes if process.poll() is None for p in tree(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(what, process: subprocess.Popen, output: Path, seconds: float = 150) -> None:
    late = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"ended with {process.returncode}\n{output.read_text()}"
        assert time.monotonic() < late, output.read_text()
        time.sleep(0.1)


def machines(run: Path) -> int:
    """Of the newest start of a run."""
    config = run / "config.yaml"
    return yaml.safe_load(config.read_text())["trainer"]["num_nodes"] if config.is_file() else 0


def newest(run: Path) -> int:
    return max((int(p.stem.removeprefix("step_")) for p in run.glob("checkpoints/step_*.ckpt")), default=0)


def test_local_trains_with_a_process_a_gpu_or_as_many_as_are_asked_for(digits, tmp_path):
    words = [*PLAIN, "trainer.max_steps=20", f"data.root={digits}", f"run_dir={tmp_path}/run", "trainer.devices=2"]
    output = tmp_path / "output"
    said = finish(start("local.sh", *words, output=output), output)
    gpus = max(1, torch.cuda.device_count())
    assert said[0].startswith("+ ") and f"-m diffusion.train trainer=ddp trainer.devices={gpus} " in said[0]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["devices"] == 2
    assert newest(tmp_path / "run") == 20


def test_sweep_trains_one_run_after_another_and_finds_them_again(digits, tmp_path):
    words = [*PLAIN, "trainer.max_steps=3", f"data.root={digits}", f"run_dir={tmp_path}/runs", "seed=0,1"]
    output = tmp_path / "output"
    said = finish(start("sweep.sh", *words, output=output), output)
    assert said[0].startswith("+ ") and "-m diffusion.train --multirun " in said[0]
    runs = sorted(p.parent for p in tmp_path.glob("runs/*/config.yaml"))
    assert [yaml.safe_load((r / "config.yaml").read_text())["seed"] for r in runs] == [0, 1]
    assert sum("Already complete" in line for line in finish(start("sweep.sh", *words, output=output), output)) == 2


def test_sweep_refuses_all_runs_for_one_that_cannot_be(tmp_path):
    """Before the first is trained, also where the runs are of several experiments."""
    output = tmp_path / "output"
    for words, message in (
        (["seed=0,1", "optimizer.lr=1e-3,-1"], "error: optimizer.lr=-1 must be above 0."),
        (["experiment=digits,cifar10", "guidance=classifier_free"], "error: guidance.scale="),
        (["launcher=slrum"], "error: Unknown launcher: slrum. Did you mean slurm?"),
        (["hydra/launcher=submitit_local"], "submitit_local starts all runs at once"),
        (["launcher=slurm", "launcher.partitoin=gpu"], "Did you mean hydra.launcher.partition?"),
        (["--partition=gpu", "seed=0,1"], "error: --partition=gpu is not a flag of this command."),
    ):
        said = finish(start("sweep.sh", *words, f"run_dir={tmp_path}/${{name}}", output=output), output, status=2)
        assert message in said[-1]
        assert list(tmp_path.iterdir()) == [output]


def test_torchrun_takes_in_a_machine_that_joins_and_goes_on_without_one_that_dies(digits, tmp_path, free_port):
    run, outputs = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
    words = ["--nnodes=1:2", "--nproc-per-node=1", f"--rdzv-endpoint=localhost:{free_port}"]
    words += ["--rdzv-conf=last_call_timeout=3"]  # seconds a rendezvous waits for more machines
    words += [*PLAIN, "trainer.max_steps=1000000", f"data.root={digits}", f"run_dir={run}"]
    first = start("torchrun.sh", *words, output=outputs[0])
    second = None
    try:
        until(lambda: newest(run) >= 10, first, outputs[0])
        assert machines(run) == 1
        second = start("torchrun.sh", *words, output=outputs[1])
        until(lambda: machines(run) == 2, first, outputs[0])
        assert "Stopped by signal 15" in outputs[0].read_text()  # saved, for the new start
        step = newest(run)
        until(lambda: newest(run) > step, first, outputs[0])
        end(second)
        until(lambda: machines(run) == 1, first, outputs[0])
        step = newest(run)
        until(lambda: newest(run) > step, first, outputs[0])
        first.send_signal(signal.SIGUSR1)
        first.wait(timeout=60)
        assert first.returncode != 0 and "Stopped by signal 10" in outputs[0].read_text()
    finally:
        end(*(p for p in (first, second) if p is not None))
    assert outputs[0].read_text().startswith("+ ") and "-m torch.distributed.run " in outputs[0].read_text()


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
