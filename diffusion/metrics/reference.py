"""What scores are held against: the features of real images, computed once and kept in a file that says of what.

A file is used only if everything that decides its content is what was asked for: the data set and split, the extractor
and its weights, the kind of image. Knows no data set: whoever asks names it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffusion.files import replacing
from diffusion.metrics.moments import Moments, frechet

KEPT = 50_000  # images whose features are kept one by one, spread evenly over the set; FID is of all images
DRAWS = 5  # of real images, for the sampling error


class Floor(NamedTuple):
    """FID between real images: what a perfect model could reach with so many images, and how far chance moves it."""

    value: float
    std: float
    images: int


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them.

    moments: of all of them. features: (K, F) float32 of those kept. numbers: int64 (K,), which ones, rising. labels:
    int64 (K,), or None where there are none.
    """

    moments: Moments
    features: Tensor
    numbers: Tensor
    labels: Tensor | None
    _floors: dict[int, Floor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of the moments."""
        return _digest({"total": self.moments.total, "products": self.moments.products})

    def floor(self, number: int) -> Floor | None:
        """FID of `number` real images, at most half of those kept, against the others kept: its mean and standard
        deviation over DRAWS draws. None if there are too few."""
        kept = len(self.features)
        number = min(number, kept // 2)
        if number < 2:
            return None
        if number not in self._floors:
            found = torch.empty(DRAWS, dtype=torch.float64)
            for draw in range(DRAWS):
                order = torch.randperm(kept, generator=torch.Generator().manual_seed(draw))
                ours, others = self.features[order[:number]], self.features[order[number:]]
                found[draw] = frechet(Moments.of(ours), Moments.of(others))
            self._floors[number] = Floor(float(found.mean()), float(found.std()), number)
        return self._floors[number]


def kept_numbers(count: int, most: int = KEPT) -> Tensor:
    """Numbers of at most `most` of `count` images, spread evenly, int64, rising."""
    number = min(count, most)
    return torch.arange(number) * count // max(number, 1)


def path_of(folder: Path, about: Mapping[str, Any]) -> Path:
    """The file for what `about` says, which is JSON."""
    name = f"reference_{about['extractor']}_{about['split']}"
    return folder / f"{name}_{hashlib.sha256(_text(about).encode()).hexdigest()[:16]}.safetensors"


def store(path: Path, about: Mapping[str, Any], reference: Reference) -> None:
    """Write it, whole or not at all. OSError if it cannot be written."""
    arrays = {"total": reference.moments.total, "products": reference.moments.products}
    arrays |= {"features": reference.features, "numbers": reference.numbers}
    if reference.labels is not None:
        arrays["labels"] = reference.labels
    arrays = {name: array.contiguous() for name, array in arrays.items()}
    notes = {"about": _text(about), "count": str(reference.moments.count), "sha256": _digest(arrays)}
    with replacing(path) as file:
        file.write(save(arrays, metadata=notes))


def size_in_file(reference: Reference) -> int:
    """Bytes that `store` writes, about."""
    moments = reference.moments
    arrays = (moments.total, moments.products, reference.features, reference.numbers, reference.labels)
    return sum(array.nbytes for array in arrays if array is not None)


def stored(path: Path, about: Mapping[str, Any]) -> Reference | None:
    """What was written for just this; None if there is nothing, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if notes.get("about") != _text(about) or notes.get("sha256") != _digest(arrays):
            return None
        moments = Moments(int(notes["count"]), arrays["total"], arrays["products"])
        return Reference(moments, arrays["features"], arrays["numbers"], arrays.get("labels"))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _digest(arrays: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(memoryview(arrays[name].flatten().view(torch.uint8).numpy()))
    return found.hexdigest()
