"""Train, sample and score denoising diffusion models: x_t = alpha_t x_0 + sigma_t epsilon."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is imported. Threads that spin while they wait make a step twenty times slower as soon as
# another program wants a core (226 ms against 4.6 s, two cores, a busy neighbour).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
