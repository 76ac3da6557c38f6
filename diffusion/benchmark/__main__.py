"""Measure this machine.

    python -m diffusion.benchmark task=gpu_check                   does the GPU compute what the CPU does, and how fast
    python -m diffusion.benchmark task=loader                      what the data loader costs, beside others
    python -m diffusion.benchmark task=overhead                    what signals, saving and checks cost a step
    python -m diffusion.benchmark task=digests                     what comparing each sample with its digest costs
    python -m diffusion.benchmark task=... out=figures.json        all figures in a file as well

gpu_check compares a training step and a sample on the GPU, in float32 and in bf16, with the CPU's, looks whether
training makes the host wait, and times CIFAR-10 training on random images. Exit status 0 if all of it holds, 1 if
something does not, 3 without a GPU.

loader times ours and others on the same images in one run, by turns, and holds the ratios against bars: 256x256 photos
against torch's DataLoader that decodes the same bytes from memory, a webdataset pipeline and, with
loader.peers_python=PATH, MosaicML streaming (bash launch/loader_peers.sh makes its environment and runs all of it);
32x32 images that are kept decoded against rows of a tensor. loader.root and loader.cifar_root take prepared sets of
yours instead. Exit status 0 if all bars hold, 1 if one does not.

overhead trains the digits with all that lets a run survive and with none of it, by turns, on the CPU. Exit status 0 if
a step costs at most 1 % more, or no more than the machine's own spread lets one tell, 1 if it does.

digests times how our loader makes batches of 32x32 PNGs and 256x256 JPEGs with the checks that the samples are those
the set was made with, and without them. Exit status 0 if they cost at most 1 % of the CPU time, 1 if they cost more.
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
            raise Refusal(f"out={cfg.out} is a folder: give the name of a .json file.")
        if cfg.out is not None and (why := obstacle(Path(cfg.out).parent)):
            raise Refusal(f"out={cfg.out}: {why}, so the figures cannot be kept there: give another file.")
        task = importlib.import_module(TASKS[cfg.task])  # torch and lightning, now that the configuration is sound
        asked = take(cfg[cfg.task], settings.TASKS[cfg.task])
        out = None if cfg.out is None else Path(cfg.out)
        if cfg.task == "loader":
            task.check_loader(asked)
    sys.exit(task.main(asked, out, lambda message: print(message, flush=True)))


if __name__ == "__main__":
    main()
