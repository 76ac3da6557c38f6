"""Sweeps: all runs are composed and checked before the first begins, here or as jobs of SLURM.

    launcher=basic    one after another, in this process (Hydra's own launcher)
    launcher=slurm    an array of jobs, a run each, submitted by submitit (`distributed.submission`)

Needs neither torch nor lightning.
"""

import logging
import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from diffusion.config.check import check
from diffusion.config.compose import Typed, check_words, sweep_folder
from diffusion.config.composer import searched
from diffusion.config.effect import job_of, refuse_idle_words
from diffusion.config.words import FLAGS_WITH_VALUE, nearest, quoted, search_word
from diffusion.errors import Refusal

LAUNCHERS = {"basic": "basic", "slurm": "submitit_slurm"}  # ours -> Hydra's
HYDRA_FLAGS = (*FLAGS_WITH_VALUE, "-m", "--multirun", "--version", "--hydra-help", "--resolve")
ON_SLURM = f"hydra/launcher={LAUNCHERS['slurm']}"


# ---- words ----


def sweep_words(flags: list[str], words: list[str]) -> tuple[list[str], list[str]]:
    """(flags, words) as Hydra shall see them, once each run that they make has been found sound. Raises Refusal."""
    words = [launcher_word(w) for w in words]
    cluster = [f for f in flags if f.startswith("--") and f.partition("=")[0] not in HYDRA_FLAGS]
    if cluster and ON_SLURM not in words:
        raise Refusal(f"{cluster[0]} is not a flag of this command. Flags of sbatch need launcher=slurm.")
    words = check_words("train", words, sweep=True)
    check_jobs("train", words)
    return [f for f in flags if f not in cluster], words + [flag_word(f) for f in cluster]


def check_jobs(command: str, words: Sequence[str]) -> None:
    """Refuse a sweep of which a job cannot be, or a word has no effect in any job, before the first has begun."""
    made = jobs(words)
    refuse_idle_words(command, made)
    for overrides in made:
        job = job_of(command, tuple(overrides))
        check(job.cfg, Typed(command, job.words))


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
            f"Unknown launcher: {value}.{nearest(value, list(LAUNCHERS))} Known launchers: {', '.join(LAUNCHERS)}."
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
        words: of `diffusion.train`, those that have an effect in this run. folder: of the run, by all its words.
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
    """The run that these words of a sweep make; of words that `check_jobs` has found sound."""
    job = job_of("train", tuple(overrides))
    folder = sweep_folder(job.cfg.run_dir, list(overrides))
    folders = [search_word(searched())] if searched() else []
    return Run((*(w for w in job.words if not w.startswith("run_dir=")), *folders, f"run_dir={folder}"), folder)


def on_slurm(run: Run) -> Run:
    """The same run, on as many processes as its job has tasks, unless its words say who trains."""
    if any(w.startswith("trainer=") for w in run.words):
        return run
    return Run(("trainer=slurm", *run.words), run.folder)
