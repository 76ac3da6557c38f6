"""What is known of a metric before it is computed: what its class says of itself, read without importing it."""

import functools
from typing import NamedTuple

from omegaconf import OmegaConf

from diffusion.config.declared import attributes
from diffusion.config.words import conf_dir, groups, nearest
from diffusion.errors import Refusal


class Known(NamedTuple):
    """As `metrics.metric.Metric`, of the metric of this name; target: its class."""

    name: str
    target: str
    title: str
    higher_is_better: bool | None = None
    least_images: int = 1
    compares: bool = True
    from_model: bool = False
    beside: tuple[str, ...] = ()


def names() -> list[str]:
    """Of all metrics, as conf/metric has them."""
    return groups()["metric"]


@functools.cache
def known(name: str) -> Known:
    """The metric of a name.

    Raises:
        Refusal: there is none.
    """
    if name not in names():
        raise Refusal(f"metrics: Unknown metric: {name}.{nearest(name, names())} Known metrics: {', '.join(names())}.")
    target = str(OmegaConf.load(conf_dir() / "metric" / f"{name}.yaml")["_target_"])
    found = attributes(target)
    return Known(name, target, **{k: v for k, v in found.items() if k in Known._fields and k not in ("name", "target")})
