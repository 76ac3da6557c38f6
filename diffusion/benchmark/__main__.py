"""Measure the speed of this machine, and of parts of this package.

    python -m diffusion.benchmark task=gpu_check                   compare the GPU with the CPU, and time training
    python -m diffusion.benchmark task=loader                      compare the data loader with others
    python -m diffusion.benchmark task=overhead                    cost of signals, saving and checks per step
    python -m diffusion.benchmark task=digests                     cost of comparing each sample with its digest
    python -m diffusion.benchmark task=... out=figures.json        also write all figures to a file

gpu_check compares a training step and a sample on the GPU, in float32 and in bf16, with those on the CPU. It checks
that training does not make the host wait, and times CIFAR-10 training on random images. Exit status 0 if all checks
pass, 1 if one fails, 3 without a GPU.

loader times this loader and others on the same images in one run, alternating, and compares the ratios with limits.
256x256 photos: against torch's DataLoader that decodes the same bytes from memory, a webdataset pipeline and, with
loader.peers_python=PATH, MosaicML streaming (bash launch/loader_peers.sh creates its environment and runs everything).
32x32 images that are kept decoded: against rows of a tensor. Set loader.root and loader.cifar_root to use your own
prepared sets. Exit status 0 if all limits are met, 1 if one is not.

overhead trains the digits on the CPU with and without everything that makes a run resumable, alternating. Exit status 0
if a step takes at most 1 % longer, or the difference is within the noise of the machine; 1 otherwise.

digests times how the loader reads batches of 32x32 PNGs and 256x256 JPEGs with and without the checks for changed
samples. Exit status 0 if the checks take at most 1 % of the CPU time, 1 if they take more.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import importlib
import sys
from pathlib import Path

from omegaconf import DictConfig

from diffusion.benchmark import settings
from diffusion.build.take import take
from diffusion.command import command, refusing
from diffusion.config.check import check
from diffusion.config.effect import typed
from diffusion.errors import Refusal
from diffusion.files import obstacle

TASKS = {  # each has main(asked, out, say) -> exit status
    "gpu_check": "diffusion.benchmark.gpu_check",
    "loader": "diffusion.benchmark.loader",
    "overhead": "diffusion.benchmark.overhead",
    "digests": "diffusion.benchmark.digests",
}


@command("benchmark")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg, typed())
        if cfg.out is not None and Path(cfg.out).is_dir():
            raise Refusal(f"out={cfg.out} is a folder. Give the name of a .json file.")
        if cfg.out is not None and (why := obstacle(Path(cfg.out).parent)):
            raise Refusal(f"out={cfg.out}: {why}, so the figures cannot be written there. Give another file.")
        task = importlib.import_module(TASKS[cfg.task])  # imports torch and lightning, after the settings are checked
        asked = take(cfg[cfg.task], settings.TASKS[cfg.task])
        out = None if cfg.out is None else Path(cfg.out)
        if cfg.task == "loader":
            task.check_loader(asked)
    sys.exit(task.main(asked, out, lambda message: print(message, flush=True)))


if __name__ == "__main__":
    main()
