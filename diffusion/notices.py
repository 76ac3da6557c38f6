"""Notices to the user: printed once, however many processes a command has; a Python warning in a program of one's own.

Needs the standard library only.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_silent: ContextVar[bool] = ContextVar("silent", default=False)


def speaks() -> bool:
    """Whether this is the first process, according to the environment of the launcher. True for a single process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # also inside a task of srun: the same order as in processes.environment
        names: tuple[str, ...] = ("RANK",)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID",)
    else:
        names = ("LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name, 0)) == 0 for name in names)


@contextmanager
def as_warnings() -> Iterator[None]:
    """Give notices of this thread to `warnings.warn` instead of printing them, as a library does."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def say(message: str) -> None:
    """Print a line on stdout, in the first process only: all processes find the same."""
    if _silent.get():
        warnings.warn(message, stacklevel=2)
    elif speaks():
        print(message, flush=True)


def warn(message: str) -> None:
    """Print a warning on stderr, in the first process only."""
    if _silent.get():
        warnings.warn(message, stacklevel=2)
    elif speaks():
        print(f"warning: {message}", file=sys.stderr, flush=True)
