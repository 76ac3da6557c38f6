"""Code of a user's own, in no package: a small vision transformer for diffusion (Peebles & Xie 2023), a callback, a
logger."""

import json
from pathlib import Path

import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from diffusion.models.network import Network


class Block(nn.Module):
    """Attention and a perceptron, both modulated by the noise level and the class."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale_1, shift_1, scale_2, shift_2 = self.modulation(condition)[:, None].chunk(4, dim=-1)
        y = self.norms[0](x) * (1 + scale_1) + shift_1
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x) * (1 + scale_2) + shift_2)


class DiT(Network):
    """Args: width: of a token. depth: blocks. patch: side of a patch in pixels. head: the last layers; None: linear."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        out_channels: int | None = None,
        width: int = 16,
        depth: int = 1,
        patch: int = 2,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__(image_size, channels, num_classes, out_channels)
        self.patch, side = patch, image_size // patch
        self.embed = nn.Conv2d(channels, width, patch, patch)
        position = torch.linspace(-1, 1, side**2)[:, None] * torch.arange(1, width + 1)
        self.register_buffer("position", position.sin(), persistent=False)  # is in no checkpoint
        self.time = nn.Sequential(nn.Linear(1, width), activation or nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads=2) for _ in range(depth))
        self.out = nn.Linear(width, self.out_channels * patch**2)

    def forward(self, x: Tensor, level: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = self.time(level[:, None] / 1000)
        if labels is not None:
            condition = condition + self.label(labels)
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        side = self.image_size // self.patch
        pixels = self.out(tokens).view(len(x), side, side, self.out_channels, self.patch, self.patch)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(len(x), self.out_channels, *x.shape[2:])


class Swish(nn.Module):
    """A part of a network that a configuration names."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def write_canary(path: str = "canary", **_: object) -> None:
    """A function that no checkpoint may have called."""
    with open(path, "w") as file:
        file.write("called")


class Steps(Callback):
    """Counts the steps, keeps their number in the checkpoint and writes it to the file `path`."""

    def __init__(self, path: str, every: int = 1) -> None:
        self.path, self.every, self.seen = Path(path), every, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen += 1

    def on_train_end(self, trainer, module) -> None:
        self.path.write_text(json.dumps({"seen": self.seen, "every": self.every}))

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]


class Rows(CSVLogger):
    """A logger that fails at a row. Args: fail_at: the step of it; None: never."""

    def __init__(self, save_dir: str, fail_at: int | None = None) -> None:
        super().__init__(save_dir, name="own", version=0)
        self.fail_at = fail_at

    def log_metrics(self, metrics, step=None) -> None:
        if self.fail_at is not None and step >= self.fail_at:
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)
