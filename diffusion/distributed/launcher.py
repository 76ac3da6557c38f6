"""The number of processes of a command, and the launcher that started this one: torchrun, srun, this program, or none.

It is read from the environment, before torch is imported.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from diffusion.errors import Refusal
from diffusion.notices import speaks
from diffusion.progress import counted
from diffusion.settings import AtLeast, Between, settings

Processes = Literal["auto"] | Annotated[int, AtLeast(1, " (or auto, except for training)")]


@settings("trainer")
@dataclass(frozen=True)
class Compute:
    """The device of a command and the number of its processes.

    Args:
        accelerator: "cpu", "gpu" or "auto": a GPU if there is one.
        devices: processes per machine, or "auto": the number that torchrun or srun has started, or else one process for
            each GPU of this machine, or one.
        num_nodes: number of machines, or "auto": that of torchrun or srun, or else 1.
        precision: "32", "bf16-mixed" (inside the network only) or "auto": bf16-mixed on a GPU.
        memory_format: of weights and activations; "auto" means channels_last on a GPU.
        timeout: seconds without progress after which the processes are ended as hung; 0 means never.
        threads: CPU threads of torch; None means torch's default.
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
        """The number of processes per machine, and the number of machines."""
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
        """The number of processes on all machines."""
        devices, nodes = self.layout
        return devices * nodes

    @property
    def main(self) -> bool:
        """Whether this process writes files: rank 0.

        A run of one process is always rank 0. If several are started by mistake, the lock of the run folder stops them.
        """
        return self.ranks == 1 or speaks()

    def check(self) -> None:
        """Check that the number of processes is the number that the launcher has started.

        Otherwise the run would wait for ever, or its processes would train separately.

        Raises:
            Refusal: the numbers differ.
        """
        if not (under_torchrun() or under_srun()):
            return
        wanted = f"trainer.devices={self.devices} times trainer.num_nodes={self.num_nodes}"
        if under_torchrun():
            started, who, cure = int(os.environ["WORLD_SIZE"]), "torchrun", "trainer=ddp"
        else:
            started, who, cure = int(os.environ["SLURM_STEP_NUM_TASKS"]), "srun", "trainer=slurm"
        if started != self.ranks:
            raise Refusal(
                f"{wanted} is {counted(self.ranks, 'process', 'processes')}, but {who} has started {started}. Give "
                f"{cure}, which uses the processes that {who} has started."
            )


def _gpus() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def under_srun() -> bool:
    """Whether srun has started this process as one of several tasks. False in the shell of a batch script."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
