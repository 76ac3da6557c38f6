"""Scores of images against real ones: the same code during training, at its end, and in the commands."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion.distributed.ranks import Ranks
from diffusion.files import Room, obstacle, reason
from diffusion.metrics.extractors import Extractor, Features
from diffusion.metrics.metric import Metric, scores
from diffusion.metrics.moments import BLOCK, Moments
from diffusion.metrics.nearest import neighbours
from diffusion.metrics.reference import Reference, kept_numbers, path_of, size_in_file, store, stored
from diffusion.progress import Progress
from diffusion.scoring.pictures import grid, save_png
from diffusion.scoring.sampling import steps_in_words

VERSIONED = ("torch", "pytorch-lightning", "torchmetrics", "torch-fidelity", "numpy")
READ = 256  # images decoded at a time


class ImageSet(Protocol):
    """Images by number: a split of a data set, or files."""

    def __len__(self) -> int: ...

    def batch(self, numbers: np.ndarray) -> tuple[Tensor, Tensor | None, Any]:
        """uint8 (b, C, H, W), labels int64 (b,) or None, and, if the set skips what is damaged, bool (b,): another
        image stands in."""


# ---- features of a set, by all ranks ----


class Block(NamedTuple):
    """Features and labels of BLOCK images, and whether another image stood in for one of them."""

    features: Features
    labels: Tensor | None
    damaged: bool


def blocks(images: ImageSet, extractor: Extractor, ranks: Ranks, title: str) -> Iterator[Block]:
    """One after the other, in order, on rank 0; other ranks help and get none."""
    count = len(images)
    firsts = range(0, count, BLOCK)

    def one(first: int) -> Block:
        parts, labels, damaged = [], [], False
        for start in range(first, min(first + BLOCK, count), READ):
            ranks.attend()
            numbers = np.arange(start, min(start + READ, first + BLOCK, count))
            pixels, given, stand_ins = images.batch(numbers)
            parts.append(extractor.rows(pixels, start))
            labels.append(given)
            damaged |= stand_ins is not None and bool(stand_ins.any())
        return Block(Features.joined(parts), None if labels[0] is None else torch.cat(labels), damaged)

    progress = Progress(title, count, ranks=ranks.size, shown=ranks.main)
    with progress:
        for turn in range(0, len(firsts), ranks.size):
            mine, found = turn + ranks.rank, []
            with ranks.together():
                found = [one(firsts[mine])] if mine < len(firsts) else []
            collected = [block for part in ranks.collected(found) for block in part]
            progress.add(len(found[0].features.pooled) if found else 0)
            yield from collected


def features_of(images: ImageSet, extractor: Extractor, ranks: Ranks) -> tuple[Features, Tensor | None] | None:
    """Features and labels of all images on rank 0; None on the others, which help."""
    found = list(blocks(images, extractor, ranks, "features"))
    if not ranks.main:
        return None
    labels = None if not found or found[0].labels is None else torch.cat([block.labels for block in found])
    return Features.joined(block.features for block in found), labels


def reference_of(
    images: ImageSet,
    extractor: Extractor,
    ranks: Ranks,
    about: Mapping[str, Any] | None = None,
    folders: Sequence[Path] = (),
    read_only: Sequence[Path] = (),
) -> Reference | None:
    """What images are held against, on rank 0; None on the others, which help.

    Args:
        about: what decides it beside the extractor, as JSON; with it, it is read from a file or kept in one, unless
            other images stand in for damaged ones.
        folders: where such a file may be; the first that can be written to and has room gets it. If none has, it is
            worked out again the next time, which is said. read_only: where it may be as well, and is never written.
    """
    known = None
    if about is not None:
        about = {**about, "extractor": extractor.name, "extractor_sha256": extractor.digest, "images": len(images)}
        about |= {"channels": extractor.channels, "rounding": "nearest", "kept": len(kept_numbers(len(images)))}
        if ranks.main:
            found = (stored(path_of(folder, about), about) for folder in (*folders, *read_only))
            known = next((reference for reference in found if reference is not None), None)
    if ranks.from_main(known is not None):
        return known
    wanted, sums, features, labels, first, damaged = kept_numbers(len(images)), [], [], [], 0, False
    for block in blocks(images, extractor, ranks, "reference"):
        pooled = block.features.pooled
        sums = [Moments.joined([*sums, Moments.of_block(pooled)])]
        here = wanted[(wanted >= first) & (wanted < first + len(pooled))] - first
        features.append(pooled[here])
        labels.append(None if block.labels is None else block.labels[here])
        first, damaged = first + len(pooled), damaged or block.damaged
    if not ranks.main:
        return None
    if not sums:
        raise ValueError("There are no real images to score against.")
    all_labels = None if labels[0] is None else torch.cat(labels)
    made = Reference(sums[0], torch.cat(features), wanted, all_labels)
    if about is not None and not damaged:
        keep(made, about, folders)
    return made


def keep(made: Reference, about: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Write it to the first of the folders that takes it; a line if none does."""
    reasons = []
    for folder in folders:
        if lack := obstacle(folder) or Room("", folder, size_in_file(made), "the features of the real images").lack:
            reasons.append(lack.removeprefix("=").rstrip("."))
            continue
        try:
            return store(path_of(folder, about), about, made)
        except OSError as error:
            reasons.append(reason(error).rstrip("."))
    if folders:
        print(f"The features of the real images are not kept: {'; '.join(reasons)}.", file=sys.stderr, flush=True)


# ---- lines of results.jsonl ----


def score(
    features: Features,
    extractor: Extractor,
    reference: Reference,
    metrics: Mapping[str, Metric],
    record: Mapping[str, Any],
    paper: Mapping[str, float | None] | None = None,
    labels: Tensor | None = None,
    working: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Lines of results.jsonl, one a metric: value, the paper's value, number of images, and how all was made.

    Args:
        features: of the images, in their order.
        reference: the real images.
        metrics: by their names.
        record: what is known of the images: sampler, steps, nfe, seed, step of training, weights.
        paper: published values by metric.
        labels: of the images; with them, also the values of each class.
        working: called now and then.
    """
    rows, number = [], len(features.pooled)
    for name, values in scores(metrics, features, reference).items():
        working()
        metric = metrics[name]
        about: dict[str, Any] = {**values, **metric.real(reference, number)}
        if labels is not None and (each := metric.by_class(features, labels, reference, working)) is not None:
            about["per_class"] = each
        rows.append(
            {
                "metric": extractor.title(metric.title), "name": name, "value": about.pop(name), **about,
                "reference": (paper or {}).get(name), "num_images": number,
                "num_reference": reference.moments.count, **record,
                "extractor": extractor.name, "extractor_sha256": extractor.digest, "rounding": "nearest",
                **made_by(),
            }
        )  # fmt: skip
    return rows


def made_by() -> dict[str, Any]:
    """The commit of this package and the versions of others, for the record."""
    return {"commit": commit(), "versions": {name: version(name) for name in VERSIONED}}


def describe(row: Mapping[str, Any]) -> str:
    """One line for a person: digits-FID 3.21 (500 images, ddim, 50 steps; between real images 8.6 ± 0.3)."""
    beside = next((row[key] for key in (f"{row['name']}_std", "standard_error") if row.get(key) is not None), None)
    value = f"{row['value']:.4g}" + ("" if beside is None else f" ± {beside:.2g}")
    paper = f", paper {row['reference']}" if row.get("reference") is not None else ""
    how = f", {row['sampler']}, {steps_in_words(row)}" if "sampler" in row else ""
    floor = ""
    if "real_value" in row:
        few = f" of {row['real_images']}" if row["real_images"] != row["num_images"] else ""
        floor = f"; between real images{few} {row['real_value']:.3g} ± {row['real_std']:.2g}"
    return f"{row['metric']} {value} ({row['num_images']} images{how}{paper}{floor})"


def save_neighbours(
    path: Path, images: Tensor, features: Tensor, reference: Reference, real: ImageSet, count: int = 7
) -> None:
    """A picture with a row for each image: the image, a gap, and the real ones nearest to it, nearest first.

    Args:
        images: uint8 (N, C, H, W). features: (N, F), theirs.
        real: the set that the reference is of. count: neighbours of each.
    """
    _, rows = neighbours(features, reference, count)
    columns = 2 + rows.shape[1]
    numbers = reference.numbers[rows.flatten()].numpy()
    pixels, *_ = real.batch(numbers)
    near = pixels.reshape(*rows.shape, *images.shape[1:])
    gap = torch.full_like(images, 24)[:, None]  # the colour of the grid's own lines
    save_png(grid(torch.cat([images[:, None], gap, near], dim=1).flatten(0, 1), columns), path)


def commit() -> str | None:
    """The commit of the checkout this package lies in, with + where files differ from it; None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *a], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")) != folder:
            return None
        return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
