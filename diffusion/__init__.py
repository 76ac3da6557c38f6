"""Train, sample and score denoising diffusion models: x_t = alpha_t x_0 + sigma_t epsilon."""

__version__ = "0.1.0"
