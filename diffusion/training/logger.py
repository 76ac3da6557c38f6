"""Where the rows of a run go beside metrics.csv. Choosing Weights & Biases is the user's; the run is the same without.

The W&B run id is kept in the run folder, so that a resumed run goes on as the same W&B run; `step` is always the
optimizer step, since W&B's own counter starts anew in every process.
"""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from diffusion.files import write_atomically
from diffusion.training.meter import MetricsCsv
from diffusion.training.run_folder import RunFolder


class Wandb(Logger):
    """A W&B run that belongs to the run folder: same id on resume, offline where there is no key.

    Args:
        folder: of the run; its wandb/ holds the files and the id.
        config: resolved and plain.
        project, entity, group, tags: as W&B has them. mode: online, offline, or auto: online with a key.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: dict[str, Any],
        project: str,
        entity: str | None = None,
        group: str | None = None,
        mode: str = "auto",
        tags: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.config = folder, config
        self.settings = {"project": project, "entity": entity, "group": group, "tags": tags or None}
        self.mode = mode
        self._run: Any = None

    name = "wandb"

    @property
    def version(self) -> str:
        return self.id()

    def id(self) -> str:
        """The id of this folder's W&B run, made once."""
        path = self.folder.path / "wandb" / "run_id"
        if not path.is_file():
            write_atomically(path, f"{int.from_bytes(os.urandom(5), 'big'):010x}\n")
        return path.read_text().strip()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The live W&B run, started on first use."""
        if self._run is None:
            import wandb

            mode = self.mode
            if mode == "auto":
                mode = "online" if wandb.api.api_key else "offline"
            self._run = wandb.init(
                dir=self.folder.path, id=self.id(), resume="allow", name=self.config["name"], config=self.config,
                mode=mode, settings=wandb.Settings(console="off", silent=True), **self.settings,
            )  # fmt: skip
            self._run.define_metric("*", step_metric="step")
        return self._run

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is given when the W&B run starts."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log({**metrics, "step": step})

    @rank_zero_only
    def log_picture(self, path: Path, step: int) -> None:
        """A grid of samples."""
        import wandb

        self.experiment.log({"samples": wandb.Image(str(path)), "step": step})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """W&B is closed by `close`, when the scores are in as well."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def loggers(cfg: DictConfig, folder: RunFolder, csv: MetricsCsv, config: dict[str, Any]) -> list[Logger]:
    """metrics.csv, and what the `logger` group adds to it."""
    if cfg.name == "none":
        return [csv]
    return [csv, Wandb(folder, config, **{k: v for k, v in cfg.items() if k != "name"})]


