"""Exponential moving average of the network's weights: the weights that are sampled and scored.

    average <- decay average + (1 - decay) weights,    after every optimizer step

With the ramp, decay at step n is min(decay, (1 + n) / (10 + n)): without it 0.9999 remembers the initial weights for
30,000 steps and ruins short runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffusion.settings import Between, settings


@settings("ema")
class EMA(Callback):
    """Keeps a float32 copy of `module.network`'s parameters, stored in the checkpoint under its own key `ema`.

    Args:
        decay: share of the average that stays at each step, in [0, 1).
        warmup: ramp the decay up from 0.1.

    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, decay: Annotated[float, Between(0, 1, ends="[)")] = 0.9999, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.average: list[Tensor] = []
        self._restored: dict[str, Tensor] | None = None
        self._seen = 0

    def decay_at(self, step: int) -> float:
        """The decay of the n-th optimizer step, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.warmup and 0 < trainer.max_steps < 3 / (1 - self.decay):
            rank_zero_warn(
                f"ema.decay={self.decay} without ema.warmup remembers the initial weights after "
                f"trainer.max_steps={trainer.max_steps} steps (it takes {3 / (1 - self.decay):.0f} to forget them): "
                f"set ema.warmup=true."
            )
        self.average = [p.detach().float().clone() for p in module.network.parameters()]
        if self._restored is not None:
            load_average(module.network, self._restored, self.average)
        self._seen = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:  # inside an accumulated step
            return
        self._seen = trainer.global_step
        if module.skipped:
            return
        weights = [p.detach().float() for p in module.network.parameters()]
        torch._foreach_lerp_(self.average, weights, 1 - self.decay_at(self._seen))

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = [name for name, _ in module.network.named_parameters()]
        checkpoint["ema"] = dict(zip(names, self.average, strict=True))

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["ema"]

    @contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """Inside, the network computes with the averaged weights; outside, with its own again."""
        parameters = list(network.parameters())
        own = [p.data for p in parameters]
        try:
            for p, average in zip(parameters, self.average, strict=True):
                p.data = average.to(p.dtype)
            yield
        finally:
            for p, data in zip(parameters, own, strict=True):
                p.data = data


def load_average(network: nn.Module, ema: dict[str, Tensor], into: list[Tensor]) -> None:
    """Copy named averages into a list in the order of network.parameters(); names and shapes must be the network's."""
    for (name, _), target in zip(network.named_parameters(), into, strict=True):
        target.copy_(ema[name])
