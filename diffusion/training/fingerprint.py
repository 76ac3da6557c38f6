"""Fingerprints of a run: digests of what a step goes by and of what it leaves behind, to find where two runs part.

    h_i = splitmix64((i, word_i) + key),    digest = h_1 + h_2 + ...  mod 2^64

A word is 32 bits as they lie in memory. (i, word_i) -> h_i is one to one, so a change within one word always changes
the digest; changes of several cancel with a chance of 2^-64. Integers wrap alike everywhere: the same bits have the
same digest on a CPU and on a GPU. Nothing is drawn and nothing is changed: with or without them the same weights come
out.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffusion.files import append, write_atomically
from diffusion.noise import keys
from diffusion.runs.folder import OnError
from diffusion.training.ema import EMA
from diffusion.training.fingerprint_log import HEADER, line, log_path

IMAGE, PLACE, LABEL = 1, 2, 3  # keys of the parts of an image's digest


def words(rows: Tensor) -> Tensor:
    """The bits of each row, (..., n) of any dtype -> int32 (..., m); zeros fill the last word."""
    rows = rows.detach().contiguous()
    if rows.element_size() % 4:  # one or two bytes each
        rows = rows.view(torch.uint8)
        rows = torch.cat([rows, rows.new_zeros(*rows.shape[:-1], -rows.shape[-1] % 4)], dim=-1)
    return rows.view(torch.int32)


def hashed(rows: Tensor, first: int = 0) -> Tensor:
    """The digest of each row of words, int32 (..., n) -> int64 (...); `first` is the number i of their first word."""
    places = torch.arange(first, first + rows.shape[-1], dtype=torch.int64, device=rows.device) << 32
    return keys(places + (rows.to(torch.int64) & 0xFFFFFFFF)).sum(-1)


def chunks(tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[Tensor]:
    """The words of all tensors in the order of their names, small tensors together, large ones cut: int32 (n,)."""
    size = 1 << 16 if device.type == "cpu" else 1 << 22  # what fits a core's cache; what fills a GPU
    waiting: list[Tensor] = []
    for name in sorted(tensors):
        for piece in words(tensors[name].reshape(-1)).to(device).split(size):
            if sum(map(len, waiting)) + len(piece) > size:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(piece)
    if waiting:
        yield torch.cat(waiting)


def digest(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The digest of named tensors, whatever their memory format: int64 (), on the device."""
    total, first = torch.zeros((), dtype=torch.int64, device=device), 0
    for piece in chunks(tensors, device):
        total += hashed(piece, first)
        first += len(piece)
    return total


def digest_of_batch(batch: Mapping[str, Tensor]) -> Tensor:
    """The digest of images (B, C, H, W), their positions (B,) and, if there are any, labels (B,): int64 ().

    A sum over the images: that of a batch is that of its micro-batches, added.
    """
    image = hashed(words(batch["image"].flatten(1)))
    together = keys(image, IMAGE) + keys(batch["position"], PLACE)
    if "label" in batch:
        together = together + keys(batch["label"], LABEL)
    return keys(together).sum()


def state_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter, by name."""
    state = {name: optimizer.state.get(p, {}) for name, p in network.named_parameters()}
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, values in state.items()
        for key, value in values.items()
        if value is not None
    }


class Fingerprints(Callback):
    """Logs every `every` optimizer steps, on every rank, the digests of the step's batch and of the weights, their
    average and the optimizer's state after it; one read of the device each time. To be called after the average.

    Args:
        run: the run's folder. The log there ends before the step that training goes on with (`cut_after`).
        ema: the average.
        every: optimizer steps; 0 for none. on_error: what becomes of a row that cannot be written.
    """

    def __init__(self, run: Path, ema: EMA, every: int, on_error: OnError | None = None) -> None:
        self.run, self.ema, self.every, self.on_error = run, ema, every, on_error or OnError()
        self._seen, self._batch = 0, 0

    def due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen, self._path = trainer.global_step, log_path(self.run, trainer.global_rank)
        if self.every and not self._path.is_file():
            write_atomically(self._path, HEADER)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.due(trainer.global_step + 1):
            self._batch += digest_of_batch(batch)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen or not self.due(step):  # inside an accumulated step, or not one to be logged
            return
        self._seen, network = step, module.network
        average = dict(zip((name for name, _ in network.named_parameters()), self.ema.average, strict=True))
        states = network.state_dict(), average, state_of(trainer.optimizers[0], network)
        found = torch.stack([*(digest(state, module.device) for state in states), self._batch]).tolist()
        self._batch = 0
        with self.on_error:
            append(self._path, line(step, trainer.world_size, found))
