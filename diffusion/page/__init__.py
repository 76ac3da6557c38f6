"""From the files of a run to a page a person reads, and from the scores of many runs to one table.

    write_report(folder)         report.html of one run: samples, scores, the papers' tables, curves, bound, settings
    write_table(rows, path)      the lines of many results.jsonl in one sortable table
    sweep_figure(rows, path)     FID over network calls, a line for each eta, as a PNG file
    sweep_table_text(rows)       the same in the shape of DDIM's Table 1, for a terminal
    with_model(row, config)      a score with a description of the model, from the configuration of its run

A page is one file that opens from disk: pictures are data: URIs, curves are inline SVG, nothing is loaded from
elsewhere. What a run has not made (yet) is left out with one quiet line. This package knows file formats and column
names; it knows no network, no sampler and no torch, and computes nothing but differences from the paper's figures.
"""

from diffusion.page.papers import with_model
from diffusion.page.scores import difference, higher_is_better, not_comparable
from diffusion.page.sweep import sweep_chart, sweep_figure, sweep_table_text
from diffusion.page.words import shown
from diffusion.page.write import write_report, write_table

__all__ = [
    "difference", "higher_is_better", "not_comparable", "shown", "sweep_chart", "sweep_figure", "sweep_table_text",
    "with_model", "write_report", "write_table",
]  # fmt: skip
