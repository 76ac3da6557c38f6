"""FID, the Frechet distance of features, by torchmetrics' formula; also class by class."""

from collections.abc import Callable

from torch import Tensor

from diffusion.metrics.extractors import Features
from diffusion.metrics.metric import Metric, Values
from diffusion.metrics.moments import Moments, frechet
from diffusion.metrics.reference import Reference


def fid(features: Features, reference: Reference) -> dict[str, float]:
    """Frechet distance of two Gaussians fitted to features (Heusel et al. 2017): {'fid': value}; 0 is the best."""
    return {"fid": frechet(Moments.of(features.pooled), reference.moments)}


class FID(Metric):
    """`fid`."""

    title = "FID"
    higher_is_better = False
    least_images = 2  # a covariance is of two
    compute = staticmethod(fid)

    def real(self, reference: Reference, number: int) -> Values:
        floor = reference.floor(number)
        if floor is None:
            return {}
        return {"real_value": floor.value, "real_std": floor.std, "real_images": floor.images}

    def by_class(
        self, features: Features, labels: Tensor, reference: Reference, working: Callable[[], None]
    ) -> list[float | None] | None:
        return fid_by_class(features, labels, reference, working) if reference.labels is not None else None


def fid_by_class(
    features: Features, labels: Tensor, reference: Reference, working: Callable[[], None] = lambda: None
) -> list[float | None]:
    """FID of the images of each class against the (kept) real ones of that class; None for a class with too few.

    working: called for each class, which takes seconds.
    """
    assert reference.labels is not None
    found: list[float | None] = []
    for label in range(int(max(labels.max(), reference.labels.max())) + 1):
        working()
        ours, theirs = features.pooled[labels == label], reference.features[reference.labels == label]
        enough = min(len(ours), len(theirs)) >= FID.least_images
        found.append(frechet(Moments.of(ours), Moments.of(theirs)) if enough else None)
    return found
