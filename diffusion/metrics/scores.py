"""From features to figures: FID by torchmetrics, IS by torch-fidelity's own function. Knows no image and no network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusion.metrics.extractors import Features

MIN_IMAGES = 2


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: its "images" are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Features, reference: Features) -> dict[str, float]:
    """Frechet distance of two Gaussians fitted to features (Heusel et al. 2017): {'fid': value}; 0 is the best.

    Raises:
        ValueError: fewer than two images on a side.
    """
    for n in (len(features.pooled), len(reference.pooled)):
        if n < MIN_IMAGES:
            raise ValueError(f"FID of {n} image(s): a covariance needs at least {MIN_IMAGES}; raise num_images.")
    given = _Given(reference.pooled.shape[1])
    metric = FrechetInceptionDistance(feature=given, sync_on_compute=False)  # all features are here; ranks train on
    metric.set_dtype(torch.float64)
    metric.update(reference.pooled.double(), real=True)
    metric.update(features.pooled.double(), real=False)
    return {"fid": float(metric.compute())}


def inception_score(features: Features, reference: Features | None = None, splits: int = 10) -> dict[str, float]:
    """exp(mean KL(p(y|x) || p(y))) over 10 splits (Salimans et al. 2016): {'is': mean, 'is_std': std}.

    Raises:
        ValueError: fewer images than splits.
    """
    if len(features.logits) < splits:
        raise ValueError(f"IS of {len(features.logits)} image(s): {splits} splits need at least {splits}.")
    out = isc_features_to_metric(features.logits, splits)
    return {"is": out[KEY_METRIC_ISC_MEAN], "is_std": out[KEY_METRIC_ISC_STD]}


METRICS: dict[str, Callable[[Features, Features], dict[str, float]]] = {"fid": fid, "is": inception_score}
