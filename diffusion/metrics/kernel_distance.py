"""KID, the kernel distance of features, by torch-fidelity's function."""

from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from diffusion.metrics.extractors import Features
from diffusion.metrics.metric import Metric
from diffusion.metrics.reference import Reference

KID_SUBSET = 1000  # images; of smaller sets all


def kid(features: Features, reference: Reference) -> dict[str, float]:
    """Squared MMD with the cubic kernel (x.y / F + 1)^3, over 100 subsets (Binkowski et al. 2018, sec. 4):
    {'kid': mean, 'kid_std': std over subsets, 'kid_subset': images in each}; the reference's are those kept."""
    size = min(KID_SUBSET, len(features.pooled), len(reference.features))
    out = kid_features_to_metric(features.pooled, reference.features, kid_subset_size=size, verbose=False)
    return {"kid": out[KEY_METRIC_KID_MEAN], "kid_std": out[KEY_METRIC_KID_STD], "kid_subset": size}


class KID(Metric):
    """`kid`."""

    title = "KID"
    higher_is_better = False
    least_images = 2  # the pairs of a side are of different images
    beside = ("kid_std", "kid_subset")
    compute = staticmethod(kid)
