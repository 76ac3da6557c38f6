"""Where a network runs: its device, its precision and its memory format."""

import contextlib
from typing import NamedTuple, Self

import torch

from diffusion.distributed.launcher import Compute
from diffusion.errors import Refusal

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Place(NamedTuple):
    """Device, precision of the network ("32" or "bf16-mixed"), memory format."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format

    @classmethod
    def of(cls, compute: Compute) -> Self:
        """What is asked for, `auto` decided by what is there; sets the number of threads.

        Raises:
            Refusal: a GPU is asked for, and there is none.
        """
        cuda = torch.cuda.is_available()
        if compute.accelerator == "gpu" and not cuda:
            raise Refusal("trainer.accelerator=gpu, but torch sees no CUDA device: give trainer=cpu.")
        device = torch.device("cuda" if cuda and compute.accelerator != "cpu" else "cpu")
        precision, wanted = compute.precision, compute.memory_format
        if precision == "auto":
            precision = "bf16-mixed" if device.type == "cuda" else "32"
        if wanted == "auto":
            wanted = "channels_last" if device.type == "cuda" else "contiguous"
        if compute.threads is not None:
            torch.set_num_threads(compute.threads)
        return cls(device, precision, FORMATS[wanted])

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 inside the network where that was asked for."""
        if self.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
