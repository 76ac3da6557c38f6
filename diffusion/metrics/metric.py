"""What a metric is, and how several are computed. Each is a class, named by conf/metric/NAME.yaml.

A metric is computed from what an extractor sees in images. What others have to know of it, its title, which way is
better and how many images it takes, stands in its class; `config.metrics` reads it there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from diffusion.metrics.extractors import Extractor, Features
from diffusion.metrics.reference import Reference

Values = dict[str, float]


class Metric(ABC):
    """A score of images.

    title: what it is called, of Inception's features. higher_is_better: None where neither side is.
    least_images: that it can be computed of. compares: whether it needs real images as well.
    least_real: real images that it needs then; None: as many as least_images.
    least_classes: that the extractor must tell apart.
    from_model: whether it is measured by the model itself, and no images are sampled for it.
    beside: other values that are said with it.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool | None] = None
    least_images: ClassVar[int] = 1
    compares: ClassVar[bool] = True
    least_real: ClassVar[int | None] = None
    least_classes: ClassVar[int] = 1
    from_model: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def compute(features: Features, reference: Reference) -> Values:
        """The values by their names, that of the metric under its own name; of as many images as the class asks for."""

    def real(self, reference: Reference, number: int) -> Values:
        """What so many real images have of it among themselves, as real_value, real_std and real_images; {} if that is
        not known."""
        return {}

    def by_class(
        self, features: Features, labels: Tensor, reference: Reference, working: Callable[[], None]
    ) -> list[float | None] | None:
        """Its value for each class, None for one with too few images; None if it has none. working: called now and
        then."""
        return None


def scores(metrics: Mapping[str, Metric], features: Features, reference: Reference) -> dict[str, Values]:
    """{name: {name: value, and what is beside it}}; a computation that several share is done once.

    Raises:
        ValueError: there are fewer images than a metric needs, or fewer real ones.
    """
    made: dict[Callable, Values] = {}
    for metric in metrics.values():
        check_number(metric, len(features.pooled), reference.moments.count)
        if metric.compute not in made:
            made[metric.compute] = metric.compute(features, reference)
    return {name: {key: made[m.compute][key] for key in (name, *m.beside)} for name, m in metrics.items()}


def check_number(metric: Metric, images: int, real: int) -> None:
    """ValueError if there are fewer images than a metric needs, or fewer real ones."""
    if images < metric.least_images:
        raise ValueError(f"{metric.title} of {images} image(s): at least {metric.least_images} are needed.")
    least = metric.least_images if metric.least_real is None else metric.least_real
    if metric.compares and real < least:
        raise ValueError(f"{metric.title} against {real} real image(s): at least {least} are needed.")


def try_out(extractor: Extractor, channels: int, image_size: int, metrics: Mapping[str, Metric]) -> None:
    """ValueError unless two images of this kind give what these metrics are computed of."""
    classes = extractor.try_out(channels, image_size)
    for name, metric in metrics.items():
        if classes < metric.least_classes:
            raise ValueError(
                f"metrics: {name} needs logits of at least {metric.least_classes} classes, extractor={extractor.name} "
                f"gives {classes}."
            )
