"""The device, precision and memory format of a network."""

import contextlib
from typing import NamedTuple, Self

import torch

from diffusion.distributed.launcher import Compute
from diffusion.errors import Refusal

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Place(NamedTuple):
    """The device, the precision of the network ("32" or "bf16-mixed") and the memory format."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format

    @classmethod
    def of(cls, compute: Compute) -> Self:
        """The place for these settings. `auto` depends on whether there is a GPU. Also sets torch's number of threads.

        Raises:
            Refusal: accelerator is "gpu", and there is no GPU.
        """
        cuda = torch.cuda.is_available()
        if compute.accelerator == "gpu" and not cuda:
            raise Refusal("trainer.accelerator=gpu, but torch finds no CUDA device. Give trainer=cpu.")
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
        """The autocast context for the network: bf16, or no change if precision is "32"."""
        if self.precision == "32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)
