"""From the configuration of `train` to the parts of a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf

from diffusion.build import parts
from diffusion.build.extractors import Choice, extractor
from diffusion.build.sampling import recipe
from diffusion.build.take import take
from diffusion.config.check import check, learns_variance
from diffusion.config.compose import Typed, composed
from diffusion.data.module import Described, ImageShardsDataModule
from diffusion.denoiser import NetworkDenoiser
from diffusion.distributed.launcher import Compute
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.metrics.extractors import Extractor
from diffusion.metrics.metric import Metric
from diffusion.process.schedule import Schedule
from diffusion.runs.folder import LR_STEPS, RECORDED, OnError, RunFolder
from diffusion.runs.recorded import Recorded
from diffusion.scoring.looks import During, Grids, Looks, Scores
from diffusion.scoring.recipe import Recipe, check_learned
from diffusion.training.checkpoint import CheckpointWriter, Saving
from diffusion.training.ema import EMA
from diffusion.training.fit import Length, Training
from diffusion.training.held_out import HeldOut, split_of
from diffusion.training.meter import MetricsCsv, count_parameters
from diffusion.training.module import Descent, DiffusionModule


@dataclass(frozen=True)
class Parts:
    """All parts of a run, built and checked; nothing written yet.

    Args:
        record: what the run is recorded as.
        recipe: how its images are sampled. recipe_during: how those that are scored while it trains are.
        looks, metrics: what is looked at. paper: published values by metric.
        held_out: the loss on images that are not trained on.
        extractor: makes the extractor of its scores when it is wanted, which may train it on the run's own data.
        ready: that extractor, if it was made at once. described: the data set, as the configuration has it.
        checkpoint_bytes: about as large as a checkpoint is.
    """

    name: str
    debug: bool
    record: Recorded
    compute: Compute
    place: Place
    training: Training
    denoiser: NetworkDenoiser
    recipe: Recipe
    recipe_during: Recipe
    looks: Looks
    metrics: Mapping[str, Metric]
    paper: Mapping[str, float | None]
    held_out: HeldOut
    extractor: Callable[[], Extractor]
    ready: Extractor | None
    choice: Choice
    described: Described
    checkpoint_bytes: int


def parts_of(words: Sequence[str]) -> Parts:
    """The parts of the run that these words of `train` ask for. Raises ValueError as the command does."""
    cfg = composed("train", list(words))
    check(cfg, Typed("train", tuple(words)))
    return run_parts(cfg, RunFolder(cfg.run_dir))


def run_parts(cfg: DictConfig, folder: RunFolder) -> Parts:
    """The parts of the run that a composed and checked configuration asks for, in its folder.

    Raises:
        ValueError: some part cannot be built as asked.
    """
    recorded = folder.config()
    if recorded is not None:  # what was left open was found out when the run began
        cfg = OmegaConf.merge(cfg, left_open(cfg, recorded))
    if OmegaConf.select(cfg, LR_STEPS, default=0) is None:
        cfg = OmegaConf.merge(cfg, {"lr_schedule": {"num_steps": cfg.trainer.max_steps}})
    record = Recorded(OmegaConf.to_container(cfg), f"run_dir={folder.path}")
    compute = take(cfg.trainer, Compute)
    place = Place.of(compute)
    data, held_out = parts.data(cfg), take(cfg.held_out, HeldOut)
    if held_out.split is not None and data.readable:
        split_of(held_out, data)
    levels = parts.schedule(cfg)
    network = parts.network(cfg, cfg.seed).to(memory_format=place.memory_format)
    denoiser = NetworkDenoiser(network, levels, cfg.objective.prediction)
    module = _module(cfg, denoiser, place, record)
    sampled = recipe(cfg)
    check_learned(sampled.sampler_of(levels)[0], learns_variance(cfg.objective))
    looks = _looks(cfg.callbacks)
    choice = take(cfg.extractor, Choice)
    at_once = looks.enabled and cfg.metrics and choice.name != "digits"
    copies = 2 + len(cfg.ema.decays) + states_of(parts.optimizer(cfg))  # weights, averages, what the optimizer keeps
    return Parts(
        cfg.name,
        cfg.debug,
        record,
        compute,
        place,
        _training(cfg, module, data, folder),
        denoiser,
        sampled,
        _during(sampled, looks, levels),
        looks,
        parts.metrics(cfg.metrics),
        dict(cfg.paper),
        held_out,
        lambda: extractor(choice, data),
        extractor(choice) if at_once else None,
        choice,
        take(cfg.data, Described),
        4 * count_parameters(network) * copies,
    )


def _module(cfg: DictConfig, denoiser: NetworkDenoiser, place: Place, record: Recorded) -> DiffusionModule:
    """What is trained, and how a step is made."""
    return DiffusionModule(
        denoiser,
        parts.objective(cfg, denoiser.schedule),
        parts.optimizer(cfg),
        levels=parts.levels(cfg, denoiser.schedule),
        lr_schedule=parts.lr_schedule(cfg),
        descent=take(cfg.optimizer, Descent),
        flip=cfg.data.flip,
        seed=cfg.seed,
        memory_format=place.memory_format,
        record=record,
        skip_not_finite=cfg.on_nonfinite == "skip",
    )


def _training(cfg: DictConfig, module: DiffusionModule, data: ImageShardsDataModule, folder: RunFolder) -> Training:
    """The module with its data, averages, checkpoints and logs."""
    saving = take(cfg.save, Saving)
    on_error = OnError(saving.on_error)
    return Training(
        module,
        data,
        take(cfg.ema, EMA),
        folder,
        CheckpointWriter(),
        [MetricsCsv(folder.metrics_path, on_error), *parts.loggers(cfg, folder)],
        take(cfg.trainer, Length),
        saving,
        on_error,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        log_every=cfg.log_every,
        fingerprint_every=cfg.fingerprint_every,
        max_nonfinite=cfg.max_nonfinite,
        deterministic=cfg.deterministic,
        callbacks=parts.callbacks(cfg),
        arguments=parts.trainer_arguments(cfg, folder),
    )


def left_open(cfg: DictConfig, recorded: Recorded) -> DictConfig:
    """The recorded values of what a configuration leaves open and a run finds out when it begins."""
    found = OmegaConf.create({})
    for key in RECORDED:
        if OmegaConf.select(cfg, key, default=0) is None:
            OmegaConf.update(found, key, recorded.at(key))
    return found


def _looks(cfg: DictConfig) -> Looks:
    if not cfg.enabled:
        return Looks()
    score = take(cfg.score, Scores, during=take(cfg.score.during, During))
    return Looks(True, take(cfg.grid, Grids), score)


def _during(recipe: Recipe, looks: Looks, schedule: Schedule) -> Recipe:
    """How the images that are scored while a run trains are sampled: by DDIM, if a number of its steps is given."""
    steps = looks.score.during.num_steps
    if not (looks.enabled and looks.score.every_steps) or steps is None:
        return recipe
    if steps > schedule.num_timesteps:
        raise Refusal(
            f"callbacks.score.during.num_steps={steps} must be at most {schedule.num_timesteps}, the number of noise "
            f"levels (schedule.num_timesteps)."
        )
    return recipe.by_ddim(steps)


def states_of(optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> int:
    """Tensors of a parameter's size that an optimizer keeps of it: two of Adam."""
    one = torch.nn.Parameter(torch.zeros(2))
    made, one.grad = optimizer([one]), torch.zeros(2)
    made.step()
    return sum(isinstance(value, torch.Tensor) and value.shape == one.shape for value in made.state[one].values())
