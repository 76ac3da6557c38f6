"""What several settings of a composed configuration make impossible together, in one message each; without torch.

What a single setting may be is declared by the class that takes it (`values`), what has no effect beside others is in
effect.py.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion.config.added import NAMED, added_parts
from diffusion.config.compose import Typed
from diffusion.config.effect import NONE_HELD_OUT, refuse_idle, unguided
from diffusion.config.metrics import known
from diffusion.data.digit_sets import SPLITS as DIGITS
from diffusion.data.shards.index import INDEX_NAME, check_splits, read_index
from diffusion.data.shards.layout import check_batch, check_lanes
from diffusion.data.shards.remote import Access, is_remote
from diffusion.errors import Refusal
from diffusion.files import obstacle
from diffusion.metrics.takes import OWN, Takes
from diffusion.models.resolutions import check_attention
from diffusion.process.grids import SPACINGS, check_grid

SAMPLES = ("samples.npz", "grid.png", "png")  # what a folder of samples holds


def check(cfg: DictConfig, typed: Typed | None = None) -> None:
    """Refuse values out of their range and combinations that cannot be; looks at nothing but the configuration.

    Args:
        typed: what of it the user has typed, which is refused where it has no effect.
    """
    if OmegaConf.select(cfg, "callbacks.enabled") and OmegaConf.select(cfg, "callbacks.score.every_steps") is None:
        raise Refusal("callbacks.enabled=true: callbacks=none has nothing to enable. Give callbacks=default.")
    for group in NAMED:
        list(added_parts(cfg, group))
    if typed is not None:
        refuse_idle(cfg, typed)
    if "guidance" in cfg and unguided(cfg) and cfg.guidance.scale != 1:  # also where nobody typed it
        word = f"guidance.scale={cfg.guidance.scale}"
        raise Refusal(f"{word} has no effect: guidance=none. Give guidance=classifier_free {word}.")
    for metric in cfg.get("metrics") or ():
        if known(metric).from_model and cfg.get("checkpoint") is None:
            raise Refusal(f"metrics={list(cfg.metrics)}: {metric} is measured by diffusion.evaluate checkpoint=PATH.")
    if cfg.get("checkpoint") is not None and "metrics" in cfg:
        measured = ["fid"] if cfg.get("task") == "sweep" else cfg.metrics
        check_number(measured, cfg.num_images, f"num_images={cfg.num_images}")
    if "extractor" in cfg and cfg.extractor.name not in OWN and "target" not in cfg.extractor:
        raise Refusal(
            f"extractor.name={cfg.extractor.name} must be one of {', '.join(OWN)}; another module is given by "
            f"extractor=custom extractor.name=NAME extractor.target=package.module.function."
        )
    if cfg.get("extractor", {}).get("target") is not None and cfg.extractor.name in OWN:
        raise Refusal(
            f"extractor.name={cfg.extractor.name} is the name of a built-in extractor. Give the one of "
            f"extractor.target another name."
        )
    if cfg.get("task") == "sweep" and not isinstance(cfg.sampler.spacing, str):
        refuse_times("sampler.spacing", cfg.sampler.spacing)
    if "sweep" in cfg and not (cfg.sweep.num_steps and (cfg.sweep.eta or cfg.sweep.large or cfg.sweep.samplers)):
        raise Refusal(
            "The sweep has no point: give sweep.num_steps=[...], and sweep.eta=[...], sweep.large=true or "
            "sweep.samplers=[...]."
        )
    if "objective" in cfg:
        check_training(cfg)


def refuse_times(what: str, times: Sequence[float]) -> None:
    """Refuse times that are given one by one in a sweep over numbers of steps."""
    listed = ",".join(f"{t:g}" for t in times)
    raise Refusal(
        f"{what}=[{listed}] gives the times themselves, the same for every number of sweep.num_steps: give the name of "
        f"a spacing, {', '.join(SPACINGS)}."
    )


def check_number(metrics: Iterable[str], number: int, what: str) -> None:
    """Refuse fewer images than a metric can be had of."""
    for metric in metrics:
        if number < known(metric).least_images:
            raise Refusal(f"{what}: {metric} needs at least {known(metric).least_images} images, here are {number}.")


def check_real(metrics: Iterable[str], number: int, what: str) -> None:
    """Refuse fewer real images than a metric needs."""
    for metric in metrics:
        if number < (least := known(metric).real_images):
            raise Refusal(f"{what}: {metric} needs at least {least} real images, here are {number}.")


def check_scores(cfg: DictConfig) -> None:
    """Refuse scores that a run could not make of its samples: of too few, or of images that its extractor does not
    take."""
    score = cfg.callbacks.score
    numbers = {"callbacks.score.num_images": score.num_images}
    if score.every_steps and score.during.num_images is not None:
        numbers["callbacks.score.during.num_images"] = score.during.num_images
    for key, number in numbers.items():
        check_number(cfg.metrics, number, f"{key}={number}")
    extractor, data = cfg.extractor, cfg.data
    takes = OWN.get(extractor.name) or Takes(extractor.channels, extractor.image_size)
    unfit = takes.unfit(channels=data.channels, image_size=data.image_size) if cfg.metrics else {}
    for key, wanted in unfit.items():
        raise Refusal(
            f"extractor={extractor.name} takes {takes}, and data.{key}={data[key]}: give data.{key}={wanted}, another "
            f"extractor, or callbacks=none."
        )


def check_training(cfg: DictConfig) -> None:
    """Check that batch, model, data, sampler, guidance and extractor settings fit together."""
    check_batch(cfg.data.batch_size, cfg.trainer.devices * cfg.trainer.num_nodes, cfg.trainer.accumulate)
    if cfg.data.lanes is not None:
        check_lanes(cfg.data.lanes, cfg.data.batch_size)
    check_steps(cfg.sampler, cfg.schedule.num_timesteps)
    if "out_channels" in cfg.model:
        raise Refusal(
            f"model.out_channels={cfg.model.out_channels} follows from the objective: the channels of the images, "
            f"twice as many with objective.variance=learned. Leave it out."
        )
    halvings = len(cfg.model.get("multipliers") or [1]) - 1
    if cfg.model.image_size % 2**halvings:
        raise Refusal(
            f"model.image_size={cfg.model.image_size} cannot be halved {halvings} times, which "
            f"model.multipliers={list(cfg.model.multipliers)} asks for."
        )
    for key in ("image_size", "channels"):
        if cfg.model[key] != cfg.data[key]:
            raise Refusal(
                f"model.{key}={cfg.model[key]}, but data={cfg.data.name} has {cfg.data[key]}: give data.{key}, which "
                f"the model takes over, or leave it out."
            )
    if "attention_resolutions" in cfg.model and "multipliers" in cfg.model:
        check_attention(cfg.model.image_size, halvings + 1, cfg.model.attention_resolutions)
    if cfg.model.num_classes not in (0, cfg.data.num_classes):
        raise Refusal(
            f"model.num_classes={cfg.model.num_classes}, but data={cfg.data.name} has {cfg.data.num_classes}: "
            f"give 0 (unconditional) or {cfg.data.num_classes}."
        )
    if not cfg.model.num_classes and cfg.objective.label_dropout:
        raise Refusal(
            f"objective.label_dropout={cfg.objective.label_dropout} needs a conditional model: model.num_classes=0."
        )
    check_guidance(cfg.guidance.scale, cfg.model.num_classes, cfg.objective.label_dropout)
    if cfg.callbacks.enabled and cfg.data.channels not in (1, 3):
        raise Refusal(
            f"callbacks: data={cfg.data.name} has points of {cfg.data.channels} numbers, of which no pictures can be "
            f"made: give callbacks=none."
        )
    if cfg.callbacks.enabled:
        check_scores(cfg)


def check_steps(sampler: DictConfig, num_timesteps: int) -> None:
    """Refuse more sampling steps than the schedule has levels, and an unknown spacing."""
    spacing = sampler.spacing if isinstance(sampler.spacing, str) else list(sampler.spacing)
    check_grid(num_timesteps, sampler.num_steps, spacing, sampler.get("visits", 1))


def learns_variance(objective: DictConfig) -> bool:
    """Whether a network of this objective says how wide the reverse step is: the one key that decides it."""
    return objective.get("variance") == "learned"


def check_guidance(scale: float, num_classes: int, label_dropout: float) -> None:
    """Refuse guidance of a model without classes, or of one that has never seen an image without its label."""
    if scale != 1 and not num_classes:
        raise Refusal(f"guidance.scale={scale} needs a conditional model: this one has no classes; give guidance=none.")
    if scale != 1 and not label_dropout:
        raise Refusal(
            f"guidance.scale={scale} needs a model that was trained with objective.label_dropout above 0: "
            f"this one has never seen an image without its label; give guidance=none."
        )


def check_data(cfg: DictConfig, typed: Typed | None = None) -> None:
    """Refuse a data set that is not on disk, or is another than conf/ says; digits are made when they are missing, and
    what has no root is drawn.

    Args:
        typed: what the user has typed of held_out, which is refused where the set has no split for it.
    """
    root = cfg.data.root
    if root is None:
        return
    split, held_out, of = cfg.data.split, OmegaConf.select(cfg, "held_out.split"), f"the set in data.root={root}"
    if cfg.data.name in DIGITS and not is_remote(root) and not (Path(root) / INDEX_NAME).is_file():
        check_splits(DIGITS[cfg.data.name], of, split, held_out)
        if why := obstacle(Path(root)):
            raise Refusal(f"data.root={root}: {why}, so the digits cannot be made there: give another folder.")
        return
    index = read_index(root, cfg.data.prepare, Access(cfg.data.remote.attempts, cfg.data.remote.timeout))
    if lacking := [split for split in DIGITS.get(cfg.data.name, ()) if split not in index.splits]:
        raise Refusal(
            f"data.root={root} holds a set without the split {lacking[0]}, which data={cfg.data.name} has: give the "
            f"root of that set."
        )
    check_splits(index.splits, of, split, held_out)
    if typed is not None and index.held_out_from(split) is None:
        refuse_idle(cfg, typed, NONE_HELD_OUT)
    for key, found in (("image_size", index.image_size), ("channels", index.channels), ("num_classes", index.classes)):
        wanted = cfg.data[key]
        if wanted != found and not (key == "num_classes" and wanted == 0):
            raise Refusal(
                f"data.{key}={wanted}, but the set in data.root={cfg.data.root} has {found}: "
                f"give data.{key}={found}, or the root of another set."
            )


def refuse_overwriting(key: str, folder: Path, overwrite: bool) -> None:
    """Refuse a folder that samples cannot be written to, or that holds some."""
    if why := obstacle(folder):
        raise Refusal(f"{key}={folder}: {why}, so no samples can be kept there: give another folder.")
    there = [name for name in SAMPLES if (folder / name).exists()]
    begun = (folder / ".batches" / "about.json").is_file()  # interrupted while they were put together
    if there and not overwrite and not begun:
        raise Refusal(f"{key}={folder} already holds {', '.join(there)}: give another folder, or overwrite=true.")


def refuse_blocked(
    key: str, folder: Path, files: Iterable[str], folders: Iterable[str], cure: str = "another folder"
) -> None:
    """Refuse a folder in which a file that is to be written is a folder, a folder is a file, or nothing can be written.

    Args:
        key: that gives the folder. files, folders: names in it of what will be written. cure: what to give instead.
    """
    if why := obstacle(folder):
        raise Refusal(f"{key}={folder}: {why}, so nothing can be kept there: give {cure}.")
    for name in files:
        linked = (folder / name).resolve() if (folder / name).is_symlink() else None  # as last.ckpt to a checkpoint
        if (folder / name).is_dir():
            named = linked.relative_to(folder.resolve()) if linked and linked.is_relative_to(folder.resolve()) else name
            raise Refusal(f"{key}={folder}: {named} is a folder, but a file is to be written there: move it.")
        in_place = name.endswith((".lock", ".csv"))  # others are replaced whole, whatever their own permissions
        if in_place and (folder / name).exists() and not os.access(folder / name, os.W_OK):
            raise Refusal(f"{key}={folder}: {name} cannot be written to: make it writable.")
    for name in folders:
        if (folder / name).exists() and (why := obstacle(folder / name)):
            raise Refusal(f"{key}={folder}: {why}, but {name} must be a folder that can be written to: move it.")
