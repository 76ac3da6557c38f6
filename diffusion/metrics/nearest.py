"""How near images come to the training set, and which real ones are nearest."""

import torch
from torch import Tensor

from diffusion.metrics.extractors import Features
from diffusion.metrics.metric import Metric
from diffusion.metrics.reference import Reference

NEAREST_OF = 1000  # images whose nearest neighbours are looked up, at most


def nearest(features: Features, reference: Reference) -> dict[str, float]:
    """How far the images stay from the training set: {'nearest': ratio}, the median distance of an image to the nearest
    real one (of those kept), over that of a real image to the nearest other; 1 for new images of the same
    distribution, 0 for copies. Of at most 1,000 images on each side."""
    ours, _ = neighbours(features.pooled[:NEAREST_OF], reference, 1)
    rows = torch.arange(min(NEAREST_OF, len(reference.features)))
    rows = rows * len(reference.features) // len(rows)
    theirs, _ = neighbours(reference.features[rows], reference, 2)  # the first is the image itself
    return {"nearest": float(ours[:, 0].median() / theirs[:, 1].median().clamp(min=1e-12))}


class Nearest(Metric):
    """`nearest`."""

    title = "nearest"
    least_real = 2  # one, and the nearest other
    compute = staticmethod(nearest)


def neighbours(features: Tensor, reference: Reference, count: int) -> tuple[Tensor, Tensor]:
    """(distances, rows of reference.features) of the `count` nearest to each of (N, F): (N, count) both, in order."""
    count = min(count, len(reference.features))
    found = [
        torch.cdist(part.double(), reference.features.double()).topk(count, largest=False)
        for part in features.split(250)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
