"""The published tables with results put in, each below the line it belongs to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusion.metrics.published.papers import SIGMA_HAT, TABLES
from diffusion.metrics.published.place import Place, Row, conditional, eta_of, places
from diffusion.metrics.published.table import Column, Table

SETTINGS = (
    "run",
    "step",
    "weights",
    "sampler",
    "eta",
    "variance",
    "spacing",
    "guidance_scale",
)  # that tell lines apart


@dataclass
class FilledLine:
    """A line to show: texts by column; `own`: it is a result's, with its differences from the published line."""

    title: str
    section: str
    own: bool
    cells: dict[Column, str] = field(default_factory=dict)
    differences: dict[Column, float] = field(default_factory=dict)


@dataclass
class Filled:
    """A table with results put in below the lines they belong to."""

    table: Table
    columns: list[Column]
    lines: list[FilledLine]


def filled(rows: Sequence[Row]) -> list[Filled]:
    """Every table that any of the rows has a place in, with these put in; in the papers' order."""
    found = [(place, row) for row in rows for place in places(row)]
    return [
        fill(table, [(p, row) for p, row in found if p.table is table])
        for table in TABLES
        if any(p.table is table for p, _ in found)
    ]


def fill(table: Table, placed: Sequence[tuple[Place, Row]]) -> Filled:
    columns = list(dict.fromkeys([*table.columns, *(place.column for place, _ in placed)]))
    if table.by_eta:
        columns.sort(key=lambda c: c.steps)
    below: dict[int, list[tuple[dict, FilledLine]]] = {}
    for place, row in placed:
        here = below.setdefault(line_before(table, place, row), [])
        settings = {k: row[k] for k in SETTINGS if row.get(k) is not None}
        if not table.by_eta and row.get("num_steps"):
            settings["num_steps"] = row["num_steps"]
        for known, line in here:
            if place.column not in line.cells and all(known.get(k, v) == v for k, v in settings.items()):
                known.update(settings)
                break
        else:
            known, line = settings, FilledLine("", "", own=True)
            here.append((known, line))
        line.cells[place.column] = value_text(place, row)
        if place.difference is not None:
            line.differences[place.column] = place.difference
    lines = []
    for i, published in enumerate(table.lines):
        pairs = zip(table.columns, published.figures, strict=True)
        cells = {c: f.text for c, f in pairs if f is not None}
        lines.append(FilledLine(published.title, published.section, False, cells))
        for known, line in below.get(i, ()):
            line.title, line.section = own_title(known, table), published.section
            lines.append(line)
    return Filled(table, columns, lines)


def line_before(table: Table, place: Place, row: Row) -> int:
    """The number of the published line below which a result is put."""
    if place.line is not None:
        return table.lines.index(place.line)
    if table.by_eta:
        return max((i for i, n in enumerate(table.lines) if noise(n.of["eta"]) <= noise(eta_of(row))), default=0)
    if conditional(row) and any(n.section == "Conditional" for n in table.lines):
        return max(i for i, n in enumerate(table.lines) if n.section == "Conditional")
    return len(table.lines) - 1


def noise(eta: float | str) -> float:
    """An order of eta: sigma hat adds the most noise."""
    return math.inf if eta == SIGMA_HAT else float(eta)


def value_text(place: Place, row: Row) -> str:
    """With as many decimals as the published figure has, and how far it is from it."""
    text = place.figure.text if place.figure is not None else ""
    decimals = len(text.partition("±")[0].partition(".")[2]) or 2
    std = f"±{row['is_std']:.2f}" if place.column.metric == "is" and row.get("is_std") is not None else ""
    difference = f" ({place.difference:+.{decimals}f})" if place.difference is not None else ""
    return f"{place.value:.{decimals}f}{std}{difference}"


def own_title(known: Mapping[str, Any], table: Table) -> str:
    """Which result this is: its run, step of training, and what of the sampler the line does not say."""
    words = [str(known.get("run", "this run"))]
    if known.get("step"):
        words.append(f"step {known['step']:,}")
    if known.get("weights") == "raw":
        words.append("raw weights")
    if known.get("sampler") and table.sampling is not None:
        eta = f" η = {known['eta']:g}" if known["sampler"] == "ddim" and known.get("eta") is not None else ""
        words.append(f"{known['sampler']}{eta}")
        if not table.by_eta and known.get("num_steps"):
            words.append(f"{known['num_steps']:,} steps")
    return ", ".join(words)
