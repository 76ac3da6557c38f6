"""Measure where the error of a sampler comes from, and show what noise does to data whose exact score is known.

    python -m diffusion.lab task=errors                        of Gaussian data: each error exactly, and their sum
    python -m diffusion.lab task=errors toy=modes              of a mixture
    python -m diffusion.lab task=errors checkpoint=runs/gmm    of a network trained on a mixture
    python -m diffusion.lab task=errors checkpoint=runs/digits  of a model of images, with bounds
    python -m diffusion.lab task=forward, task=reverse         how modes merge in noise and separate again; an animation
    python -m diffusion.lab task=modes                         the share of samples that each sampler gives each mode
    python -m diffusion.lab task=equivalence                   DDPM's loss is score matching; VP and VE give the same

Each task writes tables, pictures and its page of report.html to out (default: lab, or lab in the run folder).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import importlib
from pathlib import Path

from omegaconf import DictConfig

from diffusion.command import command, refusing
from diffusion.config.check import check, check_guidance, check_steps, refuse_blocked
from diffusion.config.effect import typed
from diffusion.errors import Refusal
from diffusion.files import Room, obstacle, writing

TASKS = {  # each has main(lab)
    "errors": "diffusion.lab.tasks.errors",
    "forward": "diffusion.lab.tasks.plane",
    "reverse": "diffusion.lab.tasks.plane",
    "modes": "diffusion.lab.tasks.modes",
    "equivalence": "diffusion.lab.tasks.equivalence",
}
TRAINED = ("errors", "equivalence")  # that a checkpoint may be given to


@command("lab")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check(cfg, typed())
        check_task(cfg)
        from diffusion.build.lab import laboratory

        task = importlib.import_module(TASKS[cfg.task])
        lab = laboratory(cfg, lambda message: print(message, flush=True))
        check_out(lab.folder)
        with writing(Room("out", lab.folder)):
            task.main(lab)


def check_out(folder: Path) -> None:
    """Refuse a folder that cannot be written to."""
    if why := obstacle(folder):
        raise Refusal(f"out={folder}: {why}, so nothing can be kept there.")


def check_task(cfg: DictConfig) -> None:
    """Refuse an unknown task, and settings that do not go with it."""
    if cfg.checkpoint is not None and cfg.task not in TRAINED:
        raise Refusal(
            f"checkpoint={cfg.checkpoint} is for {' and '.join(f'task={t}' for t in TRAINED)}: task={cfg.task} "
            f"is of exact scores."
        )
    if cfg.checkpoint is not None and not Path(cfg.checkpoint).exists():
        raise Refusal(f"checkpoint={cfg.checkpoint} does not exist. Give a run folder or a .ckpt file.")
    if cfg.checkpoint is not None and cfg.toy is not None:
        raise Refusal(f"toy={cfg.toy}: with checkpoint={cfg.checkpoint} the data are the model's own.")
    if len(cfg.gaussian.mean) != len(cfg.gaussian.stds) or not cfg.gaussian.mean:
        raise Refusal(
            f"gaussian.mean={list(cfg.gaussian.mean)} and gaussian.stds={list(cfg.gaussian.stds)} must be as many "
            f"numbers."
        )
    if cfg.trainer.devices != 1 or cfg.trainer.num_nodes != 1:
        raise Refusal("trainer.devices, trainer.num_nodes: the laboratory works in one process.")
    if cfg.out is not None:
        refuse_blocked("out", Path(cfg.out), ["report.html"], [cfg.task])
    if cfg.checkpoint is None and cfg.task == "errors":
        check_steps(cfg.sampler, cfg.schedule.num_timesteps)
        check_guidance(cfg.guidance.scale, 0, 0)


if __name__ == "__main__":
    main()
