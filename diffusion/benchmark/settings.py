"""The settings of the benchmarks. conf/benchmark.yaml describes each of them."""

from dataclasses import dataclass
from typing import Annotated

from diffusion.settings import AtLeast, Between, Count, settings


@settings("gpu_check")
@dataclass(frozen=True)
class GpuCheck:
    steps: Annotated[int, AtLeast(100)]


@settings("overhead")
@dataclass(frozen=True)
class Overhead:
    steps: Count
    rounds: Count


@settings("digests")
@dataclass(frozen=True)
class Digests:
    rounds: Count
    batch_size: Count
    images: Count
    image_size: Annotated[int, AtLeast(8)]


@settings("loader")
@dataclass(frozen=True)
class Loader:
    rounds: Count
    batches: Count
    batch_size: Count
    num_workers: Annotated[int, Between(0, 1024)]
    images: Count
    image_size: Annotated[int, AtLeast(8)]
    root: str | None
    cifar_images: Annotated[int, AtLeast(128)]
    cifar_root: str | None
    peers_python: str | None


TASKS = {"gpu_check": GpuCheck, "loader": Loader, "overhead": Overhead, "digests": Digests}
