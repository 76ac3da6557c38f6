"""What the tasks of the laboratory are asked; the meaning of each setting stands in conf/lab.yaml."""

from dataclasses import dataclass
from typing import Annotated

from diffusion.settings import AtLeast, Between, Count, Distinct, Filled, Number, Positive, settings


@settings("equivalence")
@dataclass(frozen=True)
class Equivalence:
    num_images: Count
    num_steps: Count


@settings("forward")
@dataclass(frozen=True)
class Forward:
    num_points: Count
    frames: Number
    times: Annotated[list[Annotated[float, AtLeast(0)]], Distinct()] | None = None


@settings("reverse")
@dataclass(frozen=True)
class Reverse:
    num_steps: Count
    num_points: Count
    frames: Number


@settings("modes")
@dataclass(frozen=True)
class Modes:
    num_points: Count
    num_steps: Count
    confidence: Annotated[float, Between(0, 1, ends="()")]


@settings("errors")
@dataclass(frozen=True)
class Errors:
    num_steps: Annotated[list[Count], Distinct(), Filled("give two or more numbers of steps")]
    times: Count
    num_points: Annotated[int, AtLeast(2)]
    num_images: Annotated[int, AtLeast(4)]
    split: str | None = None


@settings("gaussian")
@dataclass(frozen=True)
class Gaussian:
    mean: list[float]
    stds: list[Positive]
    fitted_on: Count | None = None


Asked = Equivalence | Forward | Reverse | Modes | Errors
TASKS = {"equivalence": Equivalence, "forward": Forward, "reverse": Reverse, "modes": Modes, "errors": Errors}
