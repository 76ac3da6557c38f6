"""Detection of losses and gradients that are not finite: the run records the images of the step and stops or skips it.

Stopping costs no time. The gradient norm is copied to the host while the next step runs, and is checked after that
step, on all ranks. No checkpoint is written before its step has been checked. To skip a step, the norm must be known
before the optimizer step. So the host then waits for the device in every step.
"""

import json
import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion.files import write_atomically
from diffusion.progress import counted
from diffusion.runs.folder import RunFolder

ACTIONS = ("stop", "skip")


class NotFinite(ArithmeticError):
    """A loss or gradient is not finite. The message names the file that records the images of the step."""


class Finite(Callback):
    """Checks the gradient norm of every optimizer step. With `module.skip_not_finite` the module skips bad steps.

    Args:
        folder: the run folder; nonfinite/step_00000017_rank_0000.json is written there.
        limit: number of steps that a run may skip; one more raises NotFinite.
    """

    def __init__(self, folder: RunFolder, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.skipped = 0
        self._waiting: tuple[int, Tensor, Any, list[dict[str, Tensor]]] | None = None
        self._seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        norm, draws = module.last_step()
        self.settle(trainer, module)  # for the step before, which the device has finished
        ready = None
        if norm.is_cuda:
            norm = torch.empty((), dtype=norm.dtype, pin_memory=True).copy_(norm, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._waiting = self._seen, norm, ready, draws
        if module.skip_not_finite:  # the module has already waited for the norm
            self.settle(trainer, module)

    def settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the latest step that has not been checked.

        Raises:
            NotFinite: its gradient is not finite, and the run must end.
        """
        if self._waiting is None:
            return
        (step, norm, ready, draws), self._waiting = self._waiting, None
        if ready is not None:
            ready.synchronize()
        norm = float(norm)
        if math.isfinite(norm):
            return
        file = self._record(step, trainer.global_rank, norm, draws)
        if not module.skip_not_finite:
            raise NotFinite(
                f"the gradient of step {step} has the norm {norm}. Its images, t and losses are in {file}. No "
                f"checkpoint contains this step. Give a smaller optimizer.lr, or on_nonfinite=skip."
            )
        self.skipped += 1
        if self.skipped > self.limit:
            raise NotFinite(
                f"{counted(self.skipped, 'step', 'steps')} had a gradient that is not finite, more than "
                f"max_nonfinite={self.limit} allows. The last one is step {step}; its images are in {file}."
            )

    def _record(self, step: int, rank: int, norm: float, draws: list[dict[str, Tensor]]) -> str:
        """Write position, t and loss of the images of this rank in the step; returns the path of the file."""
        columns = {key: torch.cat([draw[key] for draw in draws]).tolist() for key in draws[0]}
        columns["loss"] = [loss if math.isfinite(loss) else str(loss) for loss in columns["loss"]]
        path = self.folder.path / "nonfinite" / f"step_{step:08d}_rank_{rank:04d}.json"
        write_atomically(path, json.dumps({"step": step, "rank": rank, "gradient_norm": str(norm)} | columns) + "\n")
        return str(path)
