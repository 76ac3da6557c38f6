"""A sweep over eta and steps, as DDIM's Table 1 has it: FID against the number of network calls, and as a table.

Rows are those of sweep.csv: eta, num_steps, nfe, fid and what else is known (data, sampler, variance, num_images, ...),
as numbers or as the words of a CSV file. Where the papers have figures for the same data these stand beside. Of two
rows of the same line and number of steps the later counts.

A line is an eta of DDIM, sigma hat, or a sampler of `sweep.samplers`, by its `words` ("heun clip_x0=false").
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.metrics.published import Column, Figure, Table, aligned, common, deviations, places
from diffusion.metrics.published.place import data_of, eta_of, tables_about
from diffusion.page.chart import Chart, Series, save
from diffusion.page.metrics_csv import number

NUMBERS = (
    "eta",
    "num_steps",
    "visits",
    "nfe",
    "fid",
    "num_images",
    "num_reference",
    "guidance_scale",
    "step",
    "parameters",
)
COLOURS = ("q3", "q1", "q2", "q4", "ink", "paper")

Row = Mapping[str, Any]


class Point(NamedTuple):
    """One row: its line, an eta or sigma hat or the words of another sampler; steps, network calls an image, FID, and
    the published FID of the same."""

    line: float | str
    steps: int
    nfe: float
    fid: float
    published: Figure | None
    row: dict[str, Any]


def points(rows: Sequence[Row]) -> list[Point]:
    """The rows that have a FID, by line and steps."""
    found: dict[tuple, Point] = {}
    for row in map(result, rows):
        line, steps, fid = line_of(row), row.get("num_steps"), row.get("value")
        if line is None or not steps or fid is None:
            continue
        published = next((p.figure for p in places(row) if p.table.by_eta), None)
        found[line, steps] = Point(line, steps, row.get("nfe") or float(steps), fid, published, row)
    return sorted(found.values(), key=lambda p: (order(p.line), str(p.line), p.steps))


def line_of(row: Row) -> float | str | None:
    """The words of the sampler where the sweep has named it (former versions: its class), else its eta, or sigma
    hat."""
    if row.get("words"):
        return str(row["words"])
    return eta_of(row) if row.get("sampler") in ("ddim", "ancestral") else row.get("sampler")


def order(line: float | str) -> float:
    return math.inf if isinstance(line, str) else line


def result(row: Row) -> dict[str, Any]:
    """A row of the sweep as the line of results.jsonl that its FID would be."""
    read = {name: number(str(row[name])) for name in NUMBERS if row.get(name) not in (None, "")}
    read = {k: int(v) if v.is_integer() and k != "eta" else v for k, v in read.items() if math.isfinite(v)}
    words = {k: v for k, v in row.items() if k not in NUMBERS and v not in (None, "")}
    if isinstance(words.get("clip_x0"), str):
        words["clip_x0"] = words["clip_x0"].lower() == "true"
    found = {"sampler": "ddim", "metric": "FID", "extractor": "inception"} | words | read | {"name": "fid"}
    return found | {"value": read.get("fid")}


def published_table(rows: Sequence[Row]) -> Table | None:
    """The published table over eta and steps of the data that the rows are about."""
    found = [t for row in rows for t in tables_about(data_of(row)) if t.by_eta]
    return found[0] if found else None


def title_of(line: float | str) -> str:
    return line if isinstance(line, str) else f"η = {line:g}"


def sweep_chart(rows: Sequence[Row]) -> Chart | None:
    """FID against network calls, both axes logarithmic, a line for each sampler; rings where the papers have figures
    for the same data and eta. None without a row that has a FID."""
    found = points(rows)
    if not found:
        return None
    table, series, labels = published_table(rows), [], []
    for i, line in enumerate(dict.fromkeys(p.line for p in found)):
        mine, colour = [p for p in found if p.line == line], COLOURS[i % len(COLOURS)]
        series.append(Series(colour, title_of(line), [p.nfe for p in mine], [p.fid for p in mine], tag=f"run-{i}"))
        figures = published_line(table, eta_of(mine[0].row)) if any(p.published for p in mine) else []
        if figures:
            x, y = [float(c.steps or 0) for c, _ in figures], [f.value for _, f in figures]
            labels.append(Series(colour, f"{title_of(line)}, published", x, y, kind="points", tag=f"published-{i}"))
    source = f"Rings: {table.source}." if labels and table is not None else ""
    return Chart(
        "FID over network calls", "FID", [*series, *labels], x_label="network calls an image", log=True,
        x_log=True, wide=True, note=source,
    )  # fmt: skip


def published_line(table: Table | None, eta: float | str | None) -> list[tuple[Column, Figure]]:
    """(column, figure) of the published line of an eta."""
    line = next((n for n in table.lines if n.of["eta"] == eta), None) if table is not None else None
    pairs = zip(table.columns, line.figures, strict=True) if line is not None else ()
    return [(c, f) for c, f in pairs if f is not None]


def sweep_figure(rows: Sequence[Row], path: Path) -> Path:
    """`sweep_chart` as a PNG file; its path.

    Raises:
        ValueError: no row has a FID.
    """
    chart = sweep_chart(rows)
    if chart is None:
        raise ValueError(f"{path.name}: no row of the sweep has a FID.")
    return save(chart, path)


def sweep_grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(column titles, lines): a line for each sampler, a column for each number of steps, with the published value in
    brackets; two empty lists without a row that has a FID."""
    found = points(rows)
    steps = sorted({p.steps for p in found})
    at = {(p.line, p.steps): p for p in found}
    lines = []
    for line in dict.fromkeys(p.line for p in found):
        cells = [at.get((line, s)) for s in steps]
        lines.append([title_of(line), *("" if p is None else cell_text(p) for p in cells)])
    return (["", *(f"{s:,} steps" for s in steps)] if found else []), lines


def cell_text(point: Point) -> str:
    return f"{point.fid:.2f}" + (f" [{point.published.text}]" if point.published is not None else "")


def sweep_table_text(rows: Sequence[Row]) -> str:
    """The sweep in the shape of DDIM's Table 1, for a terminal, with what was done otherwise than there. Empty without
    a row that has a FID."""
    titles, lines = sweep_grid(rows)
    if not lines:
        return ""
    found, table = points(rows), published_table(rows)
    beside = [p.row for p in found if p.published is not None]
    data = next((data_of(p.row) for p in found), "")
    head = "FID" + (f" on {data}" if data else "")
    if beside and table is not None:
        head += f"; in brackets: {table.source}"
    parts = ["\n".join([head, *aligned([titles, *lines])])]
    otherwise = common(beside, deviations)
    if otherwise:
        parts.append("\n".join(["Not as in the paper:", *(f"  - {sentence}" for sentence in otherwise)]))
    return "\n\n".join(parts)
