"""A chart from its data: inline SVG in the colours of the page, which follow its light or dark scheme, or a PNG file.

Knows axes, lines, points, levels and bars; it knows no file, no metric and no paper.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.files import write_atomically
from diffusion.page.metrics_csv import Curve, thinned

# Names of colours. matplotlib writes the placeholder, the page puts its own variable there; a file takes the last one.
COLOURS = {
    "ink": ("#010203", "var(--ink)", "#1d1f23"),
    "q1": ("#010211", "var(--q1)", "#1b9e5a"),
    "q2": ("#010212", "var(--q2)", "#0f8fa6"),
    "q3": ("#010213", "var(--q3)", "#2f62c4"),
    "q4": ("#010214", "var(--q4)", "#8c3fa8"),
    "q5": ("#010216", "var(--q5)", "#c2337a"),
    "paper": ("#010215", "var(--warn)", "#8a5a00"),
}
TINTED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
LONG_NAME = 16  # letters of a name in a legend: with a longer one it stands below the chart
DOTTED = 24  # a line of no more points shows each


@dataclass(frozen=True)
class Series:
    """Values over x. kind: line (made short, with a band, if it is long), points (rings, joined by dashes), bars.

    name: for the legend; none if empty. tag: what its group in the SVG is called, after the title of the chart.
    """

    colour: str
    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"
    tag: str = ""


@dataclass(frozen=True)
class Level:
    """A horizontal line through the whole chart, with a band of `spread` to either side."""

    colour: str
    name: str
    value: float
    spread: float = 0.0
    tag: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn, and how.

    Args:
        title: above it. label, x_label: of the axes, units included.
        series, levels: what there is; empty series are left out.
        log, x_log: logarithmic axes, where all values are positive. zero: the vertical axis begins at 0.
        wide: over the whole width of the page.
        note: a sentence below it.
    """

    title: str
    label: str
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    x_label: str = "optimizer step"
    log: bool = False
    x_log: bool = False
    zero: bool = False
    wide: bool = False
    note: str = ""

    @property
    def drawn(self) -> list[tuple[Series, Curve]]:
        """The series that have points; lines made short."""
        whole = lambda s: Curve(list(s.x), list(s.y), list(s.y), list(s.y))  # noqa: E731
        return [(s, thinned(s.x, s.y) if s.kind == "line" else whole(s)) for s in self.series if len(s.x)]


def inline(chart: Chart) -> dict[str, Any] | None:
    """The chart as the page's template takes it; None if there is no point to draw.

    It has `title`, `svg` (to stand in the page as it is), `legend` [(colour, name, kind), ...], `wide`, `note`, and
    `over`, the name of its horizontal axis.
    """
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    if not chart.drawn:
        return None
    buffer = io.StringIO()
    with styled(chart, {name: placeholder for name, (placeholder, _, _) in COLOURS.items()}) as figure:
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue, which names an address
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'(?<=<svg)([^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)  # the page decides
    svg = re.sub(r'<g id="[\w.]+_\d+">', "<g>", svg)  # names that every chart of the page would have
    for placeholder, variable, _ in COLOURS.values():
        svg = svg.replace(placeholder, variable)
    shown = [(COLOURS[s.colour][1], s.name, s.kind) for s, _ in chart.drawn]
    shown += [(COLOURS[level.colour][1], level.name, "level") for level in chart.levels]
    legend = [entry for entry in shown if entry[1]]
    return {
        "title": chart.title, "svg": Markup(svg), "legend": legend, "wide": chart.wide, "note": chart.note,
        "over": chart.x_label,
    }  # fmt: skip


def save(chart: Chart, path: Path) -> Path:
    """The chart as a PNG file, with its title and legend, whole or not at all; its path.

    Raises:
        ValueError: there is no point to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not chart.drawn:
        raise ValueError(f"{path.name}: there is nothing to draw.")
    buffer = io.BytesIO()
    with styled(chart, {name: colour for name, (_, _, colour) in COLOURS.items()}) as figure:
        figure.set_facecolor("white")
        axes = figure.axes[0]
        axes.set_title(chart.title)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            below = max(map(len, labels)) > LONG_NAME
            place = {"loc": "outside lower center", "ncols": 2} if below else {"loc": "outside right upper"}
            if below:
                figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(labels) // 2))
            figure.legend(handles[::-1], labels[::-1], frameon=False, **place)
        FigureCanvasAgg(figure).print_figure(buffer, dpi=160, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path


@contextmanager
def styled(chart: Chart, colours: Mapping[str, str]) -> Iterator[Any]:
    """The matplotlib figure of a chart, inside of the style that it is to be written in."""
    from matplotlib import rc_context

    ink = {key: colours["ink"] for key in TINTED}
    thin = {key: 0.6 for key in ("axes.linewidth", "grid.linewidth", "xtick.major.width", "ytick.major.width")}
    style = ink | thin | {
        "svg.fonttype": "none", "svg.hashsalt": chart.title, "text.parse_math": False, "font.size": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
        "axes.grid": True, "grid.color": colours["ink"], "grid.alpha": 0.14,
    }  # fmt: skip
    with rc_context(style):
        yield figure_of(chart, colours)


def figure_of(chart: Chart, colours: Mapping[str, str]) -> Any:
    """A matplotlib figure of the chart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.3) if chart.wide else (4.9, 2.7), layout="constrained")
    axes, found = figure.add_subplot(), chart.drawn
    axes.set_axisbelow(True)
    for series, curve in reversed(found):  # the first on top
        draw(axes, series, curve, colours[series.colour], tagged(chart, series.tag))
    for level in chart.levels:
        draw_level(axes, level, colours[level.colour], tagged(chart, level.tag))
    values = [v for _, c in found for v in (*c.low, *c.high)]
    values += [v for level in chart.levels for v in (level.value - level.spread, level.value + level.spread)]
    bars = any(series.kind == "bars" for series, _ in found)
    scale(axes, "y", values, chart.log, 5)
    scale(axes, "x", [x for _, c in found for x in c.x], chart.x_log, 10 if bars else 6 if chart.wide else 4)
    if chart.zero and min(values) >= 0:
        axes.set_ylim(0, 1.06 * max(values) or 1)
    axes.set_xlabel(f"{chart.x_label}, log axis" if axes.get_xscale() == "log" else chart.x_label)
    axes.set_ylabel(f"{chart.label}, log axis" if axes.get_yscale() == "log" else chart.label)
    return figure


def tagged(chart: Chart, tag: str) -> str | None:
    """The name of a group in the SVG, which no other chart of a page has: fid-published."""
    return f"{re.sub(r'[^a-z0-9]+', '-', chart.title.lower()).strip('-')}-{tag}" if tag else None


def draw_level(axes: Any, level: Level, colour: str, tag: str | None) -> None:
    style = {"color": colour, "linewidth": 1.1, "linestyle": (0, (5, 3))}
    axes.axhline(level.value, label=level.name or None, gid=tag, **style)
    if level.spread:
        low, high = level.value - level.spread, level.value + level.spread
        axes.axhspan(low, high, color=colour, alpha=0.15, linewidth=0, gid=tag and f"{tag}-band")


def draw(axes: Any, series: Series, curve: Curve, colour: str, tag: str | None) -> None:
    label = series.name or None
    if series.kind == "bars":
        for i, bar in enumerate(axes.bar(curve.x, curve.mean, color=colour, width=0.7, label=label)):
            bar.set_gid(tag and f"{tag}-{i}")
    elif series.kind == "points":
        style = {"linestyle": (0, (1, 2)), "marker": "o", "markerfacecolor": "none", "markersize": 5.5, "linewidth": 1}
        axes.plot(curve.x, curve.mean, color=colour, label=label, gid=tag, **style)
    else:
        mark, width = "o" if len(curve.x) <= DOTTED else "", 1.5 if series.colour == "ink" else 1.1
        axes.plot(curve.x, curve.mean, color=colour, linewidth=width, marker=mark, markersize=3.2, label=label, gid=tag)
        if curve.low != curve.high:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)


def scale(axes: Any, which: str, values: Sequence[float], log: bool, ticks: int) -> None:
    """Linear or logarithmic, with few labelled ticks, written out and with thousands apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axis, low, high = getattr(axes, f"{which}axis"), min(values), max(values)
    if log and low > 0:
        getattr(axes, f"set_{which}scale")("log")
        marks = log_marks(high / low)
        axis.set_major_locator(LogLocator(subs=marks) if marks else MaxNLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        whole = which == "x" and all(float(v).is_integer() for v in values)
        axis.set_major_locator(MaxNLocator(ticks, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(written))


def written(value: float, _: Any = None) -> str:
    """A number at a tick: 20,000, 0.05, 1e-6."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def log_marks(ratio: float) -> tuple[float, ...]:
    """Multiples of the powers of ten to label on a logarithmic axis that spans this ratio; none: label it evenly."""
    for least, marks in ((1e3, (1,)), (30, (1, 2, 5)), (3, (1, 1.5, 2, 3, 5, 7))):
        if ratio > least:
            return marks
    return ()
