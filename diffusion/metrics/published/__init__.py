"""The papers' figures, and a result held against them.

    places(row)       where a line of results.jsonl belongs: table, column, published line and figure, difference
    filled(rows)      the tables that apply, with the rows at their places
    deviations(row)   a sentence for each thing that was done otherwise than in the papers
    counterpart(row)  the published figure of the same thing
    table_text(rows)  all of it for a terminal

Standard library only: no torch, no image and no network is known here.
"""

from diffusion.metrics.published.fill import Filled, FilledLine, filled
from diffusion.metrics.published.papers import TABLES, TIMESTEPS
from diffusion.metrics.published.place import Place, counterpart, of_samples, places
from diffusion.metrics.published.protocol import (
    INCEPTION_SHA256,
    PUBLISHED_IMAGES,
    common,
    deviations,
    not_recorded,
    unplaced,
)
from diffusion.metrics.published.table import Column, Figure, Line, Sampling, Table
from diffusion.metrics.published.text import aligned, table_text

__all__ = [
    "INCEPTION_SHA256", "PUBLISHED_IMAGES", "TABLES", "TIMESTEPS", "Column", "Figure", "Filled",
    "FilledLine", "Line", "Place", "Sampling", "Table", "aligned", "common", "counterpart", "deviations", "filled",
    "not_recorded", "of_samples", "places", "table_text", "unplaced",
]  # fmt: skip
