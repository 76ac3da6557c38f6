"""The Inception score, by torch-fidelity's function."""

from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from diffusion.metrics.extractors import Features
from diffusion.metrics.metric import Metric
from diffusion.metrics.reference import Reference

SPLITS = 10


def inception_score(features: Features, reference: Reference | None = None) -> dict[str, float]:
    """exp(mean KL(p(y|x) || p(y))) over 10 splits (Salimans et al. 2016): {'is': mean, 'is_std': std}."""
    out = isc_features_to_metric(features.logits, SPLITS)
    return {"is": out[KEY_METRIC_ISC_MEAN], "is_std": out[KEY_METRIC_ISC_STD]}


class InceptionScore(Metric):
    """`inception_score`."""

    title = "IS"
    higher_is_better = True
    least_images = SPLITS
    least_classes = 2
    compares = False
    beside = ("is_std",)
    compute = staticmethod(inception_score)
