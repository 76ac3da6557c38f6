"""Fingerprints of a run: digests of the batch and of the state after each step, to find where two runs differ.

    h_i = splitmix64((i, word_i) + key),    digest = h_1 + h_2 + ...  mod 2^64

A word is 32 bits of memory. (i, word_i) -> h_i is one to one, so that a change in one word always changes the digest;
changes in several words cancel with probability 2^-64. Integers wrap around in the same way on every device, so that
the same bits have the same digest on a CPU and on a GPU. Fingerprints draw no random numbers and change nothing: the
weights are the same with and without them.
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

IMAGE, PLACE, LABEL = 1, 2, 3  # keys of the parts of the digest of an image


def words(rows: Tensor) -> Tensor:
    """The bits of each row as words: (..., n) of any dtype -> int32 (..., m). The last word is padded with zeros."""
    rows = rows.detach().contiguous()
    if rows.element_size() % 4:  # one or two bytes each
        rows = rows.view(torch.uint8)
        rows = torch.cat([rows, rows.new_zeros(*rows.shape[:-1], -rows.shape[-1] % 4)], dim=-1)
    return rows.view(torch.int32)


def hashed(rows: Tensor, first: int = 0) -> Tensor:
    """The digest of each row of words: int32 (..., n) -> int64 (...). `first` is the number i of the first word."""
    places = torch.arange(first, first + rows.shape[-1], dtype=torch.int64, device=rows.device) << 32
    return keys(places + (rows.to(torch.int64) & 0xFFFFFFFF)).sum(-1)


def chunks(tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[Tensor]:
    """The words of all tensors, in the order of their names, in chunks int32 (n,).

    Small tensors share a chunk; large tensors are split.
    """
    size = 1 << 16 if device.type == "cpu" else 1 << 22  # fits the cache of a core; occupies a whole GPU
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
    """The digest of named tensors, independent of their memory format: int64 (), on the device."""
    total, first = torch.zeros((), dtype=torch.int64, device=device), 0
    for piece in chunks(tensors, device):
        total += hashed(piece, first)
        first += len(piece)
    return total


def digest_of_batch(batch: Mapping[str, Tensor]) -> Tensor:
    """The digest of images (B, C, H, W), their positions (B,) and, if present, labels (B,): int64 ().

    It is a sum over the images, so that the digests of micro-batches add up to that of the batch.
    """
    image = hashed(words(batch["image"].flatten(1)))
    together = keys(image, IMAGE) + keys(batch["position"], PLACE)
    if "label" in batch:
        together = together + keys(batch["label"], LABEL)
    return keys(together).sum()


def state_of(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The state of the optimizer for each parameter, by name."""
    state = {name: optimizer.state.get(p, {}) for name, p in network.named_parameters()}
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, values in state.items()
        for key, value in values.items()
        if value is not None
    }


class Fingerprints(Callback):
    """Logs digests every `every` optimizer steps, on every rank.

    Digests are of the batch, and of the weights, their average and the optimizer state after the step. Each row reads
    from the device once. This callback must come after the EMA.

    Args:
        run: the run folder. Its log must end before the step from which training resumes (`cut_after`).
        ema: the averaged weights.
        every: optimizer steps between two rows; 0 means no log.
        on_error: what happens if a row cannot be written.
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
        if step == self._seen or not self.due(step):  # not the last micro-batch of the step, or not a step to log
            return
        self._seen, network = step, module.network
        average = dict(zip((name for name, _ in network.named_parameters()), self.ema.average, strict=True))
        states = network.state_dict(), average, state_of(trainer.optimizers[0], network)
        found = torch.stack([*(digest(state, module.device) for state in states), self._batch]).tolist()
        self._batch = 0
        with self.on_error:
            append(self._path, line(step, trainer.world_size, found))
