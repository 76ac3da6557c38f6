"""One training step: noise the images, ask the network, weigh the error. The host never waits for the device.

    x_t = alpha_t x_0 + sigma_t epsilon,   t drawn by `levels`,   loss = objective(network(x_t, t), ...)

Everything random is keyed by an image's position in the endless stream, which is (step, place in the global batch):
it depends on no rank, no worker, no micro-batch and no interruption.
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
    """What is done with a gradient beside the optimizer's step.

    Args:
        gradient_clip: largest global norm of the gradient; 0: none.
    """

    gradient_clip: Annotated[float, AtLeast(0)] = 1.0


class DiffusionModule(pl.LightningModule):
    """Holds the network and what is asked of it.

    Args:
        denoiser: the network with its schedule and what it predicts.
        objective: its loss per image, of all channels that the network answers with.
        optimizer: parameters -> optimizer.
        levels: which noise level each image gets; None: all alike.
        lr_schedule: share of the learning rate by the number of the optimizer step, counted from 0.
        descent: clipping.
        flip: mirror each image with probability 1/2.
        seed: of all draws.
        memory_format: of images and activations.
        record: what the run is recorded as; stored in every checkpoint.
        skip_not_finite: leave out the optimizer's step where the gradient is not finite; the host waits for the device
            in every step to know it.
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
            raise ValueError(f"objective.label_dropout={hidden} needs a conditional network: model.num_classes is 0.")
        self.levels = levels or Uniform(denoiser.schedule)
        if objective.variance is not None and not self.levels.whole:
            raise ValueError(
                "levels: this law draws real times, and the loss of objective=bound and hybrid is defined at integer "
                "times only. Give levels=uniform."
            )
        self.levels.weight_at(torch.ones(1), objective)
        self.network = denoiser.network
        self._denoiser, self._objective, self._optimizer = (denoiser,), objective, optimizer  # in a tuple: no submodule
        self.lr_schedule, self.rate = lr_schedule or Constant(), 0.0  # the latter: that the last step used
        self.descent, self.label_dropout = descent or Descent(), objective.label_dropout
        self.flip, self.seed, self.memory_format, self.record = flip, seed, memory_format, record
        self.skip_not_finite, self._unstable = skip_not_finite, objective.unstable
        self.num_timesteps = denoiser.schedule.num_timesteps
        self._sums: Tensor | None = None  # (2, 2 + QUARTILES), sum and count: loss, by quartile of t, stand-ins
        self._norms: Tensor | None = None  # (2,): gradient norms and their count
        self._draws: list[dict[str, Tensor]] = []  # of the micro-batches since the last step
        self._norm: Tensor | None = None  # of the last step
        self.skipped = False  # whether the last step left the weights as they were

    @property
    def denoiser(self) -> NetworkDenoiser:
        return self._denoiser[0]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self._optimizer(self.network.parameters())
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_schedule(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ramp, "interval": "step"}}

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Dropout draws from torch's own generator: seeded anew for each micro-batch, so that it need not be saved."""
        micro_step = self.trainer.global_step * self.trainer.accumulate_grad_batches
        micro_step += batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(seed63(self.seed, Stream.NETWORK, micro_step, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a micro-batch: image uint8 (B, C, H, W), position (B,), label (B,) where there are any."""
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
        """The weighted loss of each image (B,): x0 and epsilon (B, C, H, W), t (B,), labels (B,) or None."""
        x_t = noised(self.denoiser.schedule, x0, t, epsilon)
        loss = self._objective(self.denoiser.output(x_t, t, labels), x_t, x0, epsilon, t)
        weight = self.levels.weight_at(t, self._objective)
        return loss if weight is None else loss * weight.to(loss.dtype)

    def hidden_labels(self, labels: Tensor | None, position: Tensor) -> Tensor | None:
        """The labels the network sees: none for an unconditional one, `null_label` for the dropped share."""
        null = self.network.null_label
        if null is None or labels is None:
            return None
        if not self.label_dropout:
            return labels
        dropped = uniform(keys(position, self.seed, Stream.LABEL_DROP)) < self.label_dropout
        return torch.where(dropped, torch.full_like(labels, null), labels)

    # ---- what is reported: added up on the device, fetched by the meter every `log_every` steps ----

    @torch.no_grad()
    def count(self, loss: Tensor, t: Tensor, stand_in: Tensor | None = None) -> None:
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
                p.grad = None  # which leaves weight, average and moments as they are
        new = torch.stack([torch.where(finite, self._norm, 0).double(), finite.double()])
        self._norms = new if self._norms is None else self._norms.add_(new)

    def last_step(self) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Of the step just made: the norm of its gradient over all ranks, and position, t and loss of its images, by
        micro-batch, on the device. To be asked for once a step."""
        draws, self._draws = self._draws, []
        return self._norm, draws

    def take_counts(self) -> Tensor | None:
        """The sums since the last call, (2, 3 + QUARTILES) on the device: rows value and count; columns loss, its
        quartiles of t from the cleanest to the noisiest, images in the place of bad ones (count 0 where these are an
        error), gradient norm. None before the first step."""
        if self._sums is None or self._norms is None:
            return None
        counts = torch.cat([self._sums, self._norms[:, None]], dim=1)
        self._sums = self._norms = None
        return counts

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = {} if self.record is None else self.record.plain()
        counts = {"sums": self._sums, "norms": self._norms}
        if self.trainer.world_size > 1:  # of all ranks; given back to the first
            strategy = self.trainer.strategy
            counts = {k: v if v is None else strategy.reduce(v.clone(), reduce_op="sum") for k, v in counts.items()}
        checkpoint["counts"] = counts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self._sums, self._norms = checkpoint["counts"]["sums"], checkpoint["counts"]["norms"]

    def on_train_start(self) -> None:
        """A run may be resumed with another number of micro-batches a step, which Lightning's own count does not know:
        it would cut the first step short."""
        loop = self.trainer.fit_loop.epoch_loop
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        loop.batch_progress.current.ready = loop.batch_progress.current.started = done
        loop.batch_progress.current.processed = done
        # saved before its batch counted as completed, which Lightning makes up for when the loop begins
        loop.batch_progress.current.completed = done - loop.restarted_on_train_batch_end
        if self._sums is not None:
            self._sums, self._norms = self._sums.to(self.device), self._norms.to(self.device)
        if self._unstable:
            rank_zero_warn(self._unstable)


def by_quartile(loss: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """Sums of losses (B,), and how many there are, float64 (2, 1 + QUARTILES): of all, and by quartile of their times t
    from the cleanest to the noisiest. Losses that are not finite are left out."""
    quartile = ((t - 1) * QUARTILES // num_timesteps).clamp(max=QUARTILES - 1)
    member = (quartile[:, None] == torch.arange(QUARTILES, device=t.device)).to(torch.float64)
    member = torch.cat([torch.ones_like(member[:, :1]), member], dim=1)
    finite = loss.isfinite()
    member = member * finite[:, None]
    return torch.stack([(member * torch.where(finite, loss, 0).double()[:, None]).sum(0), member.sum(0)])
