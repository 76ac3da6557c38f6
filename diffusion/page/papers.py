"""A run's scores inside the published tables, for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.metrics.published import common, deviations, filled, not_recorded, places, unplaced
from diffusion.runs.recorded import described

Row = Mapping[str, Any]


def with_model(row: Row, record: Mapping[str, Any]) -> Row:
    """Add a description of the model to a row, from the configuration of its run.

    The keys are those of `runs.recorded.described`. Values in the row take precedence. A row about images of files is
    not about a model, and is returned unchanged.
    """
    if "images" in row or not record:
        return row
    return described(record) | dict(row)


def against_papers(rows: Sequence[Row], record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows: `tables` (title, source, note, columns, lines), `departures`, `missing` fields, and
    `others`: why scores without a place have none."""
    rows = [with_model(row, record) for row in rows]
    inside = [row for row in rows if places(row)]
    tables = []
    for table in filled(rows):
        lines = [
            {
                "title": line.title, "own": line.own,
                "section": line.section if i == 0 or table.lines[i - 1].section != line.section else "",
                "cells": [line.cells.get(column, "") for column in table.columns],
            }
            for i, line in enumerate(table.lines)
        ]  # fmt: skip
        about = {"title": table.table.title, "source": table.table.source, "note": table.table.note}
        tables.append(about | {"columns": [column.title for column in table.columns], "lines": lines})
    return {
        "tables": tables,
        "departures": common(inside, deviations),
        "missing": common(inside, not_recorded),
        "others": unplaced(rows),
    }
