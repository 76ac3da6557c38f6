"""Curves over training: the loss whole and by quartile of noise levels, also on held-out images, the optimizer, speed,
and scores.

A curve of scores stands beside what it is read against: the published value, and where it was measured the same score
of real images against real ones, below which no model can be expected to come.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.metrics.published import PUBLISHED_IMAGES, of_samples
from diffusion.page.chart import Chart, Level, Series
from diffusion.page.metrics_csv import Metrics
from diffusion.page.scores import higher_is_better, title_of
from diffusion.page.words import shown
from diffusion.progress import counted
from diffusion.runs.recorded import at

Row = Mapping[str, Any]
WIDE_RANGE = 8.0  # of a score that falls: from here on a logarithmic axis shows its end better


def quartile_names(num_timesteps: int | None) -> list[str]:
    """q1 to q4 in words, with the times they cover where T is known: quartile floor(4 (t - 1) / T) of t in 1 ... T."""
    words = ["cleanest quarter of noise levels", "second", "third", "noisiest quarter"]
    if not num_timesteps:
        return [f"q{i}: {w}" for i, w in enumerate(words, 1)]
    edges = [-(-i * num_timesteps // 4) for i in range(5)]
    return [f"q{i}: {w}, t = {edges[i - 1] + 1}–{edges[i]}" for i, w in enumerate(words, 1)]


def curves(record: Mapping[str, Any], metrics: Metrics, results: Sequence[Row]) -> list[Chart]:
    """What there is to draw, in the order it is asked for."""
    names = quartile_names(at(record, "schedule.num_timesteps"))
    loss = [Series("ink", "all noise levels", *metrics.curve("train/loss"))]
    loss += [Series(f"q{i}", names[i - 1], *metrics.curve(f"train/loss_q{i}")) for i in (1, 2, 3, 4)]
    single = lambda column: [Series("q3", "", *metrics.curve(column))]  # noqa: E731
    found = [
        Chart("Loss", "loss", loss, log=True, wide=True),
        *held_out(metrics, names),
        Chart("Gradient norm", "global norm", single("train/grad_norm"), log=True),
        Chart("Learning rate", "rate", single("train/lr"), zero=True),
        Chart("Speed", "images/s", single("train/images_per_second"), zero=True),
    ]
    for column in sorted(c for c in metrics.columns if c.startswith("eval/")):
        if len(metrics.curve(column)[0]) > 1:  # one score is in the table
            found.append(score_curve(column.removeprefix("eval/"), metrics, record, results))
    return found


def held_out(metrics: Metrics, names: Sequence[str]) -> list[Chart]:
    """The loss on images that are not trained on, beside that of training, and by quartile; none if it is not measured.

    Args:
        names: of the quartiles.
    """
    whole = Series("q5", "images not trained on", *metrics.curve("held_out/loss"))
    if not whole.x:
        return []
    both = [Series("ink", "images trained on", *metrics.curve("train/loss")), whole]
    quartiles = [Series(f"q{i}", names[i - 1], *metrics.curve(f"held_out/loss_q{i}")) for i in (1, 2, 3, 4)]
    title = "Loss on images not trained on"
    note = "Where it rises away from that of training, the model remembers its images."
    return [
        Chart(title, "loss", both, log=True, note=note),
        Chart(f"{title}, by quartile", "loss", quartiles, log=True),
    ]


def score_curve(name: str, metrics: Metrics, record: Mapping[str, Any], results: Sequence[Row]) -> Chart:
    """A score over training, with the levels it is read against. results: the newest step first."""
    rows = [r for r in results if r.get("name") == name]
    title = title_of(rows[0] if rows else {"name": name})
    levels = [*published(name, record, rows), *floor(rows)]
    series = Series("q4", "this run" if levels else "", *metrics.curve(f"eval/{name}"), tag="curve")
    values = [*series.y, *(level.value for level in levels)]
    wide_range = higher_is_better(name) is False and min(values) > 0 and max(values) / min(values) > WIDE_RANGE
    return Chart(title, title, [series], levels, log=wide_range)


def published(name: str, record: Mapping[str, Any], rows: Sequence[Row]) -> list[Level]:
    """The paper's value: as the scores have it, or else the configuration."""
    found = [r["reference"] for r in rows if r.get("reference") is not None]
    value = found[0] if found else at(record, f"paper.{name}")
    number = f", {PUBLISHED_IMAGES:,} images" if of_samples({"name": name}) else ""
    return (
        [] if value is None else [Level("paper", f"published: {shown(value)}{number}", float(value), tag="published")]
    )


def floor(rows: Sequence[Row]) -> list[Level]:
    """The same score of real images in place of samples, and its standard deviation over draws."""
    row = next((r for r in rows if r.get("real_value") is not None), None)
    if row is None:
        return []
    value, std = float(row["real_value"]), float(row.get("real_std") or 0.0)
    spread = f" ± {std:.2g}" if std else ""
    number = f", {counted(row['num_images'], 'image', 'images')}" if row.get("num_images") else ""
    return [Level("q1", f"real images against real ones: {shown(value)}{spread}{number}", value, std, tag="real")]


def by_class(results: Sequence[Row]) -> list[Chart]:
    """Scores of the newest step by class, one chart a metric."""
    found: dict[str, Chart] = {}
    for row in results:
        values, name = row.get("per_class"), str(row.get("name"))
        if values and name not in found:
            known = [(k, float(v)) for k, v in enumerate(values) if v is not None]
            series = Series("q4", "", [k for k, _ in known], [v for _, v in known], kind="bars", tag="bars")
            found[name] = Chart(f"{title_of(row)} by class", title_of(row), [series], x_label="class", zero=True)
    return list(found.values())
