"""Which process of a run this is, and who started it: nobody else, torchrun, SLURM, or this program itself.

Read from the environment, before torch is imported.
"""

import os

from omegaconf import DictConfig

from diffusion.distributed.signals import speaks
from diffusion.errors import Refusal


def layout(cfg: DictConfig) -> tuple[int, int]:
    """(processes on each machine, machines). `auto` is as many as torchrun or srun has started, and without them a
    process for each GPU of this machine, or one."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if nodes == "auto":
        name = "GROUP_WORLD_SIZE" if under_torchrun() else "SLURM_NNODES" if under_srun() else ""
        nodes = int(os.environ.get(name, 1))
    if devices == "auto":
        if under_torchrun() or under_srun():
            total = int(os.environ["WORLD_SIZE" if under_torchrun() else "SLURM_STEP_NUM_TASKS"])
            devices = total // int(nodes)
        else:
            devices = _gpus() if cfg.trainer.accelerator != "cpu" else 1
    return int(devices), int(nodes)


def _gpus() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def ranks(cfg: DictConfig) -> int:
    """Processes of the run."""
    devices, nodes = layout(cfg)
    return devices * nodes


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def under_srun() -> bool:
    """Whether SLURM has started this process as one of several tasks; a batch script's own shell is none."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def main_rank(cfg: DictConfig) -> bool:
    """Whether this process is the one that writes. A run of one process is always its own: several of them, started by
    mistake, meet at the lock."""
    if ranks(cfg) == 1:
        return True
    return speaks()


def check_launcher(cfg: DictConfig) -> None:
    """Refuse a number of processes other than the one that was started: the run would wait for ever, or train apart."""
    if not (under_torchrun() or under_srun()):
        return
    wanted = f"trainer.devices={cfg.trainer.devices} x trainer.num_nodes={cfg.trainer.num_nodes}"
    if under_torchrun():
        started, who, cure = int(os.environ["WORLD_SIZE"]), "torchrun", "trainer=ddp"
    else:
        started, who, cure = int(os.environ["SLURM_STEP_NUM_TASKS"]), "srun", "trainer=slurm"
    if started != ranks(cfg):
        raise Refusal(
            f"{wanted} is {ranks(cfg)} process(es), but {who} has started {started}: give {cure}, which takes them as "
            f"they are."
        )
