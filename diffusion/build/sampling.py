"""From the groups `sampler` and `guidance` to the recipe of a sampling; and samplers by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion.build.parts import Factory, factory
from diffusion.build.take import left, take
from diffusion.config.check import check
from diffusion.config.compose import Typed
from diffusion.config.composer import groups, option
from diffusion.config.effect import OF_SAMPLER, refuse_idle
from diffusion.config.values import check_kind, fit_all, kind_at, lookup, unknown
from diffusion.config.words import nearest, parse, plain
from diffusion.errors import Refusal
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


def chosen_sampler(words: str, key: str, idle: Mapping[str, str]) -> tuple[Factory, Plan]:
    """`ddim eta=0.5` -> what makes the sampler of this option of the group `sampler` with these settings, and its plan.

    Args:
        key: the setting that the words are from.
        idle: settings of the plan that have no effect there, and why.

    Raises:
        Refusal: no such option, no such setting of it, or one that has no effect.
    """
    name, *settings = words.split() or [""]
    known = groups()["sampler"]
    if name not in known:
        raise Refusal(f"{key}: Unknown sampler: {name}.{nearest(name, known)} Known samplers: {', '.join(known)}.")
    cfg = option("sampler", name)
    for setting in settings:
        inner, equals, value = setting.partition("=")
        if not (equals and value):
            raise Refusal(f"{key}: {words!r}: settings are key=value, as in 'ddim eta=0.5'.")
        parent, last, there = lookup(cfg, inner)
        if not there:
            raise Refusal(f"{key}: {words!r}: {unknown(inner, parent, last)}")
        whole = OmegaConf.create({"sampler": cfg})
        try:
            kind = kind_at(f"sampler.{inner}", whole)
            given = check_kind(f"sampler.{inner}", plain(parse(setting).value()), parent[last], kind)
        except Refusal as e:
            raise Refusal(f"{key}: {words!r}: {e}") from e
        if inner in idle and given != parent[last]:
            raise Refusal(f"{key}: {words!r}: {setting} has no effect: {idle[inner]}. Leave it out.")
        OmegaConf.update(cfg, inner, given)
    whole = OmegaConf.create({"sampler": cfg})
    fit_all(whole, "")
    check(whole)
    typed = Typed("sample", (f"sampler={name}", *(f"sampler.{setting}" for setting in settings)))
    try:
        refuse_idle(whole, typed, OF_SAMPLER)
    except Refusal as e:
        raise Refusal(f"{key}: {words!r}: {e}") from e
    return factory(left(whole.sampler, Plan), key), take(whole.sampler, Plan)
