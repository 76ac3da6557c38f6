"""Exponential moving average (EMA) of the network's weights. Samples and scores use the averaged weights.

    average <- decay average + (1 - decay) weights,    after every optimizer step

With warmup the decay at step n is min(decay, (1 + n) / (10 + n)). Without warmup, and with decay 0.9999, the average is
still partly the initial weights after 30,000 steps, which makes short runs useless.
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
    """Averages the parameters of `module.network` in float32.

    The average is stored in the checkpoint under the key `ema`. Further averages of other decays are stored under
    `emas`, by their decays. Training does not use them.

    Args:
        decay: the decay, in [0, 1).
        warmup: increase the decay from 2/11 at the first step (see above).
        decays: decays of further averages, each in [0, 1).

    Raises:
        ValueError: a decay is outside [0, 1), or is given twice.
    """

    def __init__(
        self,
        decay: Decay = 0.9999,
        warmup: bool = False,
        decays: Annotated[Sequence[Decay], Distinct()] = (),
    ) -> None:
        if decay in decays:
            raise ValueError(
                f"ema.decays={list(decays)} contains ema.decay={decay}, which is always averaged. Remove it from "
                "ema.decays."
            )
        self.decay, self.warmup, self.decays = decay, warmup, tuple(decays)
        self.average: list[Tensor] = []
        self.others: dict[float, list[Tensor]] = {}  # by decay
        self._restored: dict[float, dict[str, Tensor]] = {}
        self._seen = 0

    def decay_at(self, step: int, decay: float | None = None) -> float:
        """The decay at optimizer step `step`, counted from 1; `decay` is that of a further average, or None."""
        decay = self.decay if decay is None else decay
        return min(decay, (1 + step) / (10 + step)) if self.warmup else decay

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.warmup and 0 < trainer.max_steps < 3 / (1 - self.decay):
            rank_zero_warn(
                f"After trainer.max_steps={trainer.max_steps} steps the average is still partly the initial weights: "
                f"ema.decay={self.decay} needs about {3 / (1 - self.decay):.0f} steps. Give ema.warmup=true."
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
        if trainer.global_step == self._seen:  # not the last micro-batch of the step
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
        """Context in which the network has the averaged weights. Its own weights are restored at the end."""
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
    """Copy averages by name into the list `into`, which is in the order of network.parameters()."""
    for (name, _), target in zip(network.named_parameters(), into, strict=True):
        target.copy_(ema[name])


def key_of(decay: float) -> str:
    """The key of the average of this decay in a checkpoint."""
    return repr(float(decay))
