"""From the words of `prepare` to a job, and back to words: what was made, and the command to train on it."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion.config import composer
from diffusion.config.composer import groups
from diffusion.config.words import nearest
from diffusion.data.digit_sets import SPLITS as DIGITS
from diffusion.data.prepare.image import Rule, most_bytes
from diffusion.data.prepare.plan import Job, Plan, first_sizes
from diffusion.data.prepare.shards import SHEET, SKIPPED
from diffusion.data.shards.index import Index
from diffusion.data.sources.opening import open_source
from diffusion.data.sources.source import shown
from diffusion.errors import Refusal
from diffusion.files import size_of
from diffusion.models.resolutions import nearest_resolutions, resolutions
from diffusion.progress import counted

MODELS = {"unet_8": (8, 2), "unet_32": (32, 8), "unet_64": (64, 16), "unet_256": (1 << 30, 32)}  # up to, multiple of
HISTOGRAM = 20  # classes listed, at most


def check_prepare(cfg: DictConfig) -> None:
    """Refuse combinations that cannot be."""
    if cfg.validation >= 1 and cfg.validation != int(cfg.validation):
        raise Refusal(f"validation={cfg.validation} is neither a share in [0, 1) nor a number.")
    if cfg.format == "jpeg" and cfg.quality is None:
        raise Refusal("format=jpeg loses something: say how much, as quality=95, or give format=png or format=webp.")
    if cfg.format == "png" and cfg.quality is not None:
        raise Refusal(f"quality={cfg.quality}, but format=png is without loss: give format=webp or format=jpeg.")
    if cfg.task == "make" and cfg.source is None:
        raise Refusal("source is needed: give source=PATH, or source=digits.")
    if cfg.task == "verify" and cfg.out is None and cfg.dataset is None:
        raise Refusal("task=verify needs out=FOLDER, or dataset=NAME.")
    if cfg.dataset is not None:
        if OmegaConf.is_missing(described(cfg.dataset), "name"):
            raise Refusal(
                f"dataset={cfg.dataset} is a base of other sets. Leave it out: the set gets the name of the source."
            )
        if (cfg.dataset in DIGITS) != (cfg.source == "digits") and cfg.task == "make":
            raise Refusal(
                f"dataset={cfg.dataset} and source={cfg.source}: source=digits makes dataset={' or '.join(DIGITS)}, "
                f"and nothing else does."
            )


def described(option: str, group: str = "data") -> DictConfig:
    """An option of a group, conf/data/NAME.yaml, with what it is based on."""
    if option not in groups()[group]:
        known = [name for name in groups()[group] if name != "shards"]
        raise Refusal(
            f"Unknown data set: dataset={option}.{nearest(option, known)} Known data sets: {', '.join(known)}."
        )
    return composer.option(group, option)


def name_of(cfg: DictConfig) -> str:
    """The data set's name: its dataset's, else the source's."""
    if cfg.dataset is not None:
        return str(described(cfg.dataset).name)
    name = re.sub(r"(\.tar)?\.\w+$", "", Path(cfg.source).resolve().name) if cfg.source is not None else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "images"


def out_of(cfg: DictConfig) -> Path:
    """The folder of the data set."""
    return Path(cfg.out if cfg.out is not None else f"data/{name_of(cfg)}")


def processes_of(cfg: DictConfig) -> int:
    """Processes to work with: those asked for, or the cores this process may use."""
    if cfg.processes is not None:
        return cfg.processes
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def job_of(cfg: DictConfig) -> Job:
    """The job: the source opened, the rule of the data set with the user's changes.

    Raises:
        ValueError: no source, images of several sizes without image_size, or other classes than the data set's.
    """
    known = described(cfg.dataset) if cfg.dataset is not None else None
    source = open_source(cfg.source, str(cfg.labels_from), most_bytes(cfg.max_pixels))

    def chosen(key: str, of_data_set: Any, otherwise: Any) -> Any:
        if cfg[key] is not None:
            return cfg[key]
        return otherwise if known is None else of_data_set

    size = chosen("image_size", known and known.image_size, None)
    crop, resize = (
        chosen("crop", known and known.rule.crop, "centre"),
        chosen("resize", known and known.rule.resize, "lanczos"),
    )
    if size is None:
        size, crop, resize = only_size(cfg, first_sizes(source, cfg.max_pixels)), "none", "none"
    rule = Rule(
        image_size=size, channels=chosen("channels", known and known.channels, 3), crop=crop, resize=resize,
        format=cfg.format, quality=cfg.quality, background=cfg.background, max_pixels=cfg.max_pixels,
    )  # fmt: skip
    classes = len(source.classes)
    if known is not None and known.num_classes and known.num_classes != classes and cfg.dataset != "images":
        raise Refusal(
            f"dataset={cfg.dataset} has {known.num_classes} classes, source={cfg.source} has {classes or 'no labels'}"
            f"{' (' + listed(source.classes) + ')' if classes else ''}."
        )
    labelled = classes > 0 and (known is None or cfg.dataset == "images" or known.num_classes > 0)
    return Job(
        out_of(cfg), name_of(cfg), source, str(cfg.source), rule, labelled, cfg.validation, cfg.shard_samples,
        cfg.on_bad_sample == "skip", cfg.max_bad_share,
    )  # fmt: skip


def only_size(cfg: DictConfig, sizes: dict[tuple[int, int], int]) -> int:
    """The size of all images looked at, where they are squares of one size."""
    if not sizes:
        raise Refusal(f"source={cfg.source}: none of the first images can be read. image_size=... goes on regardless.")
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        met = listed([f"{width}x{height}" for width, height in sorted(sizes)])
        raise Refusal(f"image_size is needed: the images of source={cfg.source} are {met}. Give image_size=64, say.")
    return next(iter(sizes))[0]


# ---- words ----


def listed(names: list[str] | tuple[str, ...], most: int = 4) -> str:
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def introduction(job: Job, plan: Plan) -> str:
    """What is about to be done."""
    rule = job.rule
    loss = "without loss" if rule.quality is None else f"at quality {rule.quality}"
    classes = len(job.source.classes) if job.labelled else 0
    dropped = f"; its {len(job.source.classes)} classes are left out" if job.source.classes and not job.labelled else ""
    splits = ", ".join(f"{split} {count:,}" for split, count in plan.counts.items())
    return "\n".join(
        [
            f"Making {job.out}",
            f"  from    {job.origin}: {job.source.kind}{dropped}",
            f"  images  {rule.image_size}x{rule.image_size}, {counted(rule.channels, 'channel', 'channels')}, "
            + (f"{classes} classes ({listed(job.source.classes)})" if classes else "no labels"),
            f"  rule    crop {rule.crop}, resize {rule.resize}, {rule.format} {loss}; "
            "an image that has the size is kept as it is",
            f"  splits  {splits}; {counted(len(plan.ranges), 'shard', 'shards')}",
        ]
    )


def report(job: Job, summary: dict[str, Any], train: str) -> str:
    """Return a summary: what was created, what was left out, where to look, and what to do next."""
    rule, images = job.rule, sum(summary["images"].values())
    splits = ", ".join(f"{split} {count:,}" for split, count in summary["images"].items())
    fresh = images - summary["original"]
    lines = [
        f"{job.out}: {images:,} images of {rule.image_size}x{rule.image_size} ({splits}) "
        f"in {counted(summary['shards'], 'shard', 'shards')}, {size_of(summary['bytes'])}",
        f"  from     {job.origin}: {summary['original']:,} kept unchanged, {fresh:,} re-encoded"
        + (f", {summary['enlarged']:,} of them enlarged" if summary["enlarged"] else ""),
    ]
    if summary["skipped"]:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in list(summary["reasons"].items())[:5])
        lines.append(f"  skipped  {summary['skipped']:,}, listed in {job.out / SKIPPED}: {reasons}")
    else:
        lines.append("  skipped  none")
    if summary["ignored"]:
        lines.append(f"  ignored  {summary['ignored']:,} that are no images: {listed(job.source.ignored, 3)}")
    for split, counts in summary["classes"].items():
        if counts:
            lines += histogram(split, job.source.classes, counts)
    lines += [f"  look at  {job.out / SHEET}", "", f"Train on it: {train}"]
    return "\n".join(lines)


def histogram(split: str, classes: tuple[str, ...], counts: list[int]) -> list[str]:
    """A line and a bar for each class; for many classes their range."""
    if len(counts) > HISTOGRAM:
        return [f"  {split}: {len(counts)} classes of {min(counts):,} to {max(counts):,} images"]
    names = [shown(name) for name in classes]
    width = max(len(name) for name in names)
    bars = [
        f"  {name:{width}}  {n:>7,}  {'#' * round(30 * n / max(*counts, 1))}"
        for name, n in zip(names, counts, strict=True)
    ]
    return [f"  {split}:", *("  " + bar.rstrip() for bar in bars)]


def train_command(cfg: DictConfig, job: Job) -> str:
    """The command that trains on the set, with all that it needs to be told."""
    size, channels = job.rule.image_size, job.rule.channels
    classes = len(job.source.classes) if job.labelled else 0
    experiment = cfg.dataset if cfg.dataset in groups()["experiment"] else "images"
    words, name = [f"+experiment={experiment}"], job.name
    known = described(cfg.dataset if experiment != "images" else "images")
    if experiment == "images" and name != "images":
        words += [f"name={name}", f"data.name={name}"]
    if job.out != Path(f"data/{name}"):
        words.append(f"data.root={job.out}")
    found = {"image_size": size, "channels": channels, "num_classes": classes}
    words += [f"data.{key}={value}" for key, value in found.items() if known[key] != value]
    if experiment == "images" or known.image_size != size:
        words += model_words(size)
    return " ".join(["python -m diffusion.train", *(shlex.quote(word) for word in words)])


def model_words(size: int) -> list[str]:
    """The words that choose a network for images of this size, its levels and attention fitted where they must be."""
    option = next((m for m, (most, multiple) in MODELS.items() if size <= most and size % multiple == 0), "unet_8")
    words, model = [f"model={option}"], described(option, "model")
    multipliers, attention = list(model.multipliers), list(model.attention_resolutions)
    there = resolutions(size, len(multipliers))
    if len(there) < len(multipliers):
        words.append(f"model.multipliers={listing(multipliers[: len(there)])}")
    if not set(attention) <= set(there):
        words.append(f"model.attention_resolutions={listing(nearest_resolutions(size, len(there), attention))}")
    return words


def listing(numbers: list[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"


def verdict(index: Index, wrong: list[str]) -> str:
    """The result of task=verify."""
    images = sum(shard.samples for shard in index.shards)
    if not wrong:
        shards = counted(len(index.shards), "shard", "shards")
        return f"{index.root}: no damage found: {counted(images, 'image', 'images')} in {shards}."
    return "\n".join([f"error: {index.root} is damaged; prepare it again.", *(f"  {line}" for line in wrong)])
