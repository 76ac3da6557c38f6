"""Looking at a run while it trains: grids of samples and scores, from the averaged weights, and the loss on images that
are not trained on.

None draws from the generators of training: with or without them the same weights come out.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from diffusion.distributed.ranks import Abandoned, Ranks
from diffusion.training.ema import EMA


class Look(Callback):
    """Every `every` steps, and not at the last (which is looked at when training is over), run `look(step)` in
    evaluation mode, on all ranks. A run that goes on from a step whose look is missing, as it was killed or stopped
    before, begins with it.

    Args:
        every: steps between two looks.
        ranks: of the run.
        look: what to do; Abandoned leaves it, on all ranks alike, and ends training.
        missing: whether the look at a step has not been had; rank 0 is asked.
        ema: the averaged weights, which are in place while it looks; None: the weights that are trained.
        long: whether the step is saved before it is looked at.
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
        """Whether the run is looked at after this step."""
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
            self.keep(trainer, module)  # the run that goes on from this step begins with the look
            trainer.should_stop = True
        finally:
            network.train()
