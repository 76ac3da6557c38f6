"""What a metric is, and how several are computed. Each is a class, named by conf/metric/NAME.yaml.

A metric is computed from what an extractor sees in images. What others have to know of it, its title, which way is
better and how many images it takes, stands in its class; `config.metrics` reads it there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from diffusion.metrics.extractors import Features
from diffusion.metrics.reference import Reference

Values = dict[str, float]


class Metric(ABC):
    """A score of images.

    title: what it is called, of Inception's features. higher_is_better: None where neither side is.
    least_images: that it can be computed of. compares: whether it needs as many real images as well.
    from_model: whether it is measured by the model itself, and no images are sampled for it.
    beside: other values that are said with it.
    """

    title: ClassVar[str]
    higher_is_better: ClassVar[bool | None] = None
    least_images: ClassVar[int] = 1
    compares: ClassVar[bool] = True
    from_model: ClassVar[bool] = False
    beside: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def compute(features: Features, reference: Reference) -> Values:
        """The values by their names, that of the metric under its own name.

        Raises:
            ValueError: there are too few images.
        """

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
    """{name: {name: value, and what is beside it}}; a computation that several share is done once."""
    made: dict[Callable, Values] = {}
    for metric in metrics.values():
        if metric.compute not in made:
            made[metric.compute] = metric.compute(features, reference)
    return {name: {key: made[m.compute][key] for key in (name, *m.beside)} for name, m in metrics.items()}


def enough(what: str, least: int, *sides: Features | Reference) -> None:
    """ValueError if there are fewer images than `least` on a side."""
    for side in sides:
        number = len(side.pooled) if isinstance(side, Features) else side.moments.count
        if number < least:
            raise ValueError(f"{what} of {number} image(s): at least {least} are needed on each side.")
