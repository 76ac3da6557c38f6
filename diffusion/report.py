"""The scores of many runs in one table, or the report of one run made again.

    python -m diffusion.report                          all results.jsonl below runs/, in results.csv and results.html
    python -m diffusion.report runs=DIR out=DIR         below another folder; written to another
    python -m diffusion.report run_dir=runs/digits      report.html of that run

The table is sorted by metric, the best score first; in results.html a click on a column's name sorts by that column.
"""

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig
from yaml import YAMLError

from diffusion.app.compose import Refusal, command, refusing
from diffusion.files import replacing
from diffusion.page import HIGHER_IS_BETTER, difference, not_comparable, shown, write_report, write_table
from diffusion.training.run_folder import RunFolder, flatten

Row = dict[str, Any]
FIRST = "run metric value is_std reference difference not_comparable num_images sampler num_steps nfe seed step".split()


@command("report")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        if cfg.run_dir is not None:
            folder = one_run(cfg.run_dir)
            with writing("run_dir", folder.path):
                print(f"Report: {write_report(folder)}")
            return
        runs, key = Path(cfg.runs), "runs" if cfg.out is None else "out"
        out = Path(cfg[key])
        rows = collect(runs, out)
        with writing(key, out):
            out.mkdir(parents=True, exist_ok=True)
            with replacing(out / "results.csv") as file:
                file.write(as_csv(rows).encode())
            write_table(rows, out / "results.html", f"Scores of {runs.resolve().name}")
    print(listing(rows))
    print(f"Table: {out / 'results.csv'}, {out / 'results.html'}")


@contextmanager
def writing(key: str, folder: Path) -> Iterator[None]:
    """An error of the file system becomes a Refusal that names the setting and the folder."""
    try:
        yield
    except OSError as e:
        raise Refusal(f"{key}={folder} cannot be written to: {e.strerror}.") from e


def one_run(path: str) -> RunFolder:
    """The run folder at a path; Refusal if there is none."""
    folder = RunFolder(path)
    try:
        config = folder.config()
    except (YAMLError, UnicodeDecodeError) as e:
        raise Refusal(f"run_dir={path}: its config.yaml is damaged ({str(e).splitlines()[0]}).") from e
    if not isinstance(config, dict):
        raise Refusal(f"run_dir={path} is no run folder: there is no config.yaml with settings in it.")
    return folder


def collect(runs: Path, out: Path) -> list[Row]:
    """The lines of all results.jsonl below a folder, by metric, best first.

    Each has `run`, its folder below `runs`, and `report`, where its report.html is as seen from `out`, or None.

    Raises:
        Refusal: no such folder, or no score below it.
    """
    if not runs.is_dir():
        raise Refusal(f"runs={runs}: there is no such folder. Give the one that holds the run folders.")
    rows = []
    for folder in sorted(p.parent for p in runs.rglob("results.jsonl")):
        run = RunFolder(folder)
        name = folder.relative_to(runs).as_posix() if folder != runs else folder.resolve().name
        link = quote(Path(os.path.relpath(run.report_path, out)).as_posix()) if run.report_path.is_file() else None
        rows += [row | {"run": name, "report": link} for row in run.results()]
    if not rows:
        raise Refusal(f"runs={runs}: no run below it has been scored, there is no results.jsonl with a line in it.")
    return sorted(rows, key=order)


def order(row: Row) -> tuple:
    """Sorts by metric, then the best value first, then the name of the run."""
    sign = -1 if row.get("name") in HIGHER_IS_BETTER else 1
    return str(row.get("metric")), sign * (row.get("value") or 0.0), row["run"]


def as_csv(rows: list[Row]) -> str:
    """All fields of all lines, the most asked for first; nested ones by their path, as versions.torch."""
    flat = []
    for row in rows:
        found = flatten({k: v for k, v in row.items() if k != "report"})
        flat.append(found | {"difference": difference(row), "not_comparable": not_comparable(row)})
    names = dict.fromkeys([*(f for f in FIRST if any(f in row for row in flat)), *(k for row in flat for k in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), restval="")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def listing(rows: list[Row]) -> str:
    """The main columns as text for a terminal."""
    names = ("metric", "value", "reference", "num_images", "sampler", "num_steps", "step", "run")
    titles = ("metric", "value", "paper", "images", "sampler", "steps", "at step", "run")
    lines = [titles, *(tuple(shown(row.get(name)) for name in names) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    main()
