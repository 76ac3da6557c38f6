"""Parts of training that the user adds: Lightning callbacks, Lightning loggers, and arguments of the Trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.utilities import rank_zero_only

from diffusion.errors import Refusal
from diffusion.files import reason
from diffusion.runs.recorded import Recorded
from diffusion.training.logger import first_line
from diffusion.training.meter import RunLogger

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def on_main_rank() -> bool:
    """Whether this process writes the logs."""
    return rank_zero_only.rank == 0


def callback(made: Any, key: str) -> Callback:
    """Return the object if it is a Lightning callback, else raise Refusal. key: its setting, for messages."""
    if not isinstance(made, Callback):
        raise Refusal(f"{key}._target_ must be a subclass of pytorch_lightning.Callback, not {type(made).__name__}.")
    return made


def logger(made: Any, key: str) -> RunLogger:
    """Wrap a Lightning logger as a logger of a run. Raises Refusal if it is not a Lightning logger."""
    if not isinstance(made, Logger):
        raise Refusal(
            f"{key}._target_ must be a subclass of pytorch_lightning.loggers.Logger, not {type(made).__name__}."
        )
    return made if isinstance(made, RunLogger) else OwnLogger(made, key)


def trainer_arguments(made: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Check further arguments of Lightning's Trainer, and return them. A profiler given by name writes to `folder`.

    Raises:
        Refusal: the Trainer does not accept one of them.
    """
    profiler = made.get("profiler")
    if isinstance(profiler, str) and profiler in PROFILERS:
        made = made | {"profiler": PROFILERS[profiler](dirpath=folder, filename="profile")}
    elif not isinstance(profiler, Profiler | None):
        raise Refusal(f"trainer.profiler={profiler} must be one of {', '.join(PROFILERS)}, or a _target_ of your own.")
    if made:
        try:
            Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **made)
        except Exception as error:  # the Trainer raises many kinds of errors
            raise Refusal(f"trainer: {reason(error).splitlines()[0]}") from error
    return made


class OwnLogger(RunLogger):
    """Wraps a Lightning logger as a logger of a run. If it fails, a message is printed once, and logging stops.

    Args:
        logger: gets metrics, scores as eval/NAME, the settings of the run, and images if it has `log_image` (like that
            of W&B) or an `experiment` with `add_image` (like that of TensorBoard).
        key: its setting, for messages.
    """

    def __init__(self, logger: Logger, key: str) -> None:
        super().__init__()
        self.logger, self.key = logger, key
        self._say: Callable[[str], None] = print
        self._failed = False

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> str | int | None:
        return self.logger.version

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a foreign logger can raise anything
            self._failed = True
            self._say(f"warning: {self.key} has failed. The run continues without it. {first_line(error)}")

    def start(self, say: Callable[[str], None], record: Recorded) -> None:
        self._say = say
        with self._harmless():
            self.logger.log_hyperparams(record.plain())

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self._failed:
            with self._harmless():
                self.logger.log_metrics(metrics, step)

    def log_picture(self, path: Path, step: int) -> None:
        if self._failed:
            return
        with self._harmless():
            if hasattr(self.logger, "log_image"):
                self.logger.log_image("samples", [str(path)], step=step)
            elif hasattr(experiment := getattr(self.logger, "experiment", None), "add_image"):
                with Image.open(path) as picture:
                    experiment.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def save(self) -> None:
        if not self._failed:
            with self._harmless():
                self.logger.save()

    def close(self, status: int) -> None:
        if not self._failed:
            with self._harmless():
                self.logger.finalize("success" if status == 0 else "aborted" if status > 128 else "failed")
