"""From features to figures: FID by torchmetrics, IS, KID, precision and recall by torch-fidelity's own functions, and
how near the images come to the training set. Knows no image and no network.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from diffusion.metrics.extractors import Features
from diffusion.metrics.moments import Moments, frechet
from diffusion.metrics.reference import Reference

MIN_IMAGES = 2
KID_SUBSET = 1000  # images; of smaller sets all
NEIGHBOURHOOD = 3  # of precision and recall: the distance to the third nearest is a radius
NEAREST_OF = 1000  # images whose nearest neighbours are looked up, at most


def fid(features: Features, reference: Reference) -> dict[str, float]:
    """Frechet distance of two Gaussians fitted to features (Heusel et al. 2017): {'fid': value}; 0 is the best.

    Raises:
        ValueError: fewer than two images on a side.
    """
    _enough("FID", MIN_IMAGES, features, reference)
    return {"fid": frechet(Moments.of(features.pooled), reference.moments)}


def inception_score(features: Features, reference: Reference | None = None, splits: int = 10) -> dict[str, float]:
    """exp(mean KL(p(y|x) || p(y))) over 10 splits (Salimans et al. 2016): {'is': mean, 'is_std': std}.

    Raises:
        ValueError: fewer images than splits.
    """
    if len(features.logits) < splits:
        raise ValueError(f"IS of {len(features.logits)} image(s): {splits} splits need at least {splits}.")
    out = isc_features_to_metric(features.logits, splits)
    return {"is": out[KEY_METRIC_ISC_MEAN], "is_std": out[KEY_METRIC_ISC_STD]}


def kid(features: Features, reference: Reference) -> dict[str, float]:
    """Squared MMD with the cubic kernel (x.y / F + 1)^3, over 100 subsets (Binkowski et al. 2018, sec. 4):
    {'kid': mean, 'kid_std': std over subsets, 'kid_subset': images in each}; the reference's are those kept.

    Raises:
        ValueError: fewer than two images on a side.
    """
    _enough("KID", MIN_IMAGES, features, reference)
    size = min(KID_SUBSET, len(features.pooled), len(reference.features))
    out = kid_features_to_metric(features.pooled, reference.features, kid_subset_size=size, verbose=False)
    return {"kid": out[KEY_METRIC_KID_MEAN], "kid_std": out[KEY_METRIC_KID_STD], "kid_subset": size}


def precision_recall(features: Features, reference: Reference) -> dict[str, float]:
    """Shares of the images within the third-neighbour balls of real ones, and of real ones (those kept) within those of
    the images (Kynkaanniemi et al. 2019, sec. 2): {'precision': share, 'recall': share}.

    Raises:
        ValueError: fewer than four images on a side.
    """
    _enough("precision and recall", NEIGHBOURHOOD + 1, features, reference)
    out = prc_features_to_metric(
        features.pooled, reference.features, prc_neighborhood=NEIGHBOURHOOD, save_cpu_ram=True, verbose=False
    )
    return {"precision": out[KEY_METRIC_PRECISION], "recall": out[KEY_METRIC_RECALL]}


def nearest(features: Features, reference: Reference) -> dict[str, float]:
    """How far the images stay from the training set: {'nearest': ratio}, the median distance of an image to the nearest
    real one (of those kept), over that of a real image to the nearest other; 1 for new images of the same
    distribution, 0 for copies. Of at most 1,000 images on each side.

    Raises:
        ValueError: fewer than two real images.
    """
    _enough("nearest", 1, features)
    _enough("nearest", MIN_IMAGES, reference)
    ours, _ = neighbours(features.pooled[:NEAREST_OF], reference, 1)
    rows = torch.arange(min(NEAREST_OF, len(reference.features)))
    rows = rows * len(reference.features) // len(rows)
    theirs, _ = neighbours(reference.features[rows], reference, 2)  # the first is the image itself
    return {"nearest": float(ours[:, 0].median() / theirs[:, 1].median().clamp(min=1e-12))}


def neighbours(features: Tensor, reference: Reference, count: int) -> tuple[Tensor, Tensor]:
    """(distances, rows of reference.features) of the `count` nearest to each of (N, F): (N, count) both, in order."""
    count = min(count, len(reference.features))
    found = [
        torch.cdist(part.double(), reference.features.double()).topk(count, largest=False)
        for part in features.split(250)
    ]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


METRICS: dict[str, Callable[[Features, Reference], dict[str, float]]] = {
    "fid": fid, "is": inception_score, "kid": kid, "precision": precision_recall, "recall": precision_recall,
    "nearest": nearest,
}  # fmt: skip
BESIDE = {"is": ("is_std",), "kid": ("kid_std", "kid_subset")}  # what else is said of a metric


def scores(names: Sequence[str], features: Features, reference: Reference) -> dict[str, dict[str, float]]:
    """{name: {name: value, and what is beside it}} for these names out of METRICS."""
    made: dict[Callable, dict[str, float]] = {}
    for name in names:
        if METRICS[name] not in made:
            made[METRICS[name]] = METRICS[name](features, reference)
    return {name: {key: made[METRICS[name]][key] for key in (name, *BESIDE.get(name, ()))} for name in names}


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
        enough = min(len(ours), len(theirs)) >= MIN_IMAGES
        found.append(frechet(Moments.of(ours), Moments.of(theirs)) if enough else None)
    return found


def _enough(what: str, least: int, *sides: Features | Reference) -> None:
    for side in sides:
        number = len(side.pooled) if isinstance(side, Features) else side.moments.count
        if number < least:
            raise ValueError(f"{what} of {number} image(s): at least {least} are needed on each side.")
