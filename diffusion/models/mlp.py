"""A small network for data that are vectors.

It takes numbers that have no neighbours, a time index (or a noise level) and a class. It knows no schedule and does not
know what its output means.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.embedding import CONDITIONING, LabelEmbedding, TimeEmbeddingKind, linear, time_embedding_of
from diffusion.models.network import Network
from diffusion.settings import Count, Multiple, Number, Positive, settings


class Block(nn.Module):
    """Residual block: norm, swish, linear, + embedding, swish, linear (initialised to "zero"), + input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = linear(width, width)
        self.project = linear(width, width)
        self.linear_2 = linear(width, width, scale=1e-10)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        x = self.linear_1(F.silu(self.norm(h))) + self.project(embedding)
        return h + self.linear_2(F.silu(x))


@settings("model")
class MLP(Network):
    """Residual network for vectors.

    x (B, C, ...), conditioning_value (B,), labels (B,) or None -> (B, out_channels, ...), the dtype of the weights.

    The rest of the package treats a vector of C numbers as an image of one pixel with C channels. Larger images are
    flattened.

    Args:
        channels: numbers per pixel; the length of the vector if image_size is 1.
        image_size: height and width in pixels; 1 for vectors.
        width: width of the hidden layers and of the embedding; a multiple of 8, at least 16.
        blocks: number of residual blocks, of two layers each.
        num_classes: 0 for an unconditional network. Otherwise labels are 0 ... num_classes - 1, and `null_label` =
            num_classes means "no class".
        out_channels: channels of the output; the default is `channels`.
        time_embedding, fourier_scale: as in `unet.UNet`.

    Raises:
        ValueError: width is not such a multiple, blocks is below 1, or time_embedding is unknown.
    """

    def __init__(
        self,
        channels: Count = 2,
        image_size: Count = 1,
        width: Annotated[int, Multiple(8, least=16)] = 128,
        blocks: Count = 3,
        num_classes: Number = 0,
        out_channels: int | None = None,
        time_embedding: TimeEmbeddingKind = "positional",
        fourier_scale: Positive = 16.0,
    ) -> None:
        super().__init__(image_size, channels, num_classes, out_channels, CONDITIONING[time_embedding])
        pixels = image_size**2
        self.time = time_embedding_of(time_embedding, width // 4, fourier_scale)
        self.label = LabelEmbedding(num_classes, width) if num_classes else None
        self.stem = linear(channels * pixels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, self.out_channels * pixels, scale=1e-10)

    def forward(self, x: Tensor, conditioning_value: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.time(conditioning_value)
        if self.label is not None:
            embedding = embedding + self.label(labels, len(x))
        embedding = F.silu(embedding)
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.head(F.silu(self.norm(h))).reshape(len(x), self.out_channels, *x.shape[2:])
