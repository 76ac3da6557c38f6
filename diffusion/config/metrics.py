"""What is known of a metric before it is computed: what its class says of itself, read without importing it."""

import functools
from typing import NamedTuple

from diffusion.config.composer import groups, option, searched
from diffusion.config.declared import attributes
from diffusion.config.words import nearest
from diffusion.errors import Refusal


class Known(NamedTuple):
    """As `metrics.metric.Metric`, of the metric of this name; target: its class."""

    name: str
    target: str
    title: str
    higher_is_better: bool | None = None
    least_images: int = 1
    compares: bool = True
    least_real: int | None = None
    from_model: bool = False
    beside: tuple[str, ...] = ()

    @property
    def real_images(self) -> int:
        """Real images that it needs."""
        least = self.least_images if self.least_real is None else self.least_real
        return least if self.compares else 0


def names() -> list[str]:
    """Of all metrics, as conf/metric has them."""
    return groups()["metric"]


def known(name: str) -> Known:
    """The metric of a name.

    Raises:
        Refusal: there is none.
    """
    return _known(name, searched())


@functools.cache
def _known(name: str, _: tuple[str, ...]) -> Known:
    if name not in names():
        raise Refusal(f"metrics: Unknown metric: {name}.{nearest(name, names())} Known metrics: {', '.join(names())}.")
    target = str(option("metric", name)["_target_"])
    found = attributes(target)
    return Known(name, target, **{k: v for k, v in found.items() if k in Known._fields and k not in ("name", "target")})
