"""Counter-based random numbers: every draw is a function of a seed and counters, so there is no state to restore.

    word = splitmix64(splitmix64(splitmix64(seed) + a) + b) ...        the key of a seed and some counters
    u_i  = splitmix64(word + i golden)                              SplitMix64 (Steele et al. 2014), seeded by the key

The draw for (seed, stream, counters...) is the same on any device, in any batch, on any rank, before and after an
interruption. A rank draws only its own part. On a GPU a pair of normals costs about twelve integer operations. There is
no generator, so that the host never waits for the device. Between devices integers agree to the bit, and normals up to
the rounding of log, sin and cos.

This module knows counters. It does not know what a step, a sampler or a data set is.
"""

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """The purpose of a draw. Streams of one seed are independent. Never change a value: that would change every run."""

    TIME = 1
    NOISE = 2
    FLIP = 3
    LABEL_DROP = 4
    NETWORK = 5  # dropout, through torch's global generator
    SHARDS = 6
    SAMPLES = 7
    PRIOR = 8
    STEP = 9
    INIT = 10
    BOUND = 11
    PROBE = 12
    DEQUANTISE = 13
    HELD_OUT = 14


# ---- on the host: keys, seeds, permutations (NumPy; the same in every version of it) ----


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def key(*counters: int | np.ndarray) -> np.ndarray:
    """64-bit hash of integers or integer arrays. Arrays broadcast; returns uint64 of that shape (() for integers)."""
    with np.errstate(over="ignore"):
        word = np.uint64(0)
        for counter in counters:
            counter = np.uint64(counter & _MASK) if isinstance(counter, int) else np.asarray(counter).astype(np.uint64)
            word = _splitmix(np.asarray(word + counter))
        return word


def seed63(*counters: int) -> int:
    """The key of the counters as a non-negative int64, to seed other generators with."""
    return int(key(*counters) >> np.uint64(1))


def permutation(n: int, *counters: int) -> np.ndarray:
    """A random permutation of range(n), given by the counters: int64 (n,), the argsort of hashes."""
    return np.argsort(key(*counters, np.arange(n, dtype=np.uint64)), kind="stable")


# ---- on the device: int64 tensors that wrap around like uint64 ----


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(x: Tensor, k: int) -> Tensor:
    """Logical right shift by k bits; the shift of int64 is arithmetic."""
    return (x >> k) & ((1 << (64 - k)) - 1)


def _splitmix_(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def keys(positions: Tensor, *counters: int) -> Tensor:
    """Keys (seed, stream, ..., position) of a vector of positions: int64 (B,), on the device of the positions.

    Each equals `key(*counters, position)` to the bit, reinterpreted as int64.
    """
    return _splitmix_(positions.to(torch.int64) + _signed(int(key(*counters))))


def uniform_int(keys: Tensor, high: int) -> Tensor:
    """One integer in [0, high) per key: int64, in the shape of keys. high < 2^31; the bias is below high / 2^32."""
    return (_shift(keys, 32) * high) >> 32


def uniform(keys: Tensor) -> Tensor:
    """One float32 in [0, 1) per key, with 24 random bits."""
    return _shift(keys, 40).to(torch.float32) * 2.0**-24


def uniforms(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 in [0, 1), with 24 random bits: (B, *shape). Row b depends on keys[b] only."""
    return uniform(_words(keys, math.prod(shape))).reshape(len(keys), *shape)


def _words(keys: Tensor, count: int) -> Tensor:
    """The first `count` outputs of SplitMix64 for each key: int64 (B, count)."""
    counter = torch.arange(count, device=keys.device, dtype=torch.int64) * _signed(_GOLDEN)
    return _splitmix_(keys[:, None] + counter)


def normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal (B, *shape), by Box-Muller from 32-bit uniforms (|z| < 6.7). Row b depends on keys[b] only."""
    size = math.prod(shape)
    words = _words(keys, (size + 1) // 2)
    radius = (_shift(words, 32).to(dtype).add_(1).mul_(2.0**-32)).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFFFF).to(dtype).mul_(2 * math.pi * 2.0**-32)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]
    return z.reshape(len(keys), *shape)


class ImageNoise:
    """Noise for sampling a batch of images: a function of (seed, image number, number of the draw).

    Each call draws for the whole batch and advances the number of the draw. A sampler that draws in the same order gets
    the same numbers for image k in every batch and on every rank.
    """

    def __init__(self, seed: int, image_numbers: Tensor, stream: Stream = Stream.SAMPLES) -> None:
        self.seed, self.image_numbers, self.stream, self.draw = seed, image_numbers, stream, 0

    def __call__(self, x: Tensor) -> Tensor:
        """Standard normal noise like x, (B, ...); row b is the noise of image_numbers[b]."""
        drawn = normal(keys(self.image_numbers.to(x.device), self.seed, self.stream, self.draw), x.shape[1:], x.dtype)
        self.draw += 1
        return drawn
