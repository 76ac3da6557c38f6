"""From the settings of `lab` to its laboratory."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from diffusion.build import door, parts
from diffusion.build.sampling import chosen_sampler, recipe
from diffusion.build.take import take
from diffusion.config.check import check_guidance
from diffusion.config.effect import OF_IMAGES, OF_POINTS, refuse_idle, typed
from diffusion.distributed.launcher import Compute
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.lab.settings import TASKS, Gaussian
from diffusion.lab.tasks.laboratory import Laboratory, Named, Subject, refuse_stays
from diffusion.process import toy
from diffusion.process.toy import SETS, Mixture
from diffusion.runs.folder import RunFolder
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.base import Sampler
from diffusion.scoring.recipe import check_learned


def laboratory(cfg: DictConfig, say: Callable[[str], None]) -> Laboratory:
    """What the task measures with, built and checked; nothing written yet.

    Raises:
        ValueError: what is asked for cannot be.
    """
    place = Place.of(take(cfg.trainer, Compute))
    subject = subject_of(cfg)
    model, run = subject.model, None if subject.model is None else subject.model.run_folder
    if model is not None:
        refuse_idle(cfg, typed(), OF_IMAGES if subject.toy is None else OF_POINTS)
    if cfg.out is None and run is not None:
        RunFolder(run).refuse_links()
    samplers = [named(words, cfg.task) for words in cfg.samplers]
    for sampler in samplers:
        refuse_learned(f"samplers: {sampler.words!r}", sampler.make(subject.schedule))
    folder = Path(cfg.out) if cfg.out is not None else (run or Path(".")) / "lab"
    made = Laboratory(
        cfg.task, take(cfg[cfg.task], TASKS[cfg.task]), subject, place, samplers, recipe(cfg, cfg.batch_size), folder,
        cfg.seed, cfg.batch_size, say, cfg.gaussian.fitted_on,
    )  # fmt: skip
    if cfg.task == "errors":  # no other task takes the setting `sampler`
        assert made.sampler is not None
        if subject.toy is None and model is not None:
            check_guidance(cfg.guidance.scale, model.num_classes, model.facts.label_dropout)
            check_learned(made.sampler, model.learns_variance)
            refuse_stays(made.times)
        else:
            refuse_learned("sampler", made.sampler)
    return made


def refuse_learned(what: str, sampler: Sampler) -> None:
    """Refuse a sampler of exact scores that needs a network."""
    if sampler.learned_by is not None:
        raise Refusal(f"{what}: {sampler.learned_by}=learned needs a network that has learned it; give small or large.")


def subject_of(cfg: DictConfig) -> Subject:
    """What is looked at: the checkpoint's model and its data, or the toy that is asked for."""
    last = lambda target: str(target).rpartition(".")[2]  # noqa: E731
    if cfg.checkpoint is None:
        name = cfg.toy or ("gaussian" if cfg.task == "errors" else "modes")
        return Subject(parts.schedule(cfg), last(cfg.schedule._target_), toy_of(name, cfg), name)
    model = door.trained(cfg.checkpoint, cfg.ema, cfg.trust)
    mixture = door.data_of(model).mixture if model.facts.points else None
    of = lambda split: door.data_of(model, cfg.data.root, split)  # noqa: E731
    name = model.record.at("data.toy") or model.data_name
    return Subject(model.denoiser.schedule, last(model.record.at("schedule._target_")), mixture, name, model, of)


def toy_of(name: str, cfg: DictConfig) -> Mixture:
    """The distribution of this name, whose score is known."""
    if name != "gaussian":
        return SETS[name]()
    chosen = take(cfg.gaussian, Gaussian)
    return toy.Gaussian(chosen.mean, covariance=torch.diag(torch.tensor(chosen.stds, dtype=torch.float64) ** 2))


def named(words: str, task: str) -> Named:
    """A sampler of the list `samplers`, as `ddim eta=0.5`. Raises Refusal as `chosen_sampler`."""
    steps, grids = f"{task}.num_steps sets the number of steps", "all samplers of the task walk on its own grids"
    exact = "the denoiser is the exact one, without clipping"
    idle = {"num_steps": steps, "max_calls": steps, "spacing": grids, "rho": grids, "clip_x0": exact}
    made, plan = chosen_sampler(words, "samplers", idle)
    stays = plan.num_steps == 1
    anneals = plan.visits > 1 or made.func is AnnealedLangevin
    return Named(words, lambda schedule: made(schedule=schedule), 1 if stays else plan.visits, stays, anneals)
