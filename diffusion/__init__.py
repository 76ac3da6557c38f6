"""Train, sample and score denoising diffusion models: x_t = alpha_t x_0 + sigma_t epsilon.

    model = diffusion.load("runs/digits")      a trained model, to sample from (`diffusion.library`)

Importing this package takes a moment and loads no torch; the first use of `load` does.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.library import Images, Model, load

__version__ = "0.1.0"
__all__ = ["Images", "Model", "__version__", "load"]

# Read by OpenMP when torch is imported: how long a thread spins before it sleeps. By default it spins long, and as soon
# as another program wants a core a training step can take twenty times as long; without spinning it takes twice as long
# on an idle machine (docs/measurements.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# DDP warns on every rank of what exactness needs: that it looks for unused parameters and finds none.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def __getattr__(name: str) -> Any:
    if name in ("Images", "Model", "load"):
        from diffusion import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
