"""Precision and recall of images, by torch-fidelity's function."""

from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from diffusion.metrics.extractors import Features
from diffusion.metrics.metric import Metric
from diffusion.metrics.reference import Reference

NEIGHBOURHOOD = 3  # the distance to the third nearest is a radius


def precision_recall(features: Features, reference: Reference) -> dict[str, float]:
    """Shares of the images within the third-neighbour balls of real ones, and of real ones (those kept) within those of
    the images (Kynkaanniemi et al. 2019, sec. 2): {'precision': share, 'recall': share}."""
    out = prc_features_to_metric(
        features.pooled, reference.features, prc_neighborhood=NEIGHBOURHOOD, save_cpu_ram=True, verbose=False
    )
    return {"precision": out[KEY_METRIC_PRECISION], "recall": out[KEY_METRIC_RECALL]}


class Precision(Metric):
    """The first of `precision_recall`."""

    title = "precision"
    higher_is_better = True
    least_images = NEIGHBOURHOOD + 1
    compute = staticmethod(precision_recall)


class Recall(Precision):
    """The second."""

    title = "recall"
