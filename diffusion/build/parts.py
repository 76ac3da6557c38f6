"""From a checked configuration to the objects it names: one function a config group.

The configuration is the user's own, as composed from conf/ and the command line. Models from files come in by
`build/door.py` alone.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffusion.build.take import left
from diffusion.config import added
from diffusion.config.added import added_parts
from diffusion.config.check import learns_variance
from diffusion.config.metrics import known
from diffusion.data.module import Described, ImageShardsDataModule
from diffusion.errors import Refusal
from diffusion.files import reason
from diffusion.metrics.metric import Metric
from diffusion.models.network import lacking
from diffusion.noise import Stream, seed63
from diffusion.objective import Objective
from diffusion.process.schedule import Schedule
from diffusion.runs.folder import RunFolder
from diffusion.training import own
from diffusion.training.levels import Levels
from diffusion.training.logger import loggers as our_loggers
from diffusion.training.meter import RunLogger
from diffusion.training.module import Descent


def make(cfg: DictConfig, group: str, **arguments: Any) -> Any:
    """Instantiate a group, with these arguments beside its keys; what its class refuses is answered in the user's
    words."""
    if not isinstance(cfg, DictConfig):
        raise TypeError(f"{group}: only what was composed for this command is built")
    try:
        if not cfg.get("_partial_"):
            return instantiate(cfg, _convert_="all", **arguments)
        return instantiate(cfg, _convert_="all")(**arguments)
    except InstantiationException as e:
        raise Refusal(said(group, e.__cause__ or e)) from e
    except TypeError as e:  # an argument that a partial's class does not have
        raise Refusal(said(group, e)) from e


def said(group: str, error: BaseException) -> str:
    """What an error says, with the group that it is of, unless it names a setting of it."""
    first = reason(error).splitlines()[0]
    return first if first.startswith(f"{group}.") else f"{group}: {first}"


class Factory(functools.partial):
    """A partial of a group's class; an argument that it does not have is answered in the user's words."""

    group = ""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except TypeError as e:
            raise Refusal(said(self.group, e)) from e


def factory(cfg: DictConfig, group: str) -> Factory:
    """What makes the object of a group once the arguments are there that the configuration does not hold."""
    try:
        partial = instantiate(OmegaConf.merge(cfg, {"_partial_": True}), _convert_="all")
    except InstantiationException as e:
        raise Refusal(said(group, e.__cause__ or e)) from e
    made = Factory(partial.func, *partial.args, **partial.keywords)
    made.group = group
    return made


def schedule(cfg: DictConfig) -> Schedule:
    return make(cfg.schedule, "schedule")


def network(cfg: DictConfig, seed: int = 0) -> nn.Module:
    """The network of a whole configuration, whose objective decides how many channels it answers with; its initial
    weights belong to the seed."""
    channels = cfg.model.channels * (2 if learns_variance(cfg.objective) else 1)
    state = torch.get_rng_state()
    torch.manual_seed(seed63(seed, Stream.INIT))
    try:
        made = make(cfg.model, "model", out_channels=channels)
    finally:
        torch.set_rng_state(state)
    if missing := lacking(made):
        raise Refusal(
            f"model._target_={cfg.model.get('_target_')} is not a network, it has no {', no '.join(missing)}. What a "
            f"network must offer is written in diffusion/models/network.py."
        )
    return made


def objective(cfg: DictConfig, levels: Schedule) -> Objective:
    return make(cfg.objective, "objective", schedule=levels)


def optimizer(cfg: DictConfig) -> Callable:
    return make_partial(left(cfg.optimizer, Descent), "optimizer")


def levels(cfg: DictConfig, schedule: Schedule) -> Levels:
    """Which noise levels are trained on."""
    return make(cfg.levels, "levels", schedule=schedule)


def lr_schedule(cfg: DictConfig) -> Callable[[int], float]:
    """The course of the learning rate."""
    return make(cfg.lr_schedule, "lr_schedule")


def make_partial(cfg: DictConfig, group: str) -> Callable:
    """The partial itself, its argument names tried out on one parameter so that a wrong one is refused now."""
    try:
        partial = instantiate(cfg, _convert_="all")
        partial([nn.Parameter(torch.zeros(1))])
    except (InstantiationException, TypeError, ValueError) as e:
        raise Refusal(said(group, e.__cause__ or e)) from e
    return partial


def data(cfg: DictConfig) -> ImageShardsDataModule:
    """The data module; what conf/ says of the set was held against its index by the checks."""
    try:
        kind = get_object(str(cfg.data.get("_target_")))
    except Exception as error:  # whatever importing a module of the user's own raises
        raise Refusal(said("data", error)) from error
    if not (isinstance(kind, type) and issubclass(kind, ImageShardsDataModule)):
        raise Refusal(
            f"data._target_={cfg.data.get('_target_')} is not a data module. It must be a subclass of "
            f"ImageShardsDataModule (diffusion/data/module.py) or of ArraysDataModule (diffusion/data/memory.py)."
        )
    made = make(OmegaConf.merge(left(cfg.data, Described), {"seed": cfg.seed}), "data")
    for key, found in (("image_size", made.image_size), ("channels", made.channels)) if made.drawn else ():
        if cfg.data[key] != found:
            raise Refusal(f"data.{key}={cfg.data[key]}, but the images of data={cfg.data.name} have {found}.")
    return made


def callbacks(cfg: DictConfig) -> list[own.Callback]:
    """Build the callbacks of the user's own.

    Raises:
        Refusal: one cannot be built, or is not a Lightning callback.
    """
    parts = list(added_parts(cfg, "callbacks"))
    return [own.callback(make(part, f"callbacks.{name}"), f"callbacks.{name}") for name, part in parts]


def loggers(cfg: DictConfig, folder: RunFolder) -> list[RunLogger]:
    """Build what the run logs to beside metrics.csv: the chosen logger, and those of the user's own; none on ranks
    other than 0, which write nothing.

    Raises:
        Refusal: one cannot be built, or is not a Lightning logger.
    """
    if not own.on_main_rank():
        return []
    parts = {f"logger.{name}": part for name, part in added_parts(cfg, "logger")}
    names = [key.partition(".")[2] for key in parts]
    if "_target_" in cfg.logger:
        parts = {"logger": OmegaConf.masked_copy(cfg.logger, [k for k in cfg.logger if k not in names])} | parts
        found = []
    else:
        chosen = {k: v for k, v in OmegaConf.to_container(cfg.logger).items() if k not in ("name", *names)}
        found = our_loggers(cfg.logger.name, folder, **chosen)
    return found + [own.logger(make(part, key), key) for key, part in parts.items()]


def trainer_arguments(cfg: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """Build the further arguments of Lightning's Trainer; a profiler writes to the run folder.

    Raises:
        Refusal: the Trainer does not take one of them.
    """
    return own.trainer_arguments(make(added.trainer_arguments(cfg), "trainer"), folder.path)


def metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics of these names."""
    return {name: get_object(known(name).target)() for name in names}
