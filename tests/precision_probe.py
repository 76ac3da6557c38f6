"""`python -m diffusion.train`, with a note of the numbers it computes in: tests/test_precision.py runs it.

    python tests/precision_probe.py [key=value ...]

Each rank of the run leaves RUN/dtypes_rank_0000.json, name of a quantity -> the dtypes it has had. The network begins
with weights of ordinary size in place of the paper's zeros, so that its output is one.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from diffusion import run  # noqa: E402


class ProbedRun(run.Run):
    """A run that notes the dtypes of what passes between its parts, and of what it remembers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.dtypes: dict[str, set[str]] = defaultdict(set)
        network = self.parts.denoiser.network
        ordinary_weights(network)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda layer, inputs, output: self.note(convolution=output))
        network.register_forward_hook(lambda network, inputs, output: self.note(network=output, x_t=inputs[0]))
        module = self.training.module
        module._objective = self.noting(module._objective)

    def note(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.dtypes[name].add(str(tensor.dtype).removeprefix("torch."))

    def noting(self, objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The objective, what it is given and what it answers noted."""

        def noted(output: Tensor, x_t: Tensor, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
            loss = objective(output, x_t, x0, epsilon, t)
            self.note(output=output, x_t=x_t, x0=x0, epsilon=epsilon, loss=loss)
            return loss

        return noted

    def train(self, *arguments: Any) -> int:
        status = super().train(*arguments)
        for p in self.parts.denoiser.network.parameters():
            self.note(weights=p, gradient=p.grad)
        for average in self.training.ema.average:
            self.note(ema=average)
        path = Path(self.folder.path) / f"dtypes_rank_{self.training.module.global_rank:04d}.json"
        path.write_text(json.dumps({name: sorted(found) for name, found in self.dtypes.items()}))
        return status


def ordinary_weights(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)


if __name__ == "__main__":
    run.Run = ProbedRun  # which the command takes from there
    from diffusion.train import main

    main()
