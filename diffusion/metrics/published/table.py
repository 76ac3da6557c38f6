"""What a published table is made of: figures as printed, columns, lines, and how its samples were made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A figure as printed: "9.46±0.11", "≤3.75", "unstable" (the paper's own word for a training that failed).

    value: None where the paper has none. std: what stands after the ±.
    """

    text: str
    value: float | None
    std: float | None = None


def printed(text: str) -> Figure | None:
    """A figure from how it is printed; None for a dash."""
    found = re.fullmatch(r"≤?([0-9.]+)(?:±([0-9.]+))?", text)
    if found is None:
        return None if text == "-" else Figure(text, None)
    return Figure(text, float(found[1]), float(found[2]) if found[2] else None)


@dataclass(frozen=True)
class Column:
    """What a column holds.

    metric: as `name` in results.jsonl. data: as in conf/data. split: of the real images that FID is taken against, or
    of the images that bits/dim are of. steps: of the sampler, in a table over steps. value: the field of a result that
    belongs here. likelihood: bound or ode, of bits/dim.
    """

    title: str
    metric: str
    data: str
    split: str = "train"
    steps: int | None = None
    value: str = "value"
    likelihood: str = "bound"


@dataclass(frozen=True)
class Line:
    """One line: its title, a figure or None for each column, and by which facts a result is the same thing (see
    `place.facts`; none: it is of another model)."""

    title: str
    figures: tuple[Figure | None, ...]
    of: Mapping[str, Any] = field(default_factory=dict)
    section: str = ""


@dataclass(frozen=True)
class Sampling:
    """How the samples of a table were made; what is None differs between its lines, or does not matter.

    samplers: class names in lower case. variance: small or large. spacing: of the visited times.
    """

    samplers: tuple[str, ...]
    num_steps: int | None = None
    variance: str | None = None
    spacing: str | None = None
    clip_x0: bool | None = None


@dataclass(frozen=True)
class Table:
    """A table, or the part of one that is about one data set.

    paper, place: where it stands. sampling: None for figures that need no samples. any_sampler: it is the one to look
    at for a result whose sampler no table is about. only_alike: a result that is like none of the lines has no place.
    """

    title: str
    paper: str
    place: str
    image_size: int
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    sampling: Sampling | None = None
    any_sampler: bool = False
    only_alike: bool = False
    note: str = ""

    @property
    def source(self) -> str:
        return f"{self.paper}, {self.place}"

    @property
    def by_eta(self) -> bool:
        """Whether it has a line for each eta and a column for each number of steps."""
        return self.columns[0].steps is not None


def line(title: str, figures: str, section: str = "", **of: Any) -> Line:
    """A line from its figures as printed, with blanks between them."""
    return Line(title, tuple(map(printed, figures.split())), of, section)
