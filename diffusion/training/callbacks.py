"""The callback that evaluates a run while it trains: sample grids, scores, and the held-out loss.

It does not use the random generators of training: the weights are the same with and without it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from diffusion.distributed.ranks import Abandoned, Ranks
from diffusion.training.ema import EMA


class Look(Callback):
    """Runs `look(step)` every `every` steps, in evaluation mode, on all ranks.

    It is not run at the last step, which is evaluated after training. If a run was killed or stopped before the look at
    a step was complete, the resumed run starts with that look.

    Args:
        every: steps between two looks.
        ranks: the ranks of the run.
        look: the function to call. If it raises Abandoned, on all ranks, training ends.
        missing: whether the look at a step is not complete; called on rank 0 only.
        ema: the averaged weights, swapped in during the look; None: the current weights are used.
        long: whether the step is saved before the look.
    """

    def __init__(
        self,
        every: int,
        ranks: Ranks,
        look: Callable[[int], Any],
        missing: Callable[[int], bool],
        ema: EMA | None = None,
        long: bool = True,
    ) -> None:
        self.every, self.ranks, self.look, self.missing, self.ema, self.long = every, ranks, look, missing, ema, long
        self.keep: Callable[[Trainer, LightningModule], None] = lambda trainer, module: None
        self._seen = 0

    def due(self, step: int) -> bool:
        """Whether there is a look after this step."""
        return step > 0 and step % self.every == 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen = trainer.global_step
        if self.due(self._seen) and self.ranks.from_main(self.ranks.main and self.missing(self._seen)):
            self._look(trainer, module, self._seen)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if self.due(step) and step < trainer.max_steps and not trainer.should_stop:
            self._look(trainer, module, step)

    def _look(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        network = module.network
        network.eval()
        try:
            with self.ema.swapped_in(network) if self.ema else contextlib.nullcontext():
                self.look(step)
        except Abandoned:
            self.keep(trainer, module)  # save the step: the resumed run starts with this look
            trainer.should_stop = True
        finally:
            network.train()
