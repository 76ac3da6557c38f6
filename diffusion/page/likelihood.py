"""The variational bound of a run, term by term: likelihood/bound_step_00001000.csv as curves, beside the paper's.

Columns: t, bits (of this term, per dimension), epsilon_mse, x0_mse, rate (bits/dim that a receiver of x_t has had),
rmse_255 (of the estimate of x0 from x_t, on a scale of 0 to 255).
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.files import MOST_TEXT, read_regular
from diffusion.metrics.published.papers import DDPM_RATE_DISTORTION
from diffusion.page.chart import Chart, Series
from diffusion.page.metrics_csv import MAX_POINTS, number
from diffusion.runs.recorded import at

COLUMNS = ("t", "bits", "epsilon_mse", "x0_mse", "rate", "rmse_255")
PUBLISHED_T = 1000  # noise levels of the paper's model

Row = Mapping[str, Any]


class Bound(NamedTuple):
    """The terms at one step of training, by rising t from 1; what is missing or not finite is nan."""

    step: int
    terms: list[dict[str, float]]

    def curve(self, x: str, y: str, log: bool = True) -> tuple[list[float], list[float]]:
        """Two columns, the terms at which both are finite (and positive, if log)."""
        pairs = [(term[x], term[y]) for term in self.terms]
        found = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b) and (not log or min(a, b) > 0)]
        return [a for a, _ in found], [b for _, b in found]


def read_bound(folder: Path) -> Bound | None:
    """The newest of a run's bounds; None if there is none with a term in it."""
    files = [
        (int(m[1]), p) for p in folder.glob("bound_step_*.csv") if (m := re.fullmatch(r"bound_step_(\d+)", p.stem))
    ]
    for step, path in sorted(files, reverse=True):
        try:
            text = io.StringIO(read_regular(path, MOST_TEXT).decode(errors="replace"), newline="")
            terms = [{name: number(row.get(name) or "") for name in COLUMNS} for row in csv.DictReader(text)]
        except (csv.Error, OSError):  # a line longer than any number, a folder of that name
            continue
        terms = sorted((term for term in terms if term["t"] >= 1), key=lambda term: term["t"])
        if terms:
            return Bound(step, terms)
    return None


def spread(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` of the points, evenly over the logarithm of their number, the first and the last among them."""
    if len(x) <= limit:
        return list(x), list(y)
    places = [round(len(x) ** (i / (limit - 1))) - 1 for i in range(limit)]
    kept = list(dict.fromkeys(places))
    return [x[i] for i in kept], [y[i] for i in kept]


def bound_charts(bound: Bound | None, data: str | None) -> list[Chart]:
    """Terms and errors over t, and rate against distortion, with the paper's points if it has any of this data."""
    if bound is None:
        return []
    over = {"x_label": "t", "x_log": True, "log": True}
    bits, epsilon, x0 = (spread(*bound.curve("t", name)) for name in ("bits", "epsilon_mse", "x0_mse"))
    errors = [Series("q4", "of ε", *epsilon, tag="epsilon"), Series("q2", "of x0", *x0, tag="x0")]
    rate = Series("q3", "this run", *spread(*bound.curve("rate", "rmse_255", log=False)), tag="curve")
    return [
        Chart("Bound by noise level", "bits/dim of the term", [Series("q3", "", *bits, tag="bits")], **over),
        Chart("Error by noise level", "mean squared error", errors, **over),
        Chart(
            "Rate and distortion", "distortion, RMSE of 255", [rate, *published_points(data)],
            x_label="rate, bits/dim", zero=True,
        ),
    ]  # fmt: skip


def published_points(data: str | None) -> list[Series]:
    """DDPM's Table 4, for the data set it is about."""
    table = DDPM_RATE_DISTORTION
    if data != table.columns[0].data:
        return []
    rate, distortion = ([line.figures[i].value for line in table.lines] for i in (0, 1))
    return [Series("paper", f"published: {table.source}", rate, distortion, kind="points", tag="published")]


def progress_rows(bound: Bound | None, record: Mapping[str, Any], results: Sequence[Row]) -> list[Row]:
    """The terms at the times of DDPM's Table 4, as results to put into it; none for another number of noise levels."""
    if bound is None or bound.terms[-1]["t"] != PUBLISHED_T:
        return []
    terms = {PUBLISHED_T + 1 - int(term["t"]): term for term in bound.terms}
    of_it = [r for r in results if r.get("name") == "bits_per_dim" and r.get("step") == bound.step]
    row = next((r for r in reversed(of_it) if r.get("likelihood") in (None, "bound")), {})  # the terms are of the last
    known = {"metric": "bits/dim", "data": at(record, "data.name"), "weights": "ema", "step": bound.step} | dict(row)
    known = {k: v for k, v in known.items() if k not in ("value", "rate", "distortion", "sampler")}
    return [
        known | {"name": "bits_per_dim", "reverse_steps": n, "rate": terms[n]["rate"], "rmse_255": terms[n]["rmse_255"]}
        for n in (line.of["reverse_steps"] for line in DDPM_RATE_DISTORTION.lines)
        if n in terms and math.isfinite(terms[n]["rate"]) and math.isfinite(terms[n]["rmse_255"])
    ]
