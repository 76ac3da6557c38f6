"""Exponential moving average of the network's weights: the weights that are sampled and scored.

    average <- decay average + (1 - decay) weights,    after every optimizer step

With the ramp, decay at step n is min(decay, (1 + n) / (10 + n)): without it 0.9999 remembers the initial weights for
30,000 steps and ruins short runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffusion.settings import Between, Distinct, settings

Decay = Annotated[float, Between(0, 1, ends="[)")]


@settings("ema")
class EMA(Callback):
    """Keeps a float32 copy of `module.network`'s parameters, stored in the checkpoint under its own key `ema`; and
    further ones of other decays, which training does not need, under `emas`, by their decays.

    Args:
        decay: share of the average that stays at each step, in [0, 1).
        warmup: ramp the decay up from 0.1.
        decays: of further averages.

    Raises:
        ValueError: a decay outside [0, 1), or one that is there twice.
    """

    def __init__(
        self,
        decay: Decay = 0.9999,
        warmup: bool = False,
        decays: Annotated[Sequence[Decay], Distinct()] = (),
    ) -> None:
        if decay in decays:
            raise ValueError(
                f"ema.decays={list(decays)} has ema.decay={decay}, which is averaged anyway. Leave it out."
            )
        self.decay, self.warmup, self.decays = decay, warmup, tuple(decays)
        self.average: list[Tensor] = []
        self.others: dict[float, list[Tensor]] = {}  # by decay
        self._restored: dict[float, dict[str, Tensor]] = {}
        self._seen = 0

    def decay_at(self, step: int, decay: float | None = None) -> float:
        """The decay of the n-th optimizer step, counted from 1, of the average or of a further one."""
        decay = self.decay if decay is None else decay
        return min(decay, (1 + step) / (10 + step)) if self.warmup else decay

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.warmup and 0 < trainer.max_steps < 3 / (1 - self.decay):
            rank_zero_warn(
                f"ema.decay={self.decay} without ema.warmup remembers the initial weights after "
                f"trainer.max_steps={trainer.max_steps} steps (it takes {3 / (1 - self.decay):.0f} to forget them): "
                f"set ema.warmup=true."
            )
        for decay in (self.decay, *self.decays):
            average = [p.detach().float().clone() for p in module.network.parameters()]
            if decay in self._restored:
                load_average(module.network, self._restored[decay], average)
            self.others[decay] = average
        self.average = self.others.pop(self.decay)
        self._seen = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:  # inside an accumulated step
            return
        self._seen = trainer.global_step
        if module.skipped:
            return
        weights = [p.detach().float() for p in module.network.parameters()]
        for decay, average in {self.decay: self.average, **self.others}.items():
            torch._foreach_lerp_(average, weights, 1 - self.decay_at(self._seen, decay))

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        names = [name for name, _ in module.network.named_parameters()]
        checkpoint["ema"] = dict(zip(names, self.average, strict=True))
        if self.others:
            named = {key_of(decay): dict(zip(names, average, strict=True)) for decay, average in self.others.items()}
            checkpoint["emas"] = named

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        emas = checkpoint.get("emas", {})
        self._restored = {decay: emas[key_of(decay)] for decay in self.decays} | {self.decay: checkpoint["ema"]}

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


def key_of(decay: float) -> str:
    """The name of an average of this decay in a checkpoint."""
    return repr(float(decay))
