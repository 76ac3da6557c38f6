"""Train, sample and score denoising diffusion models: x_t = alpha_t x_0 + sigma_t epsilon."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is imported: how long a thread spins before it sleeps. By default it spins long, and as soon
# as another program wants a core a training step can take twenty times as long; without spinning it takes twice as long
# on an idle machine (docs/measurements.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# DDP warns on every rank of what exactness needs: that it looks for unused parameters and finds none.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
