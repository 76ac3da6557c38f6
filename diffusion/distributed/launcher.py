"""Which process of a run this is, and who started it: nobody else, torchrun, SLURM, or this program itself.

Read from the environment, before torch is imported.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from diffusion.distributed.signals import speaks
from diffusion.errors import Refusal
from diffusion.settings import AtLeast, Between, settings

Processes = Literal["auto"] | Annotated[int, AtLeast(1, " (or auto, where nothing is trained)")]


@settings("trainer")
@dataclass(frozen=True)
class Compute:
    """On what a command computes, and in how many processes.

    Args:
        accelerator: "auto": a GPU if there is one. precision: "32", "bf16-mixed" (inside the network alone) or "auto":
            bf16 on a GPU. memory_format: of weights and activations; "auto": channels_last on a GPU.
        devices: processes on each machine. num_nodes: machines. "auto": as many as torchrun or srun has started, and
            without them a process for each GPU of this machine, or one.
        timeout: seconds without progress after which the processes count as hung; 0: never.
        threads: of the CPU; None: torch's choice.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Processes = 1
    num_nodes: Processes = 1
    precision: Literal["auto", "32", "bf16-mixed"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    timeout: Annotated[float, AtLeast(0)] = 1800.0
    threads: Annotated[int, Between(1, 4096)] | None = None

    @property
    def layout(self) -> tuple[int, int]:
        """(processes on each machine, machines)."""
        devices, nodes = self.devices, self.num_nodes
        if nodes == "auto":
            name = "GROUP_WORLD_SIZE" if under_torchrun() else "SLURM_NNODES" if under_srun() else ""
            nodes = int(os.environ.get(name, 1))
        if devices == "auto":
            if under_torchrun() or under_srun():
                total = int(os.environ["WORLD_SIZE" if under_torchrun() else "SLURM_STEP_NUM_TASKS"])
                devices = total // int(nodes)
            else:
                devices = _gpus() if self.accelerator != "cpu" else 1
        return int(devices), int(nodes)

    @property
    def ranks(self) -> int:
        """Processes of all machines."""
        devices, nodes = self.layout
        return devices * nodes

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes. A run of one process is always its own: several of them,
        started by mistake, meet at the lock."""
        return self.ranks == 1 or speaks()

    def check(self) -> None:
        """Refuse a number of processes other than the one that was started: the run would wait for ever, or train
        apart."""
        if not (under_torchrun() or under_srun()):
            return
        wanted = f"trainer.devices={self.devices} x trainer.num_nodes={self.num_nodes}"
        if under_torchrun():
            started, who, cure = int(os.environ["WORLD_SIZE"]), "torchrun", "trainer=ddp"
        else:
            started, who, cure = int(os.environ["SLURM_STEP_NUM_TASKS"]), "srun", "trainer=slurm"
        if started != self.ranks:
            raise Refusal(
                f"{wanted} is {self.ranks} process(es), but {who} has started {started}: give {cure}, which takes them "
                f"as they are."
            )


def _gpus() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def under_srun() -> bool:
    """Whether SLURM has started this process as one of several tasks; a batch script's own shell is none."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
