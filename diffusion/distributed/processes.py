"""The processes of training, sampling or evaluation: starting them, if no launcher has done so, and connecting them.

Under torchrun or srun the processes exist already. Otherwise this process starts the others of its machine, with
Lightning's Fabric.
"""

import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.strategies.launchers import subprocess_script

from diffusion.distributed.launcher import Compute, under_srun, under_torchrun
from diffusion.distributed.place import Place
from diffusion.distributed.ranks import NEVER, Abandoned, Ranks
from diffusion.distributed.signals import BATCH, Signals
from diffusion.distributed.watchdog import Watchdog, connect, describe_exit, forget
from diffusion.files import reason

for quiet in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
    logging.getLogger(quiet).setLevel(logging.ERROR)
# Lightning's observer kills all processes at once, without a message, when one ends with a status other than 0. A
# process that is stopped by a signal ends with such a status. The watchdog replaces the observer.
subprocess_script._launch_process_observer = lambda processes: None


def environment(number: int) -> ClusterEnvironment:
    """The Lightning environment of the launcher that started this process, one of `number`."""
    if number > 1 and under_torchrun():
        return TorchElasticEnvironment()
    if number > 1 and under_srun():
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


@contextmanager
def meeting(
    main: bool,
    started: Callable[[], Sequence[subprocess.Popen]],
    ended: Callable[[], dict[int, int]],
    signals: Signals,
    timeout: float,
) -> Iterator[None]:
    """Context in which the ranks connect to each other. It ends this process if they cannot connect.

    The process ends if one that it has started has ended, if its parent process has ended, or after `timeout` seconds
    (0 means no limit). A signal ends it too, because there is nothing to save yet.
    """
    met, parent = threading.Event(), os.getppid()
    own = "LOCAL_RANK" in os.environ and not under_torchrun() and not under_srun()

    def watch() -> None:
        over, late, begun = {}, False, time.monotonic()
        while not (over or late):
            if met.wait(0.5):
                return
            if own and os.getppid() != parent:
                os._exit(1)
            over, late = ended(), bool(timeout) and time.monotonic() - begun > timeout
        if late:
            rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)
            at = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            where = f"Rank {rank} on {os.uname().nodename}, at {at},"
            print(
                f"error: the ranks did not connect within trainer.timeout={timeout:g} s. {where} waits for the others.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        elif met.wait(2.0) or signals.number:  # Ctrl-C reaches all processes, and then ends this one too
            return
        elif main:
            ranks = ", ".join(f"rank {rank} ended with {describe_exit(code)}" for rank, code in over.items())
            print(f"error: before the ranks were connected, {ranks}.", file=sys.stderr, flush=True)
        for process in started():
            process.kill()
        os._exit(1)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        with signals.held([]):
            signals.obey()
            yield
    finally:
        met.set()
        watching.join()


def together(
    compute: Compute,
    where: Place,
    signals: Signals,
    last_words: Callable[[], None] = lambda: None,
) -> tuple[Ranks, Place]:
    """Start and connect the ranks. Each process calls this once, and gets its rank and its device.

    Args:
        compute: number of processes and machines, and the timeout.
        where: device, precision and memory format.
        signals: signals of this process.
        last_words: called before this process is ended because another one has failed.
    """
    signal_number = lambda: signals.number  # noqa: E731
    devices, nodes = compute.layout
    if devices * nodes == 1:
        return Ranks(signal_number=signal_number), where
    backend = "nccl" if where.device.type == "cuda" else "gloo"
    strategy = DDPStrategy(process_group_backend=backend, timeout=NEVER)
    fabric = Fabric(
        accelerator=where.device.type,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        plugins=[environment(devices * nodes)],
    )

    def started() -> list[subprocess.Popen]:
        """The processes that rank 0 has started: ranks 1, 2, ... of this machine."""
        return getattr(strategy.launcher, "procs", [])

    def ended() -> dict[int, int]:
        return {rank: code for rank, process in enumerate(started(), 1) if (code := process.poll()) is not None}

    if backend == "nccl":  # otherwise it ends the remaining processes before the watchdog reports the cause
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    with meeting(compute.main, started, ended, signals, compute.timeout):
        fabric.launch()
    rank, size, store = fabric.global_rank, fabric.world_size, connect()
    if rank == 0:
        forget(store)
    dog = Watchdog(
        rank, size, store, timeout=compute.timeout, last_words=last_words, ended=ended, signal_number=signal_number
    )
    if where.device.type == "cuda":
        torch.cuda.set_device(fabric.device)
    return Ranks(rank, size, signal_number, dog), where._replace(device=fabric.device)


def share(
    compute: Compute, where: Place, work: Callable[[Ranks, Place], None], signals: Signals, debug: bool = False
) -> None:
    """Run `work(ranks, where)` in all processes of a command that can be interrupted and continued.

    An exception in a single process is raised to the caller. With several processes any exception ends all of them
    here.

    Raises:
        SystemExit: with status 128 + the number of the signal that stopped the work.
    """
    with signals.held(finishing=BATCH):
        ranks, where = together(compute, where, signals)
        try:
            work(ranks, where)
        except Abandoned:
            number = ranks.signal()
            if ranks.main:
                print(f"Stopped by signal {number}. Run the same command to continue.", flush=True)
            ranks.leave_together()
            raise SystemExit(128 + number) from None
        except Exception as error:
            if ranks.size == 1:
                raise
            cause, _ = ranks.failed(error)
            if not isinstance(error, ValueError) or debug:
                traceback.print_exception(error)
            own = cause is None or str(error) in cause
            print(f"error: {reason(error) if own else cause}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(2 if isinstance(error, ValueError) else 1)
        ranks.leave_together()
