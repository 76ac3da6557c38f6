"""The training step: noise the images, call the network, compute the loss. The host does not wait for the device.

    x_t = alpha_t x_0 + sigma_t epsilon,   t drawn by `levels`,   loss = objective(network(x_t, t), ...)

All random numbers are functions of the position of an image in the endless stream, which is (step, place in the global
batch). They do not depend on ranks, workers, micro-batches or interruptions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from diffusion.denoiser import NetworkDenoiser
from diffusion.images import from_uint8
from diffusion.noise import Stream, keys, normal, seed63, uniform
from diffusion.objective import Objective
from diffusion.process.kernels import noised
from diffusion.runs.recorded import Recorded
from diffusion.settings import AtLeast, settings
from diffusion.training.levels import Levels, Uniform
from diffusion.training.lr_schedule import Constant

QUARTILES = 4


@settings("optimizer")
@dataclass(frozen=True)
class Descent:
    """Settings of the gradient, beside those of the optimizer.

    Args:
        gradient_clip: largest global norm of the gradient; 0 means no clipping.
    """

    gradient_clip: Annotated[float, AtLeast(0)] = 1.0


class DiffusionModule(pl.LightningModule):
    """The LightningModule that trains a network.

    Args:
        denoiser: the network, its schedule and its kind of prediction.
        objective: the loss per image.
        optimizer: function of the parameters that returns the optimizer.
        levels: distribution of the noise levels; None means uniform.
        lr_schedule: function of the number of the optimizer step, counted from 0, that returns the factor on the
            learning rate; None means constant.
        descent: gradient clipping.
        flip: mirror each image with probability 1/2.
        seed: seed of all random numbers.
        memory_format: memory format of images and activations.
        record: the recorded configuration, stored in every checkpoint.
        skip_not_finite: skip the optimizer step if the gradient is not finite. The host then waits for the device in
            every step.

    Raises:
        ValueError: label_dropout without classes, or levels that do not fit the objective.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        objective: Objective,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        levels: Levels | None = None,
        lr_schedule: Callable[[int], float] | None = None,
        descent: Descent | None = None,
        flip: bool = False,
        seed: int = 0,
        memory_format: torch.memory_format = torch.contiguous_format,
        record: Recorded | None = None,
        skip_not_finite: bool = False,
    ) -> None:
        super().__init__()
        if (hidden := objective.label_dropout) and denoiser.network.null_label is None:
            raise ValueError(
                f"objective.label_dropout={hidden} needs a conditional network, but model.num_classes is 0. Give "
                "objective.label_dropout=0."
            )
        self.levels = levels or Uniform(denoiser.schedule)
        if objective.variance is not None and not self.levels.whole:
            raise ValueError(
                "levels: this distribution draws real times, but objective=bound and objective=hybrid need integer "
                "times. Give levels=uniform."
            )
        self.levels.weight_at(torch.ones(1), objective)
        self.network = denoiser.network
        self._denoiser, self._objective, self._optimizer = (denoiser,), objective, optimizer  # in a tuple: no submodule
        self.lr_schedule, self.rate = lr_schedule or Constant(), 0.0  # rate: learning rate of the last step
        self.descent, self.label_dropout = descent or Descent(), objective.label_dropout
        self.flip, self.seed, self.memory_format, self.record = flip, seed, memory_format, record
        self.skip_not_finite, self._unstable = skip_not_finite, objective.unstable
        self.num_timesteps = denoiser.schedule.num_timesteps
        self._sums: Tensor | None = None  # (2, 2 + QUARTILES), sum and count: loss, by quartile of t, stand-ins
        self._norms: Tensor | None = None  # (2,): sum and count of gradient norms
        self._draws: list[dict[str, Tensor]] = []  # one for each micro-batch since the last step
        self._norm: Tensor | None = None  # gradient norm of the last step
        self.skipped = False  # whether the last step was skipped

    @property
    def denoiser(self) -> NetworkDenoiser:
        return self._denoiser[0]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self._optimizer(self.network.parameters())
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_schedule(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ramp, "interval": "step"}}

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Seed torch's generator, which dropout uses, for each micro-batch. So its state need not be saved."""
        micro_step = self.trainer.global_step * self.trainer.accumulate_grad_batches
        micro_step += batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(seed63(self.seed, Stream.NETWORK, micro_step, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a micro-batch.

        batch: image uint8 (B, C, H, W), position (B,), and, if the data have labels, label (B,).
        """
        position = batch["position"]
        x0 = from_uint8(batch["image"]).contiguous(memory_format=self.memory_format)
        if self.flip:
            mirrored = keys(position, self.seed, Stream.FLIP) < 0
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        labels = self.hidden_labels(batch.get("label"), position)
        t = self.levels.draw(keys(position, self.seed, Stream.TIME))
        epsilon = normal(keys(position, self.seed, Stream.NOISE), x0.shape[1:])
        loss = self.loss(x0, labels, t, epsilon)
        self.count(loss.detach(), t, batch.get("stand_in"))
        self._draws.append({"position": position, "t": t, "loss": loss.detach()})
        return loss.mean()

    def loss(self, x0: Tensor, labels: Tensor | None, t: Tensor, epsilon: Tensor) -> Tensor:
        """The weighted loss of each image, (B,). x0 and epsilon are (B, C, H, W), t (B,), labels (B,) or None."""
        x_t = noised(self.denoiser.schedule, x0, t, epsilon)
        loss = self._objective(self.denoiser.output(x_t, t, labels), x_t, x0, epsilon, t)
        weight = self.levels.weight_at(t, self._objective)
        return loss if weight is None else loss * weight.to(loss.dtype)

    def hidden_labels(self, labels: Tensor | None, position: Tensor) -> Tensor | None:
        """The labels that the network gets: `null_label` for the dropped share; None for an unconditional network."""
        null = self.network.null_label
        if null is None or labels is None:
            return None
        if not self.label_dropout:
            return labels
        dropped = uniform(keys(position, self.seed, Stream.LABEL_DROP)) < self.label_dropout
        return torch.where(dropped, torch.full_like(labels, null), labels)

    # ---- metrics: summed on the device, fetched by the meter every `log_every` steps ----

    @torch.no_grad()
    def count(self, loss: Tensor, t: Tensor, stand_in: Tensor | None = None) -> None:
        """Add the losses (B,) of a micro-batch, and its number of stand-ins for bad images, to the sums."""
        new = by_quartile(loss, t, self.num_timesteps)
        skipped = new.new_zeros(2)
        if stand_in is not None:
            skipped = torch.stack([stand_in.sum(), torch.ones_like(stand_in).sum()]).double()
        new = torch.cat([new, skipped[:, None]], dim=1)
        self._sums = new if self._sums is None else self._sums.add_(new)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.rate = optimizer.param_groups[0]["lr"]
        limit = self.descent.gradient_clip or float("inf")
        self._norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit).detach()
        finite = self._norm.isfinite()
        self.skipped = self.skip_not_finite and not finite
        if self.skipped:
            for p in self.network.parameters():
                p.grad = None  # the optimizer then changes neither the weight nor its moments
        new = torch.stack([torch.where(finite, self._norm, 0).double(), finite.double()])
        self._norms = new if self._norms is None else self._norms.add_(new)

    def last_step(self) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The gradient norm of the last step over all ranks, and position, t and loss of its images by micro-batch.

        All are on the device. Call it once per step: it clears the list of micro-batches.
        """
        draws, self._draws = self._draws, []
        return self._norm, draws

    def take_counts(self) -> Tensor | None:
        """The sums since the last call, (2, 3 + QUARTILES) on the device; None before the first step.

        Rows are sum and count. Columns are the loss, the loss by quartile of t from the cleanest to the noisiest, the
        stand-ins for bad images (count 0 where bad images are an error), and the gradient norm.
        """
        if self._sums is None or self._norms is None:
            return None
        counts = torch.cat([self._sums, self._norms[:, None]], dim=1)
        self._sums = self._norms = None
        return counts

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = {} if self.record is None else self.record.plain()
        counts = {"sums": self._sums, "norms": self._norms}
        if self.trainer.world_size > 1:  # sums of all ranks; on load rank 0 gets them
            strategy = self.trainer.strategy
            counts = {k: v if v is None else strategy.reduce(v.clone(), reduce_op="sum") for k, v in counts.items()}
        checkpoint["counts"] = counts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self._sums, self._norms = checkpoint["counts"]["sums"], checkpoint["counts"]["norms"]

    def on_train_start(self) -> None:
        """Set Lightning's count of micro-batches.

        A run may be resumed with another number of micro-batches per step. Lightning does not account for that and
        would shorten the first step.
        """
        loop = self.trainer.fit_loop.epoch_loop
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        loop.batch_progress.current.ready = loop.batch_progress.current.started = done
        loop.batch_progress.current.processed = done
        # the checkpoint is saved before Lightning counts its batch as completed; Lightning adds it when the loop starts
        loop.batch_progress.current.completed = done - loop.restarted_on_train_batch_end
        if self._sums is not None:
            self._sums, self._norms = self._sums.to(self.device), self._norms.to(self.device)
        if self._unstable:
            rank_zero_warn(self._unstable)


def by_quartile(loss: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """Sum and number of the losses (B,), in total and by quartile of t: float64 (2, 1 + QUARTILES).

    Quartiles go from the cleanest to the noisiest times. Losses that are not finite are left out.
    """
    quartile = ((t - 1) * QUARTILES // num_timesteps).clamp(max=QUARTILES - 1)
    member = (quartile[:, None] == torch.arange(QUARTILES, device=t.device)).to(torch.float64)
    member = torch.cat([torch.ones_like(member[:, :1]), member], dim=1)
    finite = loss.isfinite()
    member = member * finite[:, None]
    return torch.stack([(member * torch.where(finite, loss, 0).double()[:, None]).sum(0), member.sum(0)])
