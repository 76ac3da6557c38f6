"""What a command says to its user, once, however many processes it has. Needs the standard library only."""

import os
import sys


def speaks() -> bool:
    """Whether this process is the first of those that a launcher has started, by what that has set; alone it is."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # also within a task of srun: in the order of processes.environment
        names: tuple[str, ...] = ("RANK",)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID",)
    else:
        names = ("LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in names)


def say(message: str) -> None:
    """A line on stdout, of the first process alone: of what all of them find."""
    if speaks():
        print(message, flush=True)


def warn(message: str) -> None:
    """`say` on stderr, as a warning."""
    if speaks():
        print(f"warning: {message}", file=sys.stderr, flush=True)
