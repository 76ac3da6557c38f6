"""The U-Net of DDPM (Ho et al. 2020, app. B), layer for layer, with optional class labels.

It takes images, a time index (or a noise level, as NCSN++ does) and a class. It knows no schedule and does not know
what its output means. Number of parameters: 35,746,307 for CIFAR-10, 113,673,219 and 255,677,955 for 256x256 at width
128 and 192, and 78,700,803 for CelebA 64x64. A conditional network has one more embedding row per class and one for
"no class".
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.models.embedding import (
    CONDITIONING,
    LabelEmbedding,
    TimeEmbeddingKind,
    initialised,
    linear,
    time_embedding_of,
    variance_scaling_,
)
from diffusion.models.network import Network
from diffusion.models.resolutions import check_attention, resolutions
from diffusion.settings import Between, Count, Filled, Multiple, Number, Positive, settings

NORM_GROUPS, NORM_EPS = 32, 1e-6


def conv3x3(channels_in: int, channels_out: int, scale: float = 1.0, stride: int = 1, padding: int = 1) -> nn.Module:
    return initialised(nn.Conv2d(channels_in, channels_out, 3, stride, padding), scale)


def conv1x1(channels_in: int, channels_out: int, scale: float = 1.0) -> nn.Module:
    return initialised(nn.Conv2d(channels_in, channels_out, 1), scale)


def group_norm(channels: int) -> nn.Module:
    """Group normalisation with 32 groups, as in the paper, but with at least four channels per group.

    A group of one channel would remove whatever is added to that whole channel, which is the embedding of the time and
    the label. The paper's networks have 128 channels or more, so that this limit does not change them.
    """
    return nn.GroupNorm(min(NORM_GROUPS, channels // 4), channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Residual block: norm, swish, conv, + embedding, norm, swish, dropout, conv (initialised to "zero"), + shortcut.

    The shortcut is a 1x1 convolution where the number of channels changes, else the identity.
    """

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = group_norm(channels_in)
        self.conv_1 = conv3x3(channels_in, channels_out)
        self.project = linear(embedding, channels_out)
        self.norm_2 = group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv3x3(channels_out, channels_out, scale=1e-10)
        self.shortcut = conv1x1(channels_in, channels_out) if channels_in != channels_out else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        x = self.conv_1(F.silu(self.norm_1(h)))
        x = x + self.project(embedding)[:, :, None, None]
        x = self.conv_2(self.dropout(F.silu(self.norm_2(x))))
        return self.shortcut(h) + x


class Attention(nn.Module):
    """Self-attention over all positions with a single head of all channels, added to the input.

    The paper's 1x1 convolutions are linear layers here; q, k and v are computed in one matrix product.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = linear(channels, 3 * channels)
        for weight in self.qkv.weight.data.chunk(3):  # q, k and v are initialised as three separate layers
            variance_scaling_(weight)
        self.out = linear(channels, channels, scale=1e-10)

    def forward(self, h: Tensor) -> Tensor:
        positions = self.norm(h).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(positions).unsqueeze(1).chunk(3, dim=-1)
        attended = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return h + attended.transpose(1, 2).reshape(h.shape)


class Downsample(nn.Module):
    """Convolution of stride 2, padded at the right and the bottom only (TensorFlow's SAME padding for even sizes)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2, padding=0)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2, mode="nearest"))


class Block(nn.Module):
    """A residual block, followed by attention if `attend`."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float, attend: bool) -> None:
        super().__init__()
        self.res = ResBlock(channels_in, channels_out, embedding, dropout)
        self.attention = Attention(channels_out) if attend else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.res(h, embedding))


class Level(nn.Module):
    """The blocks of one resolution, and the layer that leads to the next resolution (None for the last one)."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


@settings("model")
class UNet(Network):
    """DDPM's U-Net: x (B, C, H, W), conditioning_value (B,), labels (B,) or None -> (B, out_channels, H, W).

    The conditioning value is a time index, or the log of a noise level if `conditioning` is "noise". The output has the
    dtype of the weights.

    Args:
        image_size: height and width in pixels; must be divisible by 2 ** (number of levels - 1).
        channels: channels of the images, 3 for RGB.
        width: channels at full resolution; a multiple of 32, the number of groups of the norm.
        multipliers: factor on `width` for each level, finest level first.
        attention_resolutions: sizes in pixels at which blocks attend; each must occur in the network, as image_size /
            2 ** k. None means 16 if that size occurs, as in the paper. The middle block always attends.
        blocks_per_level: residual blocks per level on the way down; the way up has one more.
        dropout: probability of dropout in every residual block.
        num_classes: 0 for an unconditional network. Otherwise labels are 0 ... num_classes - 1, and `null_label` =
            num_classes means "no class".
        out_channels: channels of the output; the default is `channels`.
        time_embedding: "positional" embeds the time index, as in DDPM; "fourier" embeds the log of the noise level, as
            in NCSN++.
        fourier_scale: standard deviation of the frequencies of the Fourier embedding, per unit of that logarithm.
        activation_checkpointing: in training, store only the input of each block and recompute the block in the
            backward pass (Chen et al. 2016). This saves memory, costs one more forward pass, and gives the same bits.

    Raises:
        ValueError: image_size is not divisible as above, width is not a multiple of 32, an attention resolution does
            not occur, blocks_per_level is below 1, dropout is outside [0, 1), or time_embedding is unknown.
    """

    def __init__(
        self,
        image_size: Count,
        channels: Count = 3,
        width: Annotated[int, Multiple(NORM_GROUPS, ", the number of groups of the norm")] = 128,
        multipliers: Annotated[Sequence[Count], Filled("give one for each level, like [1,2,2,2]")] = (
            1,
            2,
            2,
            2,
        ),
        attention_resolutions: Sequence[Count] | None = None,
        blocks_per_level: Count = 2,
        dropout: Annotated[float, Between(0, 1, ends="[)")] = 0.0,
        num_classes: Number = 0,
        out_channels: int | None = None,
        activation_checkpointing: bool = False,
        time_embedding: TimeEmbeddingKind = "positional",
        fourier_scale: Positive = 16.0,
    ) -> None:
        if image_size % 2 ** (len(multipliers) - 1):
            raise ValueError(
                f"model.image_size={image_size} cannot be halved {len(multipliers) - 1} times, as the "
                f"{len(multipliers)} levels of model.multipliers={list(multipliers)} require. Give fewer multipliers "
                "or another image size."
            )
        if attention_resolutions is None:
            attention_resolutions = {16}.intersection(resolutions(image_size, len(multipliers)))
        check_attention(image_size, len(multipliers), attention_resolutions)
        super().__init__(image_size, channels, num_classes, out_channels, CONDITIONING[time_embedding])
        self.activation_checkpointing = activation_checkpointing
        embedding, size = 4 * width, image_size
        self.time = time_embedding_of(time_embedding, width, fourier_scale)
        self.label = LabelEmbedding(num_classes, embedding) if num_classes else None
        self.stem = conv3x3(channels, width)

        def block(channels_in: int, channels_out: int) -> Block:
            return Block(channels_in, channels_out, embedding, dropout, attend=size in attention_resolutions)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        h, skips = width, [width]
        for level, multiplier in enumerate(multipliers):
            blocks = []
            for _ in range(blocks_per_level):
                blocks.append(block(h, width * multiplier))
                h = width * multiplier
                skips.append(h)
            last = level == len(multipliers) - 1
            self.down.append(Level(blocks, None if last else Downsample(h)))
            if not last:
                skips.append(h)
                size //= 2
        self.middle_1 = Block(h, h, embedding, dropout, attend=True)
        self.middle_2 = Block(h, h, embedding, dropout, attend=False)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            blocks = []
            for _ in range(blocks_per_level + 1):
                blocks.append(block(h + skips.pop(), width * multiplier))
                h = width * multiplier
            self.up.append(Level(blocks, Upsample(h) if level else None))
            size *= 2
        self.norm = group_norm(h)
        self.head = conv3x3(h, self.out_channels, scale=1e-10)

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """part(*inputs). With activation checkpointing only the inputs are kept until the backward pass."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)  # dropout repeats its draws when recomputed
        return part(*inputs)

    def forward(self, x: Tensor, conditioning_value: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.time(conditioning_value)
        if self.label is not None:
            embedding = embedding + self.label(labels, len(x))
        embedding = F.silu(embedding)

        h = self.stem(x)
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = self._run(block, h, embedding)
                skips.append(h)
            if level.resample is not None:
                h = self._run(level.resample, h)
                skips.append(h)
        h = self._run(self.middle_1, h, embedding)
        h = self._run(self.middle_2, h, embedding)
        for level in self.up:
            for block in level.blocks:
                h = self._run(partial(joined, block), h, skips.pop(), embedding)
            if level.resample is not None:
                h = self._run(level.resample, h)
        return self.head(F.silu(self.norm(h)))


def joined(block: Block, h: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
    """A block on the way up, applied to the features from below and the skip connection, joined along the channels."""
    return block(torch.cat([h, skip], dim=1), embedding)
