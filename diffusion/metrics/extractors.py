"""From images to features and class scores, by one network for all metrics. Its name stands beside every score.

A network is any torch module: uint8 (B, C, H, W) -> (features (B, F), logits (B, K)). Who builds the digit classifier
is not known here; Inception is torch-fidelity's, with the weights of 2015 and TensorFlow's resize.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 64  # images at a time, by index: features do not depend on how the images were batched
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Features(NamedTuple):
    """Of N images, in their order, on the CPU: pooled features (N, F) and logits (N, K), float32."""

    pooled: Tensor
    logits: Tensor


class Extractor:
    """A named network with the kind of image it takes.

    Args:
        name: `inception` or another; scores of another are named after it (digits-FID).
        network: uint8 (B, C, H, W) -> (features, logits).
        channels: that it takes.
        image_size: that it takes; None for any.
        digest: of its weights.
    """

    def __init__(self, name: str, network: nn.Module, channels: int, image_size: int | None, digest: str) -> None:
        self.name, self.network, self.digest = name, network.eval().requires_grad_(False), digest
        self.channels, self.image_size = channels, image_size

    def title(self, metric: str) -> str:
        """FID, IS with Inception; digits-FID, digits-IS with the digit classifier."""
        return metric.upper() if self.name == "inception" else f"{self.name}-{metric.upper()}"

    def check(self, channels: int, image_size: int) -> None:
        """ValueError if images of this kind cannot be scored by it."""
        if channels != self.channels or (self.image_size and image_size != self.image_size):
            size = f"{self.image_size}x{self.image_size}" if self.image_size else "any size"
            raise ValueError(
                f"extractor={self.name} takes {self.channels}-channel images of {size}; these have {channels} "
                f"channel(s) and {image_size}x{image_size} pixels."
            )

    @torch.no_grad()
    def __call__(self, images: Iterable[Tensor]) -> Features:
        """Batches of uint8 (B, C, H, W), in order and of any size -> the features of all; only features are kept."""
        device = next(self.network.parameters()).device
        pooled, logits = [], []
        for chunk in rechunked(images, CHUNK):
            self.check(chunk.shape[1], chunk.shape[-1])
            p, g = self.network(chunk.to(device))
            pooled.append(p.float().cpu())
            logits.append(g.float().cpu())
        if not pooled:
            raise ValueError("There are no images to score.")
        return Features(torch.cat(pooled), torch.cat(logits))


def rechunked(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in the same order, `size` at a time; the last chunk may be smaller."""
    held: list[Tensor] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        while count >= size:
            joined = torch.cat(held)
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if count:
        yield torch.cat(held)


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
    return Extractor("inception", _Inception(path), channels=3, image_size=None, digest=digest)
