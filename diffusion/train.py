"""Train a diffusion model, then sample from it and score it.

    python -m diffusion.train                                   digits, minutes on two CPU cores
    python -m diffusion.train +experiment=cifar10               an experiment of conf/experiment
    python -m diffusion.train optimizer.lr=1e-4 run_dir=runs/b  with any of the settings below

If it is interrupted, the same command continues. All results are in run_dir: config.yaml, checkpoints/, metrics.csv,
samples/, results.jsonl and report.html.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import signal
import sys

from omegaconf import DictConfig, OmegaConf

from diffusion.build.take import take
from diffusion.command import command, refusing
from diffusion.config.check import check, check_data
from diffusion.config.effect import typed
from diffusion.distributed.launcher import Compute
from diffusion.distributed.signals import Signals, handled
from diffusion.runs.folder import RunFolder
from diffusion.runs.recorded import Recorded


@command("train", experiment="digits")
def main(cfg: DictConfig) -> None:
    with handled() as signals:
        status = train(cfg, signals)
    if status:
        sys.exit(status)


def train(cfg: DictConfig, signals: Signals) -> int:
    """Run the command and return its exit status."""
    with refusing(cfg.debug):
        compute = take(cfg.trainer, Compute)

    def say(message: str) -> None:
        if compute.main:
            print(message, flush=True)

    with signals.held([signal.SIGTERM] if compute.ranks > 1 else []), refusing(cfg.debug):
        check(cfg, typed())
        compute.check()
        check_data(cfg, typed())
        folder = RunFolder(cfg.run_dir)
        record = Recorded(OmegaConf.to_container(cfg), f"run_dir={folder.path}")
        folder.refuse_other(record)
        wanted = set(cfg.metrics) if cfg.callbacks.enabled else None
        if step := folder.finished(record, cfg.trainer.max_steps, wanted):
            say(
                f"Already complete ({step:,} steps). To train longer, raise trainer.max_steps. "
                f"Report: {folder.report_path}"
            )
            return 0
        from diffusion.build import early  # torch and lightning, now that the configuration is sound
        from diffusion.build.run import run_parts
        from diffusion.run import Run

        parts = run_parts(cfg, folder)
        if compute.main:
            early.look(parts)
    signals.obey()
    with refusing(cfg.debug):
        return Run(parts, signals, say).go()


if __name__ == "__main__":
    main()
