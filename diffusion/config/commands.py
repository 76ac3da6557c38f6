"""What the settings of each command that belong to no group may be; their meaning and defaults stand in conf/."""

from dataclasses import dataclass
from typing import Annotated, Literal

from diffusion.data.prepare.image import Background, Crop, Resize, Stored
from diffusion.settings import AtLeast, Between, Count, Distinct, Each, Filled, Matching, Number, Seed, Share

Labels = Annotated[list[int], Each(AtLeast(0), "class numbers, from 0 on")]
Average = bool | Annotated[float, Between(0, 1, ends="[)")]
Trust = Annotated[list[str], Each(Matching(r"[A-Za-z_][\w.]*", "name of a module"), "names of modules, as [mine]")]
Metrics = Annotated[list[str], Distinct()]


@dataclass(frozen=True)
class Command:
    seed: Seed
    debug: bool


@dataclass(frozen=True)
class Train(Command):
    name: str
    run_dir: str
    deterministic: bool
    log_every: Count
    on_nonfinite: Literal["stop", "skip"]
    max_nonfinite: Number
    fingerprint_every: Number
    metrics: Metrics


@dataclass(frozen=True)
class Sample(Command):
    checkpoint: str
    out: str
    num_images: Count
    labels: Labels
    ema: Average
    trust: Trust
    batch_size: Count
    grid_images: Count
    png: bool
    overwrite: bool


@dataclass(frozen=True)
class Data:
    """The group `data` of the commands that read a checkpoint's data set."""

    root: str | None


@dataclass(frozen=True)
class Evaluate(Command):
    task: Literal["score", "sweep"]
    checkpoint: str | None
    images: str | None
    images_split: str
    reference: str | None
    split: str
    metrics: Metrics
    per_class: bool
    neighbours: Number
    num_images: Count
    ema: Average
    trust: Trust
    batch_size: Count
    samples: str | None
    overwrite: bool
    out: str | None


@dataclass(frozen=True)
class Lab(Command):
    task: Literal["equivalence", "forward", "reverse", "modes", "errors"]
    checkpoint: str | None
    ema: Average
    trust: Trust
    out: str | None
    toy: Literal["modes", "rings", "moons", "checkerboard", "gaussian"] | None
    samplers: Annotated[list[str], Distinct(), Filled("give some of the group sampler")]
    batch_size: Count


@dataclass(frozen=True)
class Prepare(Command):
    task: Literal["make", "verify"]
    source: str | None
    dataset: str | None
    out: str | None
    image_size: Annotated[int, Between(1, 8192)] | None
    channels: Literal[1, 3] | None
    crop: Crop | None
    resize: Resize | None
    background: Background | None
    labels_from: str
    validation: Annotated[float, AtLeast(0)]
    format: Stored
    quality: Annotated[int, Between(1, 100)] | None
    shard_samples: Count | None
    on_bad_sample: Literal["error", "skip"]
    max_bad_share: Share
    max_pixels: Count
    processes: Count | None


@dataclass(frozen=True)
class Report(Command):
    task: Literal["make", "compare"]
    runs: str
    run_dir: str | None
    other: str | None
    out: str | None


@dataclass(frozen=True)
class Benchmark(Command):
    task: Literal["gpu_check", "loader", "overhead", "digests"]
    out: str | None
