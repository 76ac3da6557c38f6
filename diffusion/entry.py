"""The commands as programs of their own: `diffusion-train` is `python -m diffusion.train`.

Hydra's shell completion works for programs only.
"""

import functools
import importlib
import importlib.util
import os
import sys

NAMES = ("train", "sample", "evaluate", "prepare", "report", "lab", "benchmark")


def run(name: str) -> None:
    """Run a command with the arguments of this process."""
    from diffusion.distributed.signals import install

    install()  # before the imports, which take seconds
    if os.getcwd() not in sys.path:  # as with python -m: modules of the user's own are in the current folder
        sys.path.insert(0, os.getcwd())
    package = importlib.util.find_spec(f"diffusion.{name}").submodule_search_locations is not None
    importlib.import_module(f"diffusion.{name}" + (".__main__" if package else "")).main()


train, sample, evaluate, prepare, report, lab, benchmark = (functools.partial(run, name) for name in NAMES)
