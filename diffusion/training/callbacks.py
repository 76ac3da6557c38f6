"""Looking at a run while it trains: grids of samples, and scores, from the averaged weights.

Neither draws from the generators of training: with or without them the same weights come out.
"""

from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from diffusion.distributed.ranks import Abandoned, Ranks
from diffusion.training.ema import EMA


class Look(Callback):
    """Every `every` steps, and not at the last (which is looked at when training is over), run `look(step)` with the
    averaged weights in place, in evaluation mode, on all ranks. A run that goes on from a step whose look is missing,
    as it was killed or stopped before, begins with it.

    Args:
        every: steps between two looks.
        ema: the averaged weights.
        ranks: of the run.
        look: what to do; Abandoned leaves it, on all ranks alike.
        missing: whether the look at a step has not been had; rank 0 is asked.
    """

    def __init__(
        self, every: int, ema: EMA, ranks: Ranks, look: Callable[[int], Any], missing: Callable[[int], bool]
    ) -> None:
        self.every, self.ema, self.ranks, self.look, self.missing, self._seen = every, ema, ranks, look, missing, 0

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
            with self.ema.swapped_in(network):
                self.look(step)
        except Abandoned:
            trainer.should_stop = True  # the step is saved, and the run that goes on from it begins with the look
        finally:
            network.train()
