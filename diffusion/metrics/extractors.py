"""From images to features and class scores, by one network for all metrics. Its name stands beside every score.

A network is any torch module: uint8 (B, C, H, W) -> (features (B, F), logits (B, K)). Who builds the digit classifier
is not known here; Inception is torch-fidelity's, with the weights of 2015 and TensorFlow's resize.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.metrics.takes import INCEPTION, Takes

CHUNK = 64  # images that go through the network at a time
TRIED = 2  # images that it is tried on
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Features(NamedTuple):
    """Of N images, in their order, on the CPU: pooled features (N, F) and logits (N, K), float32."""

    pooled: Tensor
    logits: Tensor

    @classmethod
    def joined(cls, parts: Iterable["Features"]) -> "Features":
        """Those of several sets of images, one after the other; ValueError for none."""
        pooled, logits = [], []
        for part in parts:
            pooled.append(part.pooled)
            logits.append(part.logits)
        if not pooled:
            raise ValueError("There are no images to score.")
        return cls(torch.cat(pooled), torch.cat(logits))


class Extractor:
    """A named network with the kind of image it takes.

    Args:
        name: `inception` or another; scores of another are named after it (digits-FID).
        network: uint8 (B, C, H, W) -> (features, logits).
        takes: which images.
        digest: of its weights.
    """

    def __init__(self, name: str, network: nn.Module, takes: Takes, digest: str) -> None:
        self.name, self.network, self.digest = name, network.eval().requires_grad_(False), digest
        self.takes = takes

    @property
    def channels(self) -> int:
        return self.takes.channels

    def title(self, metric: str) -> str:
        """FID, precision with Inception; digits-FID, digits-precision with the digit classifier."""
        return metric if self.name == "inception" else f"{self.name}-{metric}"

    def check(self, channels: int, image_size: int) -> None:
        """ValueError if images of this kind cannot be scored by it."""
        if self.takes.unfit(channels=channels, image_size=image_size):
            raise ValueError(
                f"extractor={self.name} takes {self.takes}; these have {channels} channel(s) and "
                f"{image_size}x{image_size} pixels."
            )

    @torch.no_grad()
    def rows(self, images: Tensor, first: int) -> Features:
        """Features of the images number first, first + 1, ...: uint8 (B, C, H, W), B > 0.

        Each is a function of the image and its number alone: image n goes through the network in row n % 64 of a batch
        of 64, zeros in the rows of others. How images were batched before, and on which rank, changes no bit.

        Raises:
            ValueError: images of another kind than the extractor takes, or features that are not finite.
        """
        self.check(images.shape[1], images.shape[-1])
        device = next(self.network.parameters()).device
        parts, done = [], 0
        with full_precision():
            while done < len(images):
                row = (first + done) % CHUNK
                part = images[done : done + CHUNK - row]
                batch = torch.zeros(CHUNK, *images.shape[1:], dtype=torch.uint8)
                batch[row : row + len(part)] = part
                pooled, logits = self._checked(self.network(batch.to(device)), CHUNK)
                rows = slice(row, row + len(part))
                parts.append(Features(pooled[rows].float().cpu(), logits[rows].float().cpu()))
                done += len(part)
        features = Features.joined(parts)
        if not (features.pooled.isfinite().all() and features.logits.isfinite().all()):
            raise ValueError(f"extractor={self.name} gives features that are not finite: its weights are no good.")
        return features

    @torch.no_grad()
    def try_out(self, channels: int, image_size: int) -> int:
        """The number of classes that it tells apart; ValueError unless two images of this kind give features and
        logits."""
        self.check(channels, image_size)
        device = next(self.network.parameters()).device
        shape, generator = (TRIED, channels, image_size, image_size), torch.Generator().manual_seed(0)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        try:
            found = self.network(images.to(device))
        except Exception as error:  # of a module of the user's own, which may raise anything
            raise ValueError(
                f"extractor={self.name} fails on images {tuple(images.shape)}, uint8: {type(error).__name__}: {error}"
            ) from error
        pooled, logits = self._checked(found, TRIED)
        if not (pooled.isfinite().all() and logits.isfinite().all()):
            raise ValueError(f"extractor={self.name} gives features that are not finite: its weights are no good.")
        return logits.shape[1]

    def _checked(self, out: Any, number: int) -> tuple[Tensor, Tensor]:
        """What the network gave for so many images, if it is what is asked of one."""
        fits = isinstance(out, tuple | list) and len(out) == 2 and all(isinstance(part, Tensor) for part in out)
        if not fits or any(part.ndim != 2 or len(part) != number or not part.shape[1] for part in out):
            found = [tuple(part.shape) for part in out] if fits else type(out).__name__
            raise ValueError(
                f"extractor={self.name} gives {found} for {number} images, expected (features (B, F), logits (B, K))."
            )
        return out[0], out[1]

    def __call__(self, images: Iterable[Tensor]) -> Features:
        """Batches of uint8 (B, C, H, W), in order and of any size -> the features of all; only features are kept."""
        return Features.joined(self._all(images))

    def _all(self, images: Iterable[Tensor]) -> Iterator[Features]:
        first = 0
        for batch in images:
            yield self.rows(batch, first)
            first += len(batch)


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 also where the GPU would round their inputs to TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def verified(path: Path, sha256: str | None, key: str = "extractor.weights") -> str:
    """The sha256 of a weights file, refused before it is opened if it is not the expected one."""
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 and found != sha256:
        raise ValueError(
            f"{key}={path} has sha256 {found}, expected {sha256}: it is another file or damaged. "
            f"If it is meant, give extractor.sha256={found}"
        )
    return found


def inception_path(weights: str | None) -> Path:
    """Where Inception's weights are to be: the given path, or torch's hub cache."""
    return Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


class _Inception(nn.Module):
    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.inner = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(images)


def inception(weights: str | None = None, sha256: str | None = None) -> Extractor:
    """Inception of 2015 as torch-fidelity ported it.

    Raises:
        ValueError: the weights are absent, or their digest is not the expected one; it is checked before they are read.
    """
    path = inception_path(weights)
    if not path.is_file():
        raise ValueError(
            f"extractor=inception: there are no weights at {path}. Download {INCEPTION_URL} (sha256 {sha256}) to that "
            f"place, or give extractor.weights=PATH; callbacks=none trains without scores."
        )
    digest = verified(path, sha256)
    return Extractor("inception", _Inception(path), INCEPTION, digest)
