"""Runs of a sweep as an array of jobs of SLURM, submitted by submitit.

Of a job, submitit makes the batch script and what travels to the nodes; what becomes of it is as for every other job.
slurm/job.sh starts its tasks and requeues it, a task is the ordinary command in the folder of its run. submitit's own
answer to a warning, to leave in the middle of a step and submit itself anew, never has its turn: jobs are warned by
USR1, which the command handles, and not by USR2, which submitit waits for. Needs neither torch nor lightning.
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

Plugins.instance()  # executes the modules of all plugins: before anything is taken from them

from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf  # noqa: E402
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher  # noqa: E402

JOB = Path("slurm", "job.sh")
COMMON = [field.name for field in fields(BaseQueueConf)]  # to submitit, of all kinds of clusters
NOT_HEEDED = {
    "max_num_timeout": "a job is requeued for as long as it gets on",
    "stderr_to_stdout": "all that a job prints is in one file",
}
# Settings and flags that sbatch's variables, SBATCH_..., do not share the name of.
VARIABLES = {"timeout_min": "TIMELIMIT", "time": "TIMELIMIT", "mem_gb": "MEM_PER_NODE", "mem": "MEM_PER_NODE"}


def prepare(run_of: Callable[[Sequence[str]], Any]) -> None:
    """Have Hydra submit the runs that `run_of` makes of the words of each job. Raises Refusal where nothing can be
    submitted."""
    check_place()
    Submission.run_of = staticmethod(run_of)
    # Hydra takes launchers of the package hydra_plugins only: ours stands in for the one of the same configuration
    Plugins.instance().class_name_to_class[f"{SlurmLauncher.__module__}.{SlurmLauncher.__name__}"] = Submission


def check_place() -> None:
    """Refuse to submit where there is nothing to submit, or nothing to submit to."""
    if not JOB.is_file():
        raise Refusal(
            f"launcher=slurm needs {JOB}, but {Path.cwd()} is not the top folder of a checkout: submit from there."
        )
    if not shutil.which("sbatch"):
        raise Refusal("launcher=slurm: sbatch not found: submit from a machine with SLURM.")


class Submission(SlurmLauncher):
    """Submits, says what, and is done: submitit's own launcher waits for the end of all jobs.

    run_of: from the words of a job to its run: what submitit calls in each task, which has a `folder`.
    """

    run_of: Callable[[Sequence[str]], Any]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        self.prefer_what_was_given()
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

    def submit(self, runs: Sequence[Callable[[], None]], parameters: dict[str, Any]) -> Sequence[submitit.Job]:
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
