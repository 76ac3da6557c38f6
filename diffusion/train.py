"""Train a diffusion model, sample from it, score it.

    python -m diffusion.train                                   digits, minutes on two CPU cores
    python -m diffusion.train +experiment=cifar10               an experiment of conf/experiment
    python -m diffusion.train optimizer.lr=1e-4 run_dir=runs/b  any setting below

The same command again goes on where it stopped. All that a run leaves is in its run_dir: config.yaml, checkpoints/,
metrics.csv, samples/, results.jsonl, report.html.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import signal
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion.config.check import check, check_data
from diffusion.config.compose import command, refusing, typed
from diffusion.distributed.launcher import check_launcher, main_rank, ranks
from diffusion.distributed.signals import Signals, handled
from diffusion.runs.folder import RunFolder


@command("train", experiment="digits")
def main(cfg: DictConfig) -> None:
    with handled() as signals:
        status = train(cfg, signals)
    if status:
        sys.exit(status)


def train(cfg: DictConfig, signals: Signals) -> int:
    """The whole command; the exit status."""
    main_process = main_rank(cfg)

    def say(message: str) -> None:
        if main_process:
            print(message, flush=True)

    with signals.held([signal.SIGTERM] if ranks(cfg) > 1 else []):
        with refusing(cfg.debug):
            check(cfg, typed())
            check_launcher(cfg)
            check_data(cfg)
            folder = RunFolder(cfg.run_dir)
            config = OmegaConf.to_container(cfg)
            folder.refuse_other(config)
        if step := finished(cfg, config, folder):
            say(f"{folder.path} is finished: {step} steps, nothing is missing. See {folder.report_path}")
            return 0
        from diffusion.run import Run  # torch and lightning, now that the configuration is sound

        with refusing(cfg.debug):
            run = Run(cfg, config, folder, signals)
    signals.obey()
    return run.go(say, main_process)


def finished(cfg: DictConfig, config: dict[str, Any], folder: RunFolder) -> int:
    """The step of the last checkpoint if training is over and none of its scores, samples or report is missing; 0 if
    something is left to do."""
    if not folder.steps() or folder.steps()[0] < cfg.trainer.max_steps:
        return 0
    step, _, _ = folder.latest_valid(config)
    if step < cfg.trainer.max_steps:
        return 0
    scored = folder.own_scores(step)
    wanted = set(cfg.metrics) if cfg.callbacks.enabled else set()
    looked = not cfg.callbacks.enabled or (folder.samples / f"step_{step:08d}.png").is_file()
    return step if looked and wanted <= scored and folder.report_path.is_file() else 0


if __name__ == "__main__":
    main()
