"""A loss or a gradient that is not finite: the step is found, its draws are recorded, and the run stops or skips it.

To stop costs nothing: the norm of the gradients is copied to the host while the next step runs and looked at after it,
on all ranks alike, and no checkpoint is written before the step it holds has been looked at. To skip a step, its norm
must be known before the optimizer acts: the host waits for the device in every step.
"""

import json
import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from diffusion.files import write_atomically
from diffusion.runs.folder import RunFolder

ACTIONS = ("stop", "skip")


class NotFinite(ArithmeticError):
    """Training has met a loss or a gradient that is not finite; the message says where its draws are recorded."""


class Finite(Callback):
    """Looks at the gradient norm of every optimizer step; `module.skip_not_finite` makes the module skip.

    Args:
        folder: of the run; nonfinite/step_00000017_rank_0000.json is written there.
        limit: skipped steps of a run, after which skipping is an error as well.
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
        self.settle(trainer, module)  # of the step before, which the device has long finished
        ready = None
        if norm.is_cuda:
            norm = torch.empty((), dtype=norm.dtype, pin_memory=True).copy_(norm, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._waiting = self._seen, norm, ready, draws
        if module.skip_not_finite:  # the module has waited for it already
            self.settle(trainer, module)

    def settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the latest step that has not been looked at. NotFinite if the run is to end."""
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
                f"the gradient of step {step} has the norm {norm}: its images, t and losses are in {file}. No "
                f"checkpoint holds that step. Lower optimizer.lr, or give on_nonfinite=skip."
            )
        self.skipped += 1
        if self.skipped > self.limit:
            raise NotFinite(
                f"{self.skipped} steps had a gradient that is not finite, more than max_nonfinite={self.limit} allows: "
                f"the last is step {step}, see {file}."
            )

    def _record(self, step: int, rank: int, norm: float, draws: list[dict[str, Tensor]]) -> str:
        """Write down what this rank drew for the step; the file."""
        columns = {key: torch.cat([draw[key] for draw in draws]).tolist() for key in draws[0]}
        columns["loss"] = [loss if math.isfinite(loss) else str(loss) for loss in columns["loss"]]
        path = self.folder.path / "nonfinite" / f"step_{step:08d}_rank_{rank:04d}.json"
        write_atomically(path, json.dumps({"step": step, "rank": rank, "gradient_norm": str(norm)} | columns) + "\n")
        return str(path)
