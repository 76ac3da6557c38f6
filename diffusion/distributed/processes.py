"""The processes of a run, a sampling or an evaluation: started where nobody else has done it, and joined.

Under torchrun or srun the processes are there; else this one starts the others of its machine, by Lightning's Fabric.
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
from diffusion.distributed.watchdog import Watchdog, connect, forget, how
from diffusion.files import reason

for quiet in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
    logging.getLogger(quiet).setLevel(logging.ERROR)
# Lightning's own observer kills all processes, at once and without a word, when one has ended other than with status 0,
# as each does that has been stopped by a signal. The watchdog knows better.
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
    """While the ranks look for each other: end this process if one that it has started is over, if the one that has
    started it is, or if they have not met after `timeout` seconds (0: as long as it takes). A signal ends it as well:
    there is nothing yet that could be saved.
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
            where = f"rank {rank} on {os.uname().nodename}, at {at},"
            print(
                f"error: the ranks have not met within trainer.timeout={timeout:g} s; {where} waits for the others.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        elif met.wait(2.0) or signals.number:  # Ctrl-C goes to all, is the cause then, and ends this one too
            return
        elif main:
            ranks = ", ".join(f"rank {rank} with {how(code)}" for rank, code in over.items())
            print(f"error: before the ranks had met there ended {ranks}.", file=sys.stderr, flush=True)
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
    """This process's place among the ranks that are asked for, all of which are there now, and its device. To be
    called once, by each of them.

    Args:
        signals: of this process.
        last_words: called before this process is ended because another has failed.
    """
    told = lambda: signals.number  # noqa: E731
    devices, nodes = compute.layout
    if devices * nodes == 1:
        return Ranks(told=told), where
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
        """Ranks 1, 2, ... of this machine, by rank 0."""
        return getattr(strategy.launcher, "procs", [])

    def ended() -> dict[int, int]:
        return {rank: code for rank, process in enumerate(started(), 1) if (code := process.poll()) is not None}

    if backend == "nccl":  # else it ends the processes that are left before the watchdog has said why
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    with meeting(compute.main, started, ended, signals, compute.timeout):
        fabric.launch()
    rank, size, store = fabric.global_rank, fabric.world_size, connect()
    if rank == 0:
        forget(store)
    dog = Watchdog(rank, size, store, timeout=compute.timeout, last_words=last_words, ended=ended, told=told)
    if where.device.type == "cuda":
        torch.cuda.set_device(fabric.device)
    return Ranks(rank, size, told, dog), where._replace(device=fabric.device)


def share(
    compute: Compute, where: Place, work: Callable[[Ranks, Place], None], signals: Signals, debug: bool = False
) -> None:
    """Do `work(ranks, where)` in all processes of a command that leaves what is half done for its next start.

    A ValueError of a single process is its caller's; where there are several, whatever fails ends all of them here.

    Raises:
        SystemExit: with 128 + the number of a signal, if one has stopped it.
    """
    with signals.held(finishing=BATCH):
        ranks, where = together(compute, where, signals)
        try:
            work(ranks, where)
        except Abandoned:
            number = ranks.signal()
            if ranks.main:
                print(f"Stopped by signal {number}; the same command goes on from there.", flush=True)
            ranks.part()
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
        ranks.part()
