"""The pages themselves: report.html of one run, and the table of many, each one file, whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffusion.files import read_csv, write_atomically
from diffusion.page.chart import Chart, inline
from diffusion.page.html import environment
from diffusion.page.likelihood import bound_charts, progress_rows, read_bound
from diffusion.page.metrics_csv import Metrics
from diffusion.page.papers import against_papers, with_model
from diffusion.page.pictures import newest_picture, pictures
from diffusion.page.scores import score_table, warnings
from diffusion.page.settings import figures_of_training, origin, settings, summary
from diffusion.page.sweep import sweep_chart, sweep_grid
from diffusion.page.training_curves import by_class, curves
from diffusion.runs.recorded import at

Row = Mapping[str, Any]


class Run(Protocol):
    """What the page reads of a run's folder, and where it goes."""

    path: Path
    metrics_path: Path
    report_path: Path
    samples: Path

    def config(self) -> Mapping[str, Any] | None: ...
    def results(self) -> list[dict]: ...
    def steps(self) -> list[int]: ...


def write_report(folder: Run) -> Path:
    """Write the run's report.html, whole or not at all; its path.

    Pieces that are missing (no scores, no samples, no metrics.csv, even no config.yaml) are left out.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.path.is_dir():
        raise ValueError(f"run_dir={folder.path}: folder not found.")
    record, steps, metrics = folder.config() or {}, folder.steps(), Metrics.read(folder.metrics_path)
    results = sorted(folder.results(), key=lambda r: r.get("step") or 0, reverse=True)  # stable: newest step first
    step = max([*steps[:1], *metrics.steps[-1:]], default=None)
    scored = results[0].get("step") if results else None
    scores = [r for r in results if r.get("step") == scored]
    newest, others, damaged = pictures(folder.samples)
    unread = [f"samples/{name}" for name in damaged]
    bound, sweep = read_bound(folder.path / "likelihood"), [with_model(row, record) for row in sweep_of(folder.path)]
    page = {
        "title": record.get("name") or folder.path.resolve().name,
        "summary": summary(record, step),
        "figures": figures_of_training(record, step, metrics, results),
        "newest": newest,
        "others": others,
        "film": newest_picture(folder.samples, "film_step_", unread),
        "neighbours": newest_picture(folder.path / "evaluations", "neighbours_", unread),
        "progressive": newest_picture(folder.path / "likelihood", "progressive_step_", unread),
        "unread": unread,
        "scores": score_table(scores),
        "earlier": score_table([r for r in results if r.get("step") != scored]),
        "papers": against_papers(scores, record),
        "curves": drawn(curves(record, metrics, results)),
        "classes": drawn(by_class(scores)),
        "bound": drawn(bound_charts(bound, at(record, "data.name"))),
        "progress": against_papers(progress_rows(bound, record, results), record),
        "bound_step": bound.step if bound else None,
        "sweep": drawn([sweep_chart(sweep)]),
        "sweep_table": sweep_grid(sweep),
        "notes": metrics.notes,
        "settings": settings(record),
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


def drawn(charts: Sequence[Chart | None]) -> list[dict[str, Any]]:
    """What the template shows of charts; those without a point are left out."""
    found = [inline(chart) for chart in charts if chart is not None]
    return [chart for chart in found if chart is not None]


def sweep_of(folder: Path) -> list[dict[str, str]]:
    """The rows of the run's sweep.csv, beside its scores or in evaluations/; none if there is none."""
    return next(
        (read_csv(p)[0] for p in (folder / "sweep.csv", folder / "evaluations" / "sweep.csv") if p.is_file()), []
    )


def write(path: Path, template: str, values: Mapping[str, Any]) -> None:
    write_atomically(path, environment().get_template(template).render(values))
