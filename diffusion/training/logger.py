"""The logger for Weights & Biases (W&B), which is optional. metrics.csv is always written.

Training does not depend on it: the weights are the same, to the bit, with and without W&B.

The id of the W&B run is stored in the run folder, so that a resumed run continues the same W&B run. Each row has its
optimizer step both as `step` and as W&B's own `_step`, which would otherwise restart at 0 in every process. A failure
of W&B never ends a run: a message is printed once, and the run continues without W&B.
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

from pytorch_lightning.utilities import rank_zero_only

from diffusion.errors import Refusal
from diffusion.files import write_atomically
from diffusion.runs.folder import RunFolder
from diffusion.runs.recorded import Recorded
from diffusion.settings import settings
from diffusion.training.meter import RunLogger

# Environment variables of W&B. A value set by the user is not changed.
ENVIRONMENT = {
    "WANDB_SILENT": "true",  # this module prints the location of the run and the errors
    "WANDB_CONSOLE": "off",  # the progress bar writes to the terminal
    "WANDB_ERROR_REPORTING": "false",  # error reports use the network, even for an offline run
    "WANDB_INIT_TIMEOUT": "30",  # seconds to wait for a server
    "WANDB_FINISH_TIMEOUT": "30",  # seconds for the upload at the end; the rest can be uploaded later
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds of data that a kill may lose; W&B's default is 15
}
WITHOUT_SERVER = ("offline", "dryrun", "disabled")
WITH_SERVER = ("online", "run")


@settings("logger")
@dataclass(frozen=True)
class Choice:
    """The name of the logger used beside metrics.csv."""

    name: Literal["none", "wandb"]


@settings("logger")
class Wandb(RunLogger):
    """A W&B run that belongs to the run folder.

    Args:
        folder: the run folder; its subfolder wandb/ holds the files and the id.
        project, entity, group, tags: the W&B settings of these names; None uses W&B's defaults, such as WANDB_ENTITY.
        mode: online, offline or auto. auto means WANDB_MODE if it is set, else online with a key and offline without.

    Raises:
        ValueError: W&B rejects one of these, or the mode is online and there is no usable key.
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
        except wandb.Error as e:  # W&B checks only the name of the project here
            raise ValueError(f"logger.project={project}: {e}.") from e
        try:
            self.mode = self._mode(mode)
        except wandb.Error as e:
            raise ValueError(f"logger.mode={mode}: {e} Correct it, or give logger.mode=offline.") from e
        self._run: Any = None
        self._say: Callable[[str], None] = print
        self.record: Recorded | None = None  # set by `start`

    @staticmethod
    def _mode(asked: str) -> str:
        """The mode in which W&B is started. Never prompts for a key, as W&B would do at a terminal."""
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
                f"{source} needs a key. Run `wandb login`, or set WANDB_API_KEY, or give logger.mode=offline."
            )
        return "online" if key else "offline"

    def id(self) -> str:
        """The id of the W&B run of this folder; drawn at random the first time."""
        path = self.folder.path / "wandb" / "run_id"
        if not path.is_file():
            write_atomically(path, f"{os.urandom(5).hex()}\n")
        return path.read_text().strip()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Catch any exception of W&B: print it once and stop logging, but not the run."""
        try:
            yield
        except Exception as e:  # W&B raises its own errors, and errors of sockets, files and timeouts
            self._run = None
            self._say(f"W&B has failed. The run continues without it. {first_line(e)}")
            self._stop_service()

    # ---- the life of the run ----

    def start(self, say: Callable[[str], None], record: Recorded) -> None:
        """Start or resume the W&B run and print where it is; offline if the server cannot be reached or refuses."""
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
                say(f"W&B cannot be reached or refuses the run, so the run is logged offline. {first_line(e)}")
                self._stop_service()
        with self._harmless():
            self._run = self._init("offline")
            files = self.folder.path / "wandb"
            say(f"W&B: offline in {files}. To upload it: wandb sync {shlex.quote(str(files))}/offline-run-*")

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
        """End the process of W&B. It would refuse to start a run of the same id again, or fail again at exit."""
        import wandb

        with contextlib.suppress(Exception, SystemExit):
            wandb.teardown()

    def close(self, status: int) -> None:
        """Write and upload the remaining data, for at most WANDB_FINISH_TIMEOUT seconds. Never raises.

        A run stopped by a signal is marked as preempted, because the same command resumes it.
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
            self._say(f"W&B has not received the whole run. To upload it: wandb sync {files}. {first_line(e)}")

    # ---- logging ----

    def _log(self, row: dict[str, Any], step: int) -> None:
        """Add values to the row of this step, or to the step at which W&B resumed, before which W&B drops rows."""
        self._run.log({**row, "step": step}, step=max(step, self._run.starting_step))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of this step. A step that was sent before a kill is not sent again."""
        if self._run is not None and step >= self._run.starting_step:
            with self._harmless():
                self._log(metrics, step)

    def log_picture(self, path: Path, step: int) -> None:
        """Log a sample grid under the name `samples`."""
        if self._run is None:
            return
        import wandb

        with self._harmless():
            self._log({"samples": wandb.Image(str(path))}, step)

    def log_scores(self, rows: list[dict[str, Any]], step: int, prefix: str = "eval") -> None:
        """Log each score as eval/NAME (or another prefix), and the paper's value as paper/NAME in the summary."""
        if self._run is None:
            return
        with self._harmless():
            self._log({f"{prefix}/{r['name']}": r["value"] for r in rows}, step)
            papers = {f"paper/{r['name']}": r["reference"] for r in rows if r.get("reference") is not None}
            if papers:
                self._run.summary.update(papers)


def text(key: str, value: Any) -> str | None:
    """The setting as text, or None; a number is accepted too.

    Raises:
        ValueError: the value is neither text nor a number.
    """
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"logger.{key}={value} must be text.")
    return None if value in (None, "") else str(value)


def first_line(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def loggers(name: str, folder: RunFolder, **chosen: Any) -> list[RunLogger]:
    """The loggers of this name, beside metrics.csv: [] for "none", and on ranks other than 0.

    Args:
        chosen: arguments of the logger.

    Raises:
        Refusal: the package wandb cannot be imported.
    """
    if name == "none" or rank_zero_only.rank != 0:
        return []
    check_wandb()
    return [Wandb(folder, **chosen)]


def check_wandb() -> None:
    """Raise Refusal if the package wandb cannot be imported."""
    try:
        import_module("wandb")
    except Exception as error:  # a broken installation can raise anything
        raise Refusal(
            f"logger=wandb: the package wandb cannot be imported ({type(error).__name__}: {error}). Reinstall it, or "
            f"give logger=none."
        ) from error
