"""Looking at a run while it trains: grids of samples, and scores, from the averaged weights.

Neither draws from the generators of training: with or without them the same weights come out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from diffusion.training.ema import EMA
from diffusion.training.pictures import grid, save_png
from diffusion.training.run_folder import RunFolder
from diffusion.training.scoring import Sampling


def save_grid(folder: RunFolder, step: int, sampling: Sampling, num_images: int) -> Path:
    """samples/step_00001000.png: images 0 ... num_images - 1 at this step. Returns its path."""
    images = sampling.images(torch.arange(num_images))
    columns = sampling.num_classes if sampling.num_classes and num_images % sampling.num_classes == 0 else None
    path = grid_path(folder, step)
    save_png(grid(images, columns), path)
    return path


def grid_path(folder: RunFolder, step: int) -> Path:
    return folder.samples / f"step_{step:08d}.png"


class Look(Callback):
    """Every `every` steps, and not at the last (which is looked at when training is over), run `look(step)` with the
    averaged weights in place, in evaluation mode, on rank 0."""

    def __init__(self, every: int, ema: EMA, look: Callable[[Trainer, int], None]) -> None:
        self.every, self.ema, self.look, self._seen = every, ema, look, 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if step % self.every or step >= trainer.max_steps or not trainer.is_global_zero:
            return
        network = module.network
        network.eval()
        try:
            with self.ema.swapped_in(network):
                self.look(trainer, step)
        finally:
            network.train()
