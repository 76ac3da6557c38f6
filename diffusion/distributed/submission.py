"""Submission of a sweep as a SLURM job array, with submitit.

submitit writes the batch script and the pickled jobs. Everything else is as for other jobs: slurm/job.sh starts the
tasks and requeues the job, and a task is the usual command in the folder of its run. submitit's own handling of a
warning, which stops in the middle of a step and resubmits, is not used: jobs are warned by USR1, which the command
handles, and not by USR2, which submitit waits for. This module needs neither torch nor lightning.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import submitit
from hydra.core.plugins import Plugins
from submitit.core.utils import FailedJobError, JobPaths

from diffusion.errors import Refusal

Plugins.instance()  # executes the modules of all plugins; must come before the imports from them

from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf  # noqa: E402
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher  # noqa: E402

JOB = Path("slurm", "job.sh")
COMMON = [field.name for field in fields(BaseQueueConf)]  # settings that submitit has for all kinds of clusters
WITHOUT_EFFECT = {
    "max_num_timeout": "a job is requeued as long as it makes progress",
    "stderr_to_stdout": "a job always writes stdout and stderr to one file",
}
# Settings whose SBATCH_... variable has another name.
VARIABLES = {"timeout_min": "TIMELIMIT", "time": "TIMELIMIT", "mem_gb": "MEM_PER_NODE", "mem": "MEM_PER_NODE"}


def prepare(run_of: Callable[[Sequence[str]], Any]) -> None:
    """Make Hydra submit the runs that `run_of` creates from the words of each job.

    Raises:
        Refusal: nothing can be submitted from here.
    """
    check_place()
    Submission.run_of = staticmethod(run_of)
    # Hydra accepts launchers of the package hydra_plugins only: replace its launcher of the same configuration
    Plugins.instance().class_name_to_class[f"{SlurmLauncher.__module__}.{SlurmLauncher.__name__}"] = Submission


def check_place() -> None:
    """Raise Refusal if this is not the top folder of a checkout, or if sbatch is not found."""
    if not JOB.is_file():
        raise Refusal(
            f"launcher=slurm needs {JOB}, but {Path.cwd()} is not the top folder of a checkout. Submit from that "
            "folder."
        )
    if not shutil.which("sbatch"):
        raise Refusal("launcher=slurm: sbatch not found. Submit from a machine with SLURM.")


class Submission(SlurmLauncher):
    """A launcher that submits, prints what was submitted, and returns. submitit's launcher waits for all jobs instead.

    run_of: function of the words of a job that returns its run: what submitit calls in each task. It has a `folder`.
    """

    run_of: Callable[[Sequence[str]], Any]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        self.prefer_typed_settings()
        parameters = self.parameters()
        runs = [self.run_of(overrides) for overrides in job_overrides]
        for run in runs:
            print(f"+ {run}")
        submitted = self.submit(runs, parameters)
        print(f"+ sbatch {shown(submitted[0].paths.submission_file)}")
        for job, run in zip(submitted, runs, strict=True):
            output = parameters["slurm_additional_parameters"].get("output", shown(job.paths.stdout))
            print(f"job {job.job_id} trains {run.folder} and prints to {output}")
        return []

    def prefer_typed_settings(self) -> None:
        """Remove the SBATCH_... variables of settings that were typed, because sbatch would prefer the variables.

        Raises:
            Refusal: a typed setting would have no effect.
        """
        for word in self.config.hydra.overrides.hydra:
            match = re.match(r"\+*hydra\.launcher\.(?:additional_parameters\.)?(\w+)=", word)
            if match and match[1] in WITHOUT_EFFECT:
                raise Refusal(f"launcher.{match[1]} has no effect here: {WITHOUT_EFFECT[match[1]]}. Leave it out.")
            if match:
                os.environ.pop(f"SBATCH_{VARIABLES.get(match[1], match[1].upper())}", None)

    def parameters(self) -> dict[str, Any]:
        """The parameters from which submitit writes the batch script."""
        left_out = (*WITHOUT_EFFECT, "submitit_folder", "signal_delay_s")
        given = {k: v for k, v in self.params.items() if k not in left_out}
        given["setup"] = [
            *(given["setup"] or ()),
            f"export DIFFUSION_VENV={shlex.quote(sys.prefix)}",
            "export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-array-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}",
            f"source {JOB}",
        ]
        own = {"signal": f"USR1@{self.params['signal_delay_s']}", "requeue": True}
        given["additional_parameters"] = own | given["additional_parameters"]
        given["use_srun"] = False  # `tasks` in job.sh calls srun
        return {k if k in COMMON else f"slurm_{k}": v for k, v in given.items()} | {"stderr_to_stdout": True}

    def submit(self, runs: Sequence[Callable[[], None]], parameters: dict[str, Any]) -> Sequence[submitit.Job]:
        """Submit one job per run; returns the jobs.

        Raises:
            Refusal: sbatch has rejected the jobs. No files are left.
        """
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
            raise Refusal("sbatch has rejected the sweep, for the reason above. Nothing was submitted.") from error


def shown(path: Path) -> Path:
    """The path relative to the current folder, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
