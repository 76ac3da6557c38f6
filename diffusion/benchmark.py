"""Measure this machine.

    python -m diffusion.benchmark task=gpu_check                   does the GPU compute what the CPU does, and how fast
    python -m diffusion.benchmark task=gpu_check out=figures.json  all figures in a file as well

gpu_check compares a training step and a sample on the GPU, in float32 and in bf16, with the CPU's, looks whether
training makes the host wait, and times CIFAR-10 training on random images. Exit status 0 if all of it holds, 1 if
something does not, 3 without a GPU.
"""

import importlib
import sys
from pathlib import Path

from omegaconf import DictConfig

from diffusion.app.check import check
from diffusion.app.compose import Refusal, command, refusing

TASKS = {"gpu_check": "diffusion.app.gpu_check"}  # each has main(cfg, say) -> exit status


@command("benchmark")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg)
        if cfg.task not in TASKS:
            raise Refusal(f"task={cfg.task} is none of {', '.join(TASKS)}.")
        if cfg.out is not None and Path(cfg.out).is_dir():
            raise Refusal(f"out={cfg.out} is a folder: give the name of a .json file.")
        task = importlib.import_module(TASKS[cfg.task])  # torch and lightning, now that the configuration is sound
    sys.exit(task.main(cfg, lambda message: print(message, flush=True)))


if __name__ == "__main__":
    main()
