"""From the files of a run to a page a person reads, and from the scores of many runs to one table.

    write_report(folder)       report.html of one run: summary, samples, scores, curves, settings, versions
    write_table(rows, path)    the lines of many results.jsonl in one sortable table

A page is one file that opens from disk: pictures are data: URIs, curves are inline SVG, nothing is loaded from
elsewhere. What a run has not made (yet) is left out with one quiet line. This module knows file formats and column
names; it knows no network, no sampler and no torch, and computes nothing but differences from the paper's figures.
"""

import base64
import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, Protocol

from diffusion.files import replacing

PUBLISHED_IMAGES = 50_000  # that published FID and IS are of
FROM_IMAGES = ("fid", "is", "kid", "precision", "recall")  # scores that depend on extractor and number of images
HIGHER_IS_BETTER = ("is", "precision", "recall")
LOWER_IS_BETTER = ("fid", "kid", "bits_per_dim")
MAX_POINTS = 240  # of a curve; a longer one becomes means over stretches, with a band from the lowest to the highest
MAX_THUMBNAILS = 12
THUMBNAIL_PIXELS = 320
NOTHING = "–"
MAX_EMBEDDED = 4_000_000  # bytes of a PNG that goes into the page as it is; a larger one is recoded as JPEG

# Colours that matplotlib writes, and what stands for them in the page: so curves follow its light or dark scheme.
INK, LINES = "#010203", ("#010211", "#010212", "#010213", "#010214")
IN_PAGE = {INK: "var(--ink)"} | {colour: f"var(--q{i})" for i, colour in enumerate(LINES, 1)}

Row = dict[str, Any]


class Run(Protocol):
    """What the page reads of a run's folder, and where it goes."""

    path: Path
    metrics_path: Path
    report_path: Path
    samples: Path

    def config(self) -> dict | None: ...
    def results(self) -> list[dict]: ...
    def steps(self) -> list[int]: ...


def write_report(folder: Run) -> Path:
    """Write the run's report.html, whole or not at all; its path.

    Pieces that are missing (no scores, no samples, no metrics.csv, even no config.yaml) are left out.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.path.is_dir():
        raise ValueError(f"run_dir={folder.path}: there is no such folder.")
    config, steps, metrics = folder.config() or {}, folder.steps(), Metrics.read(folder.metrics_path)
    results = sorted(folder.results(), key=lambda r: r.get("step") or 0, reverse=True)  # stable: newest step first
    step = max([*steps[:1], *metrics.steps[-1:]], default=None)
    scored = results[0].get("step") if results else None
    newest, others, unread = pictures(folder.samples)
    page = {
        "title": config.get("name") or folder.path.resolve().name,
        "summary": summary(config, step),
        "figures": figures_of_training(config, step, metrics, results),
        "newest": newest,
        "others": others,
        "unread": unread,
        "scores": score_table([r for r in results if r.get("step") == scored]),
        "earlier": score_table([r for r in results if r.get("step") != scored]),
        "warnings": warnings(results),
        "curves": curves(config, metrics, results),
        "notes": metrics.notes,
        "settings": settings(config),
        "origin": origin(results),
    }
    write(folder.report_path, "page.html", page)
    return folder.report_path


def write_table(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Write the scores of several runs as one sortable page, whole or not at all; its path.

    Args:
        rows: lines of results.jsonl, each with `run`, its name, and, if its report is to be linked, `report`, a
            relative address. They are shown in the order given.
    """
    write(path, "runs.html", {"title": title, "scores": score_table(rows, with_run=True), "warnings": warnings(rows)})
    return path


def write(path: Path, template: str, values: Mapping[str, Any]) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with replacing(path) as file:
        file.write(environment.get_template(template).render(values).encode())


# ---- words and figures ----


def shown(value: Any) -> str:
    """A value as a person reads it: 12,345, 3.142, yes, linear; a dash for what is not there."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def duration(seconds: float) -> str:
    """82 ms, 12 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{:,} h {} min".format(*divmod(round(seconds / 60), 60))


def counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def get(config: Mapping[str, Any], key: str) -> Any:
    """config['a']['b'] for 'a.b'; None where any of it is absent."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def summary(config: Mapping[str, Any], step: int | None) -> str:
    """What was trained on what, for how long, in a sentence or two."""
    if not config:
        return "This folder has no config.yaml: what was trained is not known."
    network = (get(config, "model._target_") or "a network").rpartition(".")[2]
    size, channels, classes = (get(config, f"data.{k}") for k in ("image_size", "channels", "num_classes"))
    what = [f"{size}×{size} pixels"] if size else []
    what += [counted(channels, "channel", "channels")] if channels else []
    what += [counted(classes, "class", "classes")] if classes else []
    images = f"{get(config, 'data.name') or 'images'}" + (f" ({', '.join(what)})" if what else "")
    kind = "conditional " if get(config, "model.num_classes") else ""
    target, limit = get(config, "objective.prediction"), get(config, "trainer.max_steps")
    begun = "not trained yet" if not step else f"trained for {step:,}" + (f" of {limit:,}" if limit else "") + " steps"
    text = f"A {kind}{network}" + (f" that predicts {target}" if target else "") + f", {begun} on {images}."
    decay = get(config, "ema.decay")
    if decay is not None:
        ramp = " after a ramp" if get(config, "ema.warmup") else ""
        text += f" Samples show the averaged weights (decay {decay}{ramp}); so do scores that do not say otherwise."
    return text


def figures_of_training(config: Mapping, step: int | None, metrics: "Metrics", results: list[Row]) -> list[tuple]:
    """(name, value) of what a person asks first: steps, images, speed, time, size."""
    batch, limit = get(config, "data.batch_size"), get(config, "trainer.max_steps")
    found: list[tuple[str, str]] = []
    if step is not None:
        found.append(("steps", f"{step:,}" + (f" of {limit:,}" if limit and limit != step else "")))
    if step is not None and batch:
        found += [("images a step", shown(batch)), ("images seen", f"{step * batch:,}")]
    at, rates = metrics.curve("train/images_per_second")
    if any(rate > 0 for rate in rates) and batch:
        timed = [(b - a, rate) for a, b, rate in zip([0, *at[:-1]], at, rates, strict=True) if rate > 0]
        rates, spent = [rate for _, rate in timed], sum(n * batch / rate for n, rate in timed)
        found += [("images/s", shown(float(f"{median(rates):.3g}")))]
        found += [("time a step", duration(batch / median(rates))), ("training time", duration(spent))]
    size = next((r["parameters"] for r in results if r.get("parameters")), None)
    if size:
        found.append(("parameters", shown(size)))
    return found


# ---- scores ----


def title_of(row: Row) -> str:
    """digits-FID ↓: the arrow points to the better side, where it is known."""
    name = row.get("name")
    arrow = " ↓" if name in LOWER_IS_BETTER else " ↑" if name in HIGHER_IS_BETTER else ""
    return f"{row.get('metric', name)}{arrow}"


def not_comparable(row: Row) -> str | None:
    """Why a score must not be held against published ones, in a word or two; None if it may."""
    if row.get("name") not in FROM_IMAGES:
        return None
    few = (row.get("num_images") or 0) < PUBLISHED_IMAGES
    reasons = ["extractor"] * (row.get("extractor") != "inception") + ["too few images"] * few
    return ", ".join(reasons) or None


def difference(row: Row) -> float | None:
    """Value minus the paper's value."""
    value, reference = row.get("value"), row.get("reference")
    return None if value is None or reference is None else value - reference


def warnings(rows: Sequence[Row]) -> list[str]:
    """Which scores cannot be held against published ones, and why, once each in plain words."""
    rows = [r for r in rows if r.get("name") in FROM_IMAGES]
    others = sorted({str(r.get("extractor")) for r in rows} - {"inception"})
    found = []
    if others:
        found.append(
            f"Scores from the features of {' and '.join(others)} cannot be compared with published FID, IS or KID, "
            f"which are from Inception's: only with each other."
        )
    if any((r.get("num_images") or 0) < PUBLISHED_IMAGES for r in rows):
        found.append(
            f"Scores of fewer than {PUBLISHED_IMAGES:,} images cannot be compared with published ones: FID falls as "
            f"the number of images grows."
        )
    return found


COLUMNS = {
    "num_images": "images", "num_reference": "real images", "sampler": "sampler", "num_steps": "steps", "nfe": "NFE",
    "guidance_scale": "guidance", "seed": "seed", "step": "at step", "weights": "weights", "data": "data",
    "extractor": "extractor",
}  # fmt: skip


def cell(value: Any, sort: Any = None, link: str | None = None) -> dict[str, Any]:
    """What the template's table shows: a text, the number to sort by if there is one, where a click leads."""
    is_number = isinstance(sort, int | float) and not isinstance(sort, bool)
    return {"text": shown(value), "sort": sort if is_number else None, "link": link}


def score_table(rows: Sequence[Row], with_run: bool = False) -> dict[str, list]:
    """{'columns': [(name, holds numbers)], 'rows': lists of cells}; columns that no row fills are left out."""
    table = []
    for row in rows:
        value = shown(row.get("value")) + (f" ± {row['is_std']:.2g}" if row.get("is_std") is not None else "")
        delta, reason = difference(row), not_comparable(row)
        cells = {"run": cell(row.get("run"), link=row.get("report"))} if with_run else {}
        cells |= {
            "metric": cell(title_of(row)),
            "value": cell(value, row.get("value")),
            "paper": cell(row.get("reference"), row.get("reference")),
            "difference": cell(None if delta is None else f"{delta:+.4g}", delta),
            "comparable": cell(f"no: {reason}" if reason else "yes"),  # with published scores
        }
        for key, name in COLUMNS.items():
            cells[name] = cell(str(row[key]) if key == "seed" and key in row else row.get(key), row.get(key))
        table.append(cells)
    used = [c for c in (table[0] if table else ()) if any(cells[c]["text"] != NOTHING for cells in table)]
    columns = [(c, any(cells[c]["sort"] is not None for cells in table)) for c in used]
    return {"columns": columns, "rows": [[cells[c] for c in used] for cells in table]}


def origin(results: list[Row]) -> list[tuple[str, str]]:
    """(name, value) of what made the newest score: commit, versions, the extractor's digest."""
    newest = results[0] if results else {}
    found = [("commit", newest["commit"])] if newest.get("commit") else []
    found += [(name, version) for name, version in (newest.get("versions") or {}).items()]
    if newest.get("extractor_sha256"):
        found.append((f"sha256 of the {newest.get('extractor')} extractor", newest["extractor_sha256"]))
    return found


def settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(group, [(key, value), ...]), ...]; keys that are in no group come first, under ''."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    def leaves(value: Any, prefix: str) -> list[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            found = [pair for k, v in value.items() for pair in leaves(v, f"{prefix}.{k}" if prefix else str(k))]
            return [(k, v) for k, v in found if not k.endswith("_partial_")]  # how it is built, not what it is
        return [(prefix, text(value))]

    single = [(str(k), v) for k, v in config.items() if not isinstance(v, Mapping)]
    groups = [(str(k), leaves(v, "")) for k, v in config.items() if isinstance(v, Mapping) and v]
    return ([("", [pair for k, v in single for pair in leaves(v, k)])] if single else []) + groups


# ---- pictures ----


def pictures(samples: Path) -> tuple[dict | None, list[dict], list[str]]:
    """The newest grid, thumbnails over training from the first to the newest (none if it is the only one), and the
    names of files that could not be read. A picture has `step`, `address` (a data: URI), `width`, `height`."""
    found = sorted((int(m[1]), p) for p in samples.glob("step_*.png") if (m := re.fullmatch(r"step_(\d+)", p.stem)))
    thumbnails, unread, newest = [], [], None
    while found and newest is None:
        step, path = found[-1]
        newest = picture(path, step)
        if newest is None:
            unread.append(path.name)
            found.pop()
    if len(found) > 1:
        for step, path in evenly(found, MAX_THUMBNAILS):
            small = picture(path, step, THUMBNAIL_PIXELS)
            thumbnails += [small] if small else []
            unread += [] if small else [path.name]
    return newest, thumbnails, unread


def evenly(items: list, number: int) -> list:
    """At most `number` of the items, the first and the last among them."""
    if len(items) <= number:
        return items
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def picture(path: Path, step: int, limit: int | None = None) -> dict[str, Any] | None:
    """A PNG file for the page, no larger than `limit` pixels on its longer side; None if it cannot be read."""
    from PIL import Image

    try:
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a file that is cut off or no picture
        return None
    shrink = limit is not None and max(image.size) > limit
    if shrink:
        image = image.convert("RGB")
        image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    if shrink or len(content) > MAX_EMBEDDED:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
        content = buffer.getvalue()
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"step": step, "address": address, "width": image.width, "height": image.height}


# ---- curves ----


class Metrics:
    """metrics.csv: by column, the steps at which it has a finite value, and the values.

    steps: of all rows, rising. notes: what is to be said of rows that cannot be drawn.
    """

    def __init__(self, steps: list[int], columns: dict[str, tuple[list[int], list[float]]], notes: list[str]) -> None:
        self.steps, self.columns, self.notes = steps, columns, notes

    @classmethod
    def read(cls, path: Path) -> "Metrics":
        steps: list[int] = []
        columns: dict[str, tuple[list[int], list[float]]] = {}
        broken = 0
        if path.is_file():
            with open(path, newline="") as f:
                for row in csv.DictReader(f):
                    step = row.pop("step", None) or ""
                    if not step.isdigit() or None in row.values() or None in row:
                        continue  # cut off by a kill
                    steps.append(int(step))
                    values = {k: number(v) for k, v in row.items() if v}
                    broken += any(not math.isfinite(v) for v in values.values())
                    for name, value in values.items():
                        if math.isfinite(value):
                            at, found = columns.setdefault(name, ([], []))
                            at.append(int(step))
                            found.append(value)
        notes = []
        if len(steps) > MAX_POINTS:
            each = round(len(steps) / MAX_POINTS, 1)
            notes.append(f"Lines are means of about {each:g} rows each, bands their lowest and highest.")
        if broken:
            rows = counted(broken, "row", "rows")
            notes.append(f"Not drawn: values that are no finite numbers, in {rows} of metrics.csv.")
        return cls(steps, columns, notes)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values); two empty lists for a column that is not there."""
        return self.columns.get(name, ([], []))


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Curve(NamedTuple):
    """What is drawn of a column: at each x a mean, and the lowest and highest value it stands for."""

    x: list[float]
    low: list[float]
    mean: list[float]
    high: list[float]


def thinned(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> Curve:
    """The curve itself up to `limit` points; of a longer one `limit` stretches of (nearly) as many points each."""
    parts = min(limit, len(x))
    cuts = [i * len(x) // parts for i in range(parts + 1)]
    stretches = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return Curve(
        [fmean(x[s]) for s in stretches],
        [min(y[s]) for s in stretches],
        [fmean(y[s]) for s in stretches],
        [max(y[s]) for s in stretches],
    )


def quartile_names(num_timesteps: int | None) -> list[str]:
    """q1 to q4 in words, with the times they cover where T is known: quartile floor(4 (t - 1) / T) of t in 1 ... T."""
    words = ["cleanest quarter of noise levels", "second", "third", "noisiest quarter"]
    if not num_timesteps:
        return [f"q{i}: {w}" for i, w in enumerate(words, 1)]
    edges = [-(-i * num_timesteps // 4) for i in range(5)]
    return [f"q{i}: {w}, t = {edges[i - 1] + 1}–{edges[i]}" for i, w in enumerate(words, 1)]


def curves(config: Mapping[str, Any], metrics: Metrics, results: list[Row]) -> list[dict[str, Any]]:
    """What there is to draw, in the order it is asked for; see `chart`."""
    names = quartile_names(get(config, "schedule.num_timesteps"))
    loss = [(INK, "all noise levels", *metrics.curve("train/loss"))]
    loss += [(LINES[i], names[i], *metrics.curve(f"train/loss_q{i + 1}")) for i in range(4)]
    drawn = [
        chart("Loss", "loss", loss, log=True, wide=True),
        chart("Gradient norm", "global norm", [(LINES[2], "", *metrics.curve("train/grad_norm"))], log=True),
        chart("Learning rate", "rate", [(LINES[2], "", *metrics.curve("train/lr"))], zero=True),
        chart("Speed", "images/s", [(LINES[2], "", *metrics.curve("train/images_per_second"))], zero=True),
    ]
    for column in sorted(c for c in metrics.columns if c.startswith("eval/")):
        if len(metrics.curve(column)[0]) > 1:  # one score is in the table
            row = next((r for r in results if f"eval/{r.get('name')}" == column), {"name": column[5:]})
            drawn.append(chart(title_of(row), title_of(row), [(LINES[3], "", *metrics.curve(column))]))
    return [c for c in drawn if c is not None]


def log_marks(ratio: float) -> tuple[float, ...]:
    """Multiples of the powers of ten to label on a logarithmic axis that spans this ratio; none: label it evenly."""
    for least, marks in ((1e3, (1,)), (30, (1, 2, 5)), (3, (1, 1.5, 2, 3, 5, 7))):
        if ratio > least:
            return marks
    return ()


def chart(
    title: str,
    label: str,
    lines: Sequence[tuple[str, str, Sequence[int], Sequence[float]]],
    log: bool = False,
    zero: bool = False,
    wide: bool = False,
) -> dict[str, Any] | None:
    """One chart over optimizer steps, in the page's colours; None if there is no point to draw.

    Returns `title`, `svg` (to stand in the page as it is), `legend` [(colour, name), ...] and `wide`.

    Args:
        label: of the vertical axis, unit included.
        lines: (colour, name, steps, values); a name that is not empty goes to the legend.
        log: logarithmic vertical axis, where all values are positive.
        zero: the vertical axis begins at 0.
        wide: over the whole width of the page.
    """
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    drawn = [(colour, name, thinned(x, y)) for colour, name, x, y in lines if x]
    if not drawn:
        return None
    low, high = min(min(c.low) for *_, c in drawn), max(max(c.high) for *_, c in drawn)
    log = log and low > 0
    ink = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    thin = {key: 0.6 for key in ("axes.linewidth", "grid.linewidth", "xtick.major.width", "ytick.major.width")}
    style = ink | thin | {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
        "axes.grid": True, "grid.color": INK, "grid.alpha": 0.14,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(7.6, 3.3) if wide else (4.9, 2.7), layout="constrained")
        canvas, axes = FigureCanvasSVG(figure), figure.add_subplot()
        for colour, _, curve in reversed(drawn):  # the first on top
            mark, width = "o" if len(curve.x) <= 24 else "", 1.5 if colour == INK else 1.1
            axes.plot(curve.x, curve.mean, color=colour, linewidth=width, marker=mark, markersize=3.2)
            if curve.low != curve.high:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=marks) if (marks := log_marks(high / low)) else MaxNLocator(5))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif zero and low >= 0:
            axes.set_ylim(0, 1.06 * high or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 1e4 else f"{v:.4g}"))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{label}, log axis" if log else label)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue, which names an address
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'(?<=<svg)([^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)  # the page decides
    for written, in_page in IN_PAGE.items():
        svg = svg.replace(written, in_page)
    legend = [(IN_PAGE[colour], name) for colour, name, _ in drawn if name]
    return {"title": title, "svg": Markup(svg), "legend": legend, "wide": wide}
