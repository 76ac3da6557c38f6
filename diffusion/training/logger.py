"""Where the figures of a run go beside metrics.csv: Weights & Biases, if the user asks for it.

Training knows nothing of it and is the same, to the bit, without.

The id of the W&B run is kept in the run folder, so that a resumed run goes on as the same W&B run. Each row stands at
its optimizer step, as `step` and as W&B's own `_step`, which would count anew in every process. Nothing that W&B does
or fails to do ends a run: what goes wrong is said once, and the run goes on without it. metrics.csv is the record.
"""

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from diffusion.errors import Refusal
from diffusion.files import write_atomically
from diffusion.runs.folder import RunFolder
from diffusion.runs.recorded import Recorded
from diffusion.settings import settings
from diffusion.training.meter import RunLogger

# What W&B reads from the environment; a value set there by the user stays.
ENVIRONMENT = {
    "WANDB_SILENT": "true",  # where the run is, and what goes wrong, is said here
    "WANDB_CONSOLE": "off",  # the progress bar writes to the terminal itself
    "WANDB_ERROR_REPORTING": "false",  # reports go over the network, also from an offline run
    "WANDB_INIT_TIMEOUT": "30",  # seconds for a server to answer
    "WANDB_FINISH_TIMEOUT": "30",  # seconds for the upload at the end; what is left can be uploaded later
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds that a kill may cost; 15 by default
}
WITHOUT_SERVER = ("offline", "dryrun", "disabled")
WITH_SERVER = ("online", "run")


@settings("logger")
@dataclass(frozen=True)
class Choice:
    """Which logger, beside metrics.csv."""

    name: Literal["none", "wandb"]


@settings("logger")
class Wandb(RunLogger):
    """A W&B run that belongs to the run folder.

    Args:
        folder: of the run; its wandb/ holds the files and the id.
        project, entity, group, tags: as W&B has them; null leaves them to its own settings, such as WANDB_ENTITY.
        mode: online, offline, or auto: WANDB_MODE if that is set, else online with a key and offline without.

    Raises:
        ValueError: W&B does not accept one of these, or the run is to be online and there is no usable key.
    """

    name = "wandb"
    version = ""

    def __init__(
        self,
        folder: RunFolder,
        project: str,
        entity: str | None = None,
        group: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        tags: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        if mode != "auto":
            os.environ["WANDB_MODE"] = mode
        import wandb

        chosen = {
            "project": text("project", project),
            "entity": text("entity", entity),
            "run_group": text("group", group),
            "run_tags": tuple(map(str, tags or ())) or None,
            "run_name": folder.path.resolve().name,
        }
        try:
            self._settings = wandb.Settings(**{k: v for k, v in chosen.items() if v is not None})
        except wandb.Error as e:  # of the names it judges the project's alone
            raise ValueError(f"logger.project={project}: {e}.") from e
        try:
            self.mode = self._mode(mode)
        except wandb.Error as e:
            raise ValueError(f"logger.mode={mode}: {e} Correct it, or give logger.mode=offline.") from e
        self._run: Any = None
        self._say: Callable[[str], None] = print
        self.record: Recorded | None = None  # of the run, once it starts

    @staticmethod
    def _mode(asked: str) -> str:
        """The mode W&B is started in; it never asks for a key, as it would at a terminal."""
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode in WITHOUT_SERVER:
            return mode
        if mode not in (None, *WITH_SERVER):
            raise ValueError(f"WANDB_MODE={mode} must be one of {', '.join(WITH_SERVER + WITHOUT_SERVER)}.")
        key = wandb.login(prompt=False, verify=False)
        if mode and not key:
            source = f"WANDB_MODE={mode}" if asked == "auto" else f"logger.mode={asked}"
            raise ValueError(
                f"{source} needs a key: run `wandb login` or set WANDB_API_KEY; or give logger.mode=offline."
            )
        return "online" if key else "offline"

    def id(self) -> str:
        """The id of this folder's W&B run, drawn once."""
        path = self.folder.path / "wandb" / "run_id"
        if not path.is_file():
            write_atomically(path, f"{os.urandom(5).hex()}\n")
        return path.read_text().strip()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Whatever W&B raises is said once and ends the logging, not the run."""
        try:
            yield
        except Exception as e:  # of many kinds: its own, of sockets, of files, timeouts
            self._run = None
            self._say(f"W&B has failed and logs no more; the run goes on. {first_line(e)}")
            self._stop_service()

    # ---- the life of the run ----

    def start(self, say: Callable[[str], None], record: Recorded) -> None:
        """Start or go on with the W&B run and say where it is; offline where the server is out of reach or refuses."""
        self._say, self.record = say, record
        if self.mode == "disabled":
            say("W&B: disabled by WANDB_MODE.")
            return
        if self.mode == "online":
            try:
                self._run = self._init("online")
                say(f"W&B: {self._run.url}")
                return
            except Exception as e:
                say(f"W&B cannot be reached or refuses, so the run is logged offline. {first_line(e)}")
                self._stop_service()
        with self._harmless():
            self._run = self._init("offline")
            files = self.folder.path / "wandb"
            say(f"W&B: offline in {files}; to upload it: wandb sync {shlex.quote(str(files))}/offline-run-*")

    def _init(self, mode: str) -> Any:
        import wandb

        run = wandb.init(
            config=self.record.plain(),
            dir=self.folder.path,
            id=self.id(),
            resume="allow",
            mode=mode,
            settings=self._settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    @staticmethod
    def _stop_service() -> None:
        """End W&B's process: it would refuse to start a run of the same id again, or fail once more at exit."""
        import wandb

        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()

    def close(self, status: int) -> None:
        """Write and upload what is left, for at most WANDB_FINISH_TIMEOUT seconds. Never raises.

        A run stopped by a signal is marked as preempted, as the same command goes on with it.
        """
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            if status > 128:
                run.mark_preempting()
            run.finish(exit_code=status)
        except Exception as e:
            files = shlex.quote(str(Path(run.dir).parent))
            self._say(f"W&B has not got all of the run; to upload it: wandb sync {files}. {first_line(e)}")

    # ---- what is logged ----

    def _log(self, row: dict[str, Any], step: int) -> None:
        """Add to the row of this step. W&B drops rows before the step at which it resumed, so none is put there."""
        self._run.log({**row, "step": step}, step=max(step, self._run.starting_step))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of this step; one that was sent before a kill and is trained again is not sent twice."""
        if self._run is not None and step >= self._run.starting_step:
            with self._harmless():
                self._log(metrics, step)

    def log_picture(self, path: Path, step: int) -> None:
        """A grid of samples, as `samples`."""
        if self._run is None:
            return
        import wandb

        with self._harmless():
            self._log({"samples": wandb.Image(str(path))}, step)

    def log_scores(self, rows: list[dict[str, Any]], step: int, prefix: str = "eval") -> None:
        """eval/NAME of each (or of another prefix), and the paper's value as paper/NAME in the summary."""
        if self._run is None:
            return
        with self._harmless():
            self._log({f"{prefix}/{r['name']}": r["value"] for r in rows}, step)
            papers = {f"paper/{r['name']}": r["reference"] for r in rows if r.get("reference") is not None}
            if papers:
                self._run.summary.update(papers)


def text(key: str, value: Any) -> str | None:
    """A name as W&B wants it: text, as which a number passes too, or None."""
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"logger.{key}={value} is not a name.")
    return None if value in (None, "") else str(value)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class OwnLogger(RunLogger):
    """A Lightning logger of the user's own, as a logger of a run. If it fails, it says so once and logs no more.

    Args:
        logger: gets rows of numbers, the scores as eval/NAME, the settings of the run, and pictures where it has
            `log_image` (as the loggers of W&B) or an `experiment` with `add_image` (as that of TensorBoard).
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
        except Exception as error:  # whatever its code raises
            self._failed = True
            self._say(f"warning: {self.key} has failed and logs no more; the run goes on. {first_line(error)}")

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


def loggers(name: str, folder: RunFolder, **chosen: Any) -> list[RunLogger]:
    """What a run logs to beside metrics.csv, by the name of the logger; nothing on ranks other than 0, which write
    nothing. chosen: arguments of the logger."""
    if name == "none" or rank_zero_only.rank != 0:
        return []
    check_wandb()
    return [Wandb(folder, **chosen)]


def check_wandb() -> None:
    """Refuse logger=wandb where its package cannot be imported."""
    try:
        import_module("wandb")
    except Exception as error:  # of a broken installation anything
        raise Refusal(
            f"logger=wandb: the package wandb cannot be imported ({type(error).__name__}: {error}). Install it again, "
            f"or give logger=none."
        ) from error
