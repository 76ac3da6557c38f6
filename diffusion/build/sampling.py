"""From the groups `sampler` and `guidance` to the recipe of a sampling."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from diffusion.build.parts import factory
from diffusion.build.take import left, take
from diffusion.scoring.recipe import Plan, Recipe


def recipe(cfg: DictConfig, batch_size: int = 256, labels: Sequence[int] = ()) -> Recipe:
    """How the images of a model are sampled.

    Args:
        cfg: a whole configuration, for its sampler, guidance and seed.
    """
    guided: dict[str, Any] = {"guidance_scale": cfg.guidance.scale}
    if "_target_" in cfg.guidance:
        guided["guide"] = factory(cfg.guidance, "guidance")
    sampler = factory(left(cfg.sampler, Plan), "sampler")
    return Recipe(
        sampler, take(cfg.sampler, Plan), **guided, seed=cfg.seed, batch_size=batch_size, labels=tuple(labels)
    )
