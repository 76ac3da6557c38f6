"""Bits per dimension, which a model gives of images (`scoring.bits`), and no extractor sees."""

from diffusion.metrics.extractors import Features
from diffusion.metrics.metric import Metric, Values
from diffusion.metrics.reference import Reference


class BitsPerDim(Metric):
    """The likelihood of a split of the data."""

    title = "bits/dim"
    higher_is_better = False
    from_model = True
    compares = False

    @staticmethod
    def compute(features: Features, reference: Reference) -> Values:
        raise ValueError("bits_per_dim is measured by a model, not on features.")
