"""Mean and covariance of features, added up block by block, and the Frechet distance between two such pairs.

Blocks are of a fixed number of images and added in the order of the images: who computed which block changes no bit.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

BLOCK = 4096  # images


class Moments(NamedTuple):
    """Of `count` vectors x: the sums of x (F,) and of x x^T (F, F), float64, on the CPU."""

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Those of the rows of (N, F), N > 0, added up in blocks of BLOCK rows."""
        return cls.joined(cls.of_block(block) for block in features.split(BLOCK))

    @classmethod
    def of_block(cls, features: Tensor) -> "Moments":
        x = features.double()
        return cls(len(x), x.sum(0).cpu(), (x.T @ x).cpu())

    @classmethod
    def joined(cls, blocks: Iterable["Moments"]) -> "Moments":
        """The blocks together, added in the order in which they come."""
        count, total, products = 0, None, None
        for block in blocks:
            count += block.count
            total = block.total.clone() if total is None else total.add_(block.total)
            products = block.products.clone() if products is None else products.add_(block.products)
        assert total is not None and products is not None, "no block"
        return cls(count, total, products)

    @classmethod
    def given(cls, mean: Tensor, covariance: Tensor, count: int) -> "Moments":
        """Those of `count` vectors of this mean (F,) and (unbiased) covariance (F, F)."""
        mean = mean.double()
        return cls(count, count * mean, (count - 1) * covariance.double() + count * torch.outer(mean, mean))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


class _FromMoments(FrechetInceptionDistance):
    """torchmetrics' FID, of sums that are there instead of images."""

    def __init__(self, num_features: int) -> None:
        features = nn.Identity()
        features.num_features = num_features
        super().__init__(feature=features, sync_on_compute=False)
        self.set_dtype(torch.float64)
        self.orig_dtype = torch.float64

    def update(self, imgs: Moments, real: bool) -> None:
        side = "real" if real else "fake"
        for name, value in (("sum", imgs.total), ("cov_sum", imgs.products), ("num_samples", imgs.count)):
            setattr(self, f"{side}_features_{name}", getattr(self, f"{side}_features_{name}") + value)


def frechet(moments: Moments, reference: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (Dowson & Landau
    1982; FID: Heusel et al. 2017, eq. 6), as torchmetrics reckons it from its sums. Both of at least two vectors."""
    metric = _FromMoments(len(moments.total))
    metric.update(moments, real=False)
    metric.update(reference, real=True)
    return float(metric.compute())
