"""Sweeps of training: all runs are composed and checked before the first begins, here or as jobs of SLURM.

    launcher=basic    one after another, in this process (Hydra's own launcher)
    launcher=slurm    an array of jobs, a run each, submitted by submitit

Of a job, submitit makes the batch script and what travels to the nodes; what becomes of it is as for every other job.
slurm/job.sh starts its tasks and requeues it, a task is the ordinary command in the folder of its run. submitit's own
answer to a warning, to leave in the middle of a step and submit itself anew, never has its turn: jobs are warned by
USR1, which the command handles, and not by USR2, which submitit waits for. Needs neither torch nor lightning.
"""

import functools
import logging
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import submitit
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from submitit.core.utils import FailedJobError, JobPaths

from diffusion.config.check import check
from diffusion.config.compose import (
    FLAGS_WITH_VALUE,
    Typed,
    check_words,
    composed,
    nearest,
    quoted,
    refusing,
    sweep_folder,
)
from diffusion.errors import Refusal

Plugins.instance()  # executes the modules of all plugins: before anything is taken from them

from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf  # noqa: E402
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher  # noqa: E402

LAUNCHERS = {"basic": "basic", "slurm": "submitit_slurm"}  # ours -> Hydra's
HYDRA_FLAGS = (*FLAGS_WITH_VALUE, "-m", "--multirun", "--version", "--hydra-help", "--resolve")
JOB = Path("slurm", "job.sh")
COMMON = [field.name for field in fields(BaseQueueConf)]  # to submitit, of all kinds of clusters
NOT_HEEDED = {
    "max_num_timeout": "a job is requeued for as long as it gets on",
    "stderr_to_stdout": "all that a job prints is in one file",
}
# Settings and flags that sbatch's variables, SBATCH_..., do not share the name of.
VARIABLES = {"timeout_min": "TIMELIMIT", "time": "TIMELIMIT", "mem_gb": "MEM_PER_NODE", "mem": "MEM_PER_NODE"}


# ---- words ----


def sweep_words(flags: list[str], words: list[str]) -> tuple[list[str], list[str]]:
    """(flags, words) as Hydra shall see them, once each run that they make has been found sound. Raises Refusal."""
    words = [launcher_word(w) for w in words]
    cluster = [f for f in flags if f.startswith("--") and f.partition("=")[0] not in HYDRA_FLAGS]
    on_slurm = f"hydra/launcher={LAUNCHERS['slurm']}" in words
    if cluster and not on_slurm:
        raise Refusal(f"{cluster[0]} is no flag of this command. Flags of sbatch go with launcher=slurm.")
    words = check_words("train", words, sweep=True)
    for overrides in jobs(words):
        run_of(overrides)
    if on_slurm:
        check_place()
        # Hydra takes launchers of the package hydra_plugins only: ours stands in for the one of the same configuration
        Plugins.instance().class_name_to_class[f"{SlurmLauncher.__module__}.{SlurmLauncher.__name__}"] = Submission
    return [f for f in flags if f not in cluster], words + [flag_word(f) for f in cluster]


def check_jobs(command: str, words: Sequence[str]) -> None:
    """Refuse a sweep of another command than train, of which a job cannot be, before the first has begun."""
    for overrides in jobs(words):
        check(composed(command, list(overrides)), Typed(command, tuple(overrides)))


def launcher_word(word: str) -> str:
    """launcher=slurm, launcher.nodes=2 -> Hydra's names for the same."""
    key, _, value = word.partition("=")
    if key.startswith("launcher."):
        return f"hydra.{word}"
    if key not in ("launcher", "hydra/launcher"):
        return word
    found = LAUNCHERS.get(value, value)
    if found not in LAUNCHERS.values():
        local = " submitit_local starts all runs at once, on one GPU, and at Ctrl-C ends them while they save."
        raise Refusal(
            f"{word}: there is no such launcher.{nearest(value, list(LAUNCHERS))} There are: {', '.join(LAUNCHERS)}."
            + (local if found == "submitit_local" else "")
        )
    return f"hydra/launcher={found}"


def flag_word(flag: str) -> str:
    """--time=4:00:00 -> the setting of submitit's launcher for it."""
    name, equals, value = flag.removeprefix("--").partition("=")
    key = f"++hydra.launcher.additional_parameters.{name.replace('-', '_')}"
    return f"{key}={quoted(value) if equals else 'true'}"


def jobs(words: Sequence[str]) -> list[list[str]]:
    """The words of each run, as Hydra's sweeper makes them; none where another sweeper will find its own."""
    if any(w.startswith("hydra/sweeper=") for w in words):
        return []
    overrides = OverridesParser.create().parse_overrides([w for w in words if not w.lstrip("+").startswith("hydra")])
    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


# ---- runs ----


@dataclass(frozen=True)
class Run:
    """A run of a sweep. Called in each task of its job, where submitit has unpickled it, it is the command itself.

    Args:
        words: of `diffusion.train`. folder: of the run.
    """

    words: tuple[str, ...]
    folder: str

    def __str__(self) -> str:
        return shlex.join(["python", "-m", "diffusion.train", *self.words])

    def __call__(self) -> None:
        logging.getLogger("submitit").propagate = False  # it prints by itself
        if int(os.environ["SLURM_PROCID"]) == 0:
            print(f"+ {self}", flush=True)
        sys.argv[1:] = self.words
        runpy.run_module("diffusion.train", run_name="__main__", alter_sys=True)


def run_of(overrides: Sequence[str]) -> Run:
    """The run that these words of a sweep make, composed and checked. Raises Refusal, ValueError."""
    return _run_of(tuple(overrides))


@functools.cache
def _run_of(overrides: tuple[str, ...]) -> Run:
    cfg = composed("train", list(overrides))
    check(cfg, Typed("train", overrides))
    folder = sweep_folder(cfg.run_dir, list(overrides))
    words = [w for w in overrides if not w.startswith("run_dir=")]
    return Run((*words, f"run_dir={folder}"), folder)


# ---- jobs of SLURM ----


def check_place() -> None:
    """Refuse to submit where there is nothing to submit, or nothing to submit to."""
    if not JOB.is_file():
        raise Refusal(f"launcher=slurm needs {JOB}, but {Path.cwd()} is no checkout: submit from its top folder.")
    if not shutil.which("sbatch"):
        raise Refusal("launcher=slurm: there is no sbatch here; submit where SLURM is installed.")


class Submission(SlurmLauncher):
    """Submits, says what, and is done: submitit's own launcher waits for the end of all jobs."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        with refusing(self.config.debug):
            self.prefer_what_was_given()
            parameters = self.parameters()
            runs = [on_slurm(run_of(overrides)) for overrides in job_overrides]
            for run in runs:
                print(f"+ {run}")
            submitted = self.submit(runs, parameters)
        print(f"+ sbatch {shown(submitted[0].paths.submission_file)}")
        for job, run in zip(submitted, runs, strict=True):
            output = parameters["slurm_additional_parameters"].get("output", shown(job.paths.stdout))
            print(f"job {job.job_id} trains {run.folder} and prints to {output}")
        return []

    def prefer_what_was_given(self) -> None:
        """To sbatch its variables are worth more than its script, to a user less than what was typed. Refusal of what
        would be without effect."""
        for word in self.config.hydra.overrides.hydra:
            match = re.match(r"\+*hydra\.launcher\.(?:additional_parameters\.)?(\w+)=", word)
            if match and match[1] in NOT_HEEDED:
                raise Refusal(f"launcher.{match[1]} is not heeded here: {NOT_HEEDED[match[1]]}.")
            if match:
                os.environ.pop(f"SBATCH_{VARIABLES.get(match[1], match[1].upper())}", None)

    def parameters(self) -> dict[str, Any]:
        """What submitit makes the batch script of."""
        given = {k: v for k, v in self.params.items() if k not in (*NOT_HEEDED, "submitit_folder", "signal_delay_s")}
        given["setup"] = [
            *(given["setup"] or ()),
            f"export DIFFUSION_VENV={shlex.quote(sys.prefix)}",
            "export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-array-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}",
            f"source {JOB}",
        ]
        own = {"signal": f"USR1@{self.params['signal_delay_s']}", "requeue": True}
        given["additional_parameters"] = own | given["additional_parameters"]
        given["use_srun"] = False  # `tasks` of job.sh does
        return {k if k in COMMON else f"slurm_{k}": v for k, v in given.items()} | {"stderr_to_stdout": True}

    def submit(self, runs: Sequence[Run], parameters: dict[str, Any]) -> Sequence[submitit.Job]:
        """The jobs, a run each. Raises Refusal, and leaves nothing behind, if sbatch does not take them."""
        folder = JobPaths.get_first_id_independent_folder(self.params["submitit_folder"])
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_python='tasks "$PYTHON"')
        executor.update_parameters(**parameters)
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        try:
            return executor.submit_array(list(runs))
        except FailedJobError as error:
            for path in set(folder.iterdir()) - before:
                path.unlink()
            raise Refusal("sbatch has refused the sweep, for the reason above: nothing is submitted.") from error


def shown(path: Path) -> Path:
    """As short as it can be said."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def on_slurm(run: Run) -> Run:
    """The same run, on as many processes as its job has tasks, unless its words say who trains."""
    if any(w.startswith("trainer=") for w in run.words):
        return run
    return Run(("trainer=slurm", *run.words), run.folder)
