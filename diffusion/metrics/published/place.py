"""Where a result belongs among the published figures: in which tables, beside which line, in which column.

A result is a line of results.jsonl. What it does not say does not keep it out of a table; `protocol` says what is
missing or different. Of what the network was trained on, a line may say `prediction` and `objective` (the class's name
in lower case); without them it is taken for L_simple, as nearly all published results are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from diffusion.metrics.published.papers import LARGE_PARAMETERS, SCHEDULE, SIGMA_HAT, TABLES
from diffusion.metrics.published.table import Column, Figure, Line, Table

Row = Mapping[str, Any]
LIKELIHOOD = "bits_per_dim"  # the score that the model gives itself
ALONE = ("is", LIKELIHOOD)  # scores without real images


class Place(NamedTuple):
    """A value's place: the published line it is the same thing as, if any, and that line's figure, if any."""

    table: Table
    column: Column
    line: Line | None
    figure: Figure | None
    value: float

    @property
    def difference(self) -> float | None:
        """Value minus the published one."""
        return None if self.figure is None or self.figure.value is None else self.value - self.figure.value


def of_samples(row: Row) -> bool:
    """Whether a result is a score of samples by an extractor: any but a likelihood."""
    return row.get("name") not in (None, LIKELIHOOD)


def against_real(row: Row) -> bool:
    """Whether a result compares samples with real images."""
    return of_samples(row) and row["name"] not in ALONE


def data_of(row: Row) -> str:
    """The name of the data set; of a path, its last part."""
    return str(row.get("data") or "").rstrip("/").rpartition("/")[2]


def split_of(row: Row) -> str:
    """The split that a result is about; what the papers use where it does not say."""
    return row.get("split") or ("test" if row.get("name") == LIKELIHOOD else "train")


def conditional(row: Row) -> bool:
    """Whether the samples are of a conditional model, as far as the result tells."""
    return bool(row.get("num_classes")) or row.get("guidance_scale") not in (None, 1)


def eta_of(row: Row) -> float | str | None:
    """DDIM's eta; ancestral sampling is eta = 1 with the small variance and sigma hat with the large one."""
    if row.get("sampler") == "ancestral":
        return {"small": 1.0, "large": SIGMA_HAT}.get(row.get("variance") or "")
    return row.get("eta") if row.get("sampler") == "ddim" else None


def loss_of(row: Row) -> str:
    """simple, bound, mse (the mean squared error of another output than the noise), or the objective's own name."""
    objective, prediction = row.get("objective"), row.get("prediction")
    if objective in (None, "simple", "dsm"):  # DSM weighted by sigma^2 is L_simple
        return "simple" if prediction in (None, "epsilon", "score") else "mse"
    return objective


def learned(row: Row) -> bool:
    """Whether the network predicts how wide a reverse step is; without word of it, whether it was sampled so."""
    return row.get("learned_variance", row.get("variance") == "learned")


def facts(row: Row) -> dict[str, Any]:
    """What a line of a table can be told by."""
    return {
        "eta": eta_of(row),
        "loss": loss_of(row),
        "prediction": row.get("prediction") or "epsilon",
        "learned": learned(row),
        "schedule": row.get("schedule") or SCHEDULE,
        "large": (row.get("parameters") or 0) > LARGE_PARAMETERS,
        "conditional": conditional(row),
        "reverse_steps": row.get("reverse_steps"),
    }


def columns_of(table: Table, row: Row) -> list[Column]:
    """The columns that hold a figure of this result, or would: a table over steps has room for any number of them."""
    name, likelihood = row.get("name"), row.get("likelihood") or "bound"
    found = [c for c in table.columns if (c.metric, c.data) == (name, data_of(row)) and c.likelihood == likelihood]
    if table.by_eta and found:
        steps = row.get("num_steps")
        same = [c for c in found if c.steps == steps]
        found = same or ([replace(found[0], title=f"{steps:,} steps", steps=steps)] if steps else [])
    of_split = [c for c in found if name == "is" or c.split == split_of(row)]
    found = of_split or [c for c in found if name == "fid" and c.split == "train"]
    return [c for c in found if row.get(c.value) is not None]


def repeated(table: Table, row: Row) -> Line | None:
    """The line whose figures a result repeats: that of the same objective, eta, size."""
    known = facts(row)
    return next((n for n in table.lines if n.of and all(known[k] == v for k, v in n.of.items())), None)


def sampled_alike(table: Table, row: Row) -> bool:
    """Whether the samples come from the kind of sampler that the table is about."""
    wanted, sampler, steps = table.sampling, row.get("sampler"), row.get("num_steps")
    if wanted is None or row.get("name") == LIKELIHOOD:
        return True
    kind = sampler is not None and any(name in sampler for name in wanted.samplers)
    return kind and wanted.num_steps in (None, steps or wanted.num_steps)


def in_table(table: Table, row: Row) -> list[Place]:
    """Where a result stands in one table, a place for each of its values that the table has a column for."""
    line = repeated(table, row)
    if (line is None and table.only_alike) or (table.by_eta and eta_of(row) is None):
        return []
    found = []
    for column in columns_of(table, row):
        at = table.columns.index(column) if column in table.columns else None
        figure = line.figures[at] if line is not None and at is not None else None
        found.append(Place(table, column, line, figure, row[column.value]))
    return found


def places(row: Row) -> list[Place]:
    """All places of a result: in the tables of its sampler, or else in those for any sampler; and there in the columns
    of its split, or else in those of FID to the training images.

    None for features of another network than Inception: such scores are of another kind.
    """
    if of_samples(row) and row.get("extractor") not in (None, "inception"):
        return []
    found = [place for table in TABLES for place in in_table(table, row)]
    alike = [place for place in found if sampled_alike(place.table, row)]
    found = alike or [place for place in found if place.table.any_sampler]
    of_split = [place for place in found if place.column.metric == "is" or place.column.split == split_of(row)]
    return of_split or found


def counterpart(row: Row) -> Figure | None:
    """The published figure of the same thing, by the first table that has one of the same split."""
    same = (p for p in places(row) if p.column.metric == "is" or p.column.split == split_of(row))
    return next((p.figure for p in same if p.column.value == "value" and p.figure is not None), None)


def tables_of(row: Row) -> list[Table]:
    """The tables a result has a place in, each once."""
    found: list[Table] = []
    for place in places(row):
        if place.table not in found:
            found.append(place.table)
    return found


def tables_about(data: str) -> list[Table]:
    """The tables that have a column for a data set."""
    return [table for table in TABLES if any(c.data == data for c in table.columns)]
