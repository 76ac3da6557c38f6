"""Put the scores of many runs into one table, write the report of one run again, or compare two runs step by step.

    python -m diffusion.report                          all results.jsonl below runs/, in results.csv and results.html
    python -m diffusion.report runs=DIR out=DIR         below another folder; written to another folder
    python -m diffusion.report run_dir=runs/digits      report.html of that run
    python -m diffusion.report task=compare run_dir=A other=B     the first step at which two runs differ

The table is sorted by metric, the best score first. In results.html, click on the name of a column to sort by it.

task=compare is for runs that should be identical to the bit and were trained with fingerprint_every=N. It names the
first step at which they differ, and whether the weights, their average, the optimizer's state or the batch differ, for
each rank. Exit status: 0 if the runs agree at all steps that both have logged, 1 if they differ, 2 if there is nothing
to compare.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from diffusion.distributed.signals import install

    install()

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig

from diffusion.command import command, refusing
from diffusion.config.check import check, refuse_blocked
from diffusion.config.effect import typed
from diffusion.errors import Refusal
from diffusion.files import Room, csv_text, describe_disk_error, replacing
from diffusion.metrics.published import aligned
from diffusion.page import difference, higher_is_better, not_comparable, shown, write_report, write_table
from diffusion.runs.folder import RunFolder, flatten
from diffusion.training.fingerprint_log import PARTS, Comparison, compare, logs

Row = dict[str, Any]
TASKS = ("make", "compare")
FIRST = "run metric value is_std reference difference not_comparable num_images sampler num_steps nfe seed step".split()


@command("report")
def main(cfg: DictConfig) -> None:
    with refusing(cfg.debug):
        check_task(cfg)
        check(cfg, typed())
        if cfg.task == "compare":
            found = compared(cfg.run_dir, cfg.other)
            settings = differing_settings(RunFolder(cfg.run_dir), RunFolder(cfg.other))
            print(parting(found, settings))
            sys.exit(1 if found.differences else 0)
        if cfg.run_dir is not None:
            folder = one_run("run_dir", cfg.run_dir)
            refuse_blocked("run_dir", folder.path, ["report.html"], [])
            with naming("run_dir", folder.path):
                print(f"Report: {write_report(folder)}")
            return
        runs, key = Path(cfg.runs), "runs" if cfg.out is None else "out"
        out = Path(cfg[key])
        rows = collect(runs, out)
        refuse_blocked(key, out, ["results.csv", "results.html"], [])
        with naming(key, out):
            with replacing(out / "results.csv") as file:
                file.write(as_csv(rows).encode())
            write_table(rows, out / "results.html", f"Scores of {runs.resolve().name}")
    print(listing(rows))
    print(f"Table: {out / 'results.csv'}, {out / 'results.html'}")


@contextmanager
def naming(key: str, folder: Path) -> Iterator[None]:
    """An error of the file system becomes a Refusal that names the setting and the folder."""
    try:
        yield
    except OSError as e:
        said = describe_disk_error(e, Room(key, folder))
        raise Refusal(said or f"{key}={folder} cannot be written to: {e.strerror}.") from e


def check_task(cfg: DictConfig) -> None:
    """Refuse an unknown task, and settings that it lacks or does not have."""
    if cfg.task not in TASKS:
        raise Refusal(f"task={cfg.task} must be one of {', '.join(TASKS)}.")
    if cfg.task == "compare" and None in (cfg.run_dir, cfg.other):
        raise Refusal("task=compare needs two runs: run_dir=A other=B.")
    if cfg.task == "compare" and cfg.out is not None:
        raise Refusal(f"out={cfg.out}: task=compare writes nothing.")
    if cfg.task == "make" and cfg.other is not None:
        raise Refusal(f"other={cfg.other} is for task=compare.")


def one_run(key: str, path: str) -> RunFolder:
    """The run folder at the path that a setting gives; Refusal if there is none."""
    folder = RunFolder(path)
    try:
        config = folder.config()
    except ValueError as error:
        raise Refusal(f"{key}={path}: {error}") from error
    if config is None:
        raise Refusal(f"{key}={path} is not a run folder: it has neither a config.yaml nor a checkpoint.")
    return folder


def collect(runs: Path, out: Path) -> list[Row]:
    """The lines of all results.jsonl below a folder, by metric, best first.

    Each has `run`, its folder below `runs`, and `report`, where its report.html is as seen from `out`, or None.

    Raises:
        Refusal: no such folder, or no score below it.
    """
    if not runs.is_dir():
        raise Refusal(f"runs={runs}: folder not found. Give the one that holds the run folders.")
    rows = []
    for folder in sorted(p.parent for p in runs.rglob("results.jsonl")):
        run = RunFolder(folder)
        name = folder.relative_to(runs).as_posix() if folder != runs else folder.resolve().name
        link = quote(Path(os.path.relpath(run.report_path, out)).as_posix()) if run.report_path.is_file() else None
        rows += [row | {"run": name, "report": link} for row in run.results()]
    if not rows:
        raise Refusal(f"runs={runs}: no results found: no run in this folder has been scored.")
    return sorted(rows, key=order)


def order(row: Row) -> tuple:
    """Sorts by metric, then the best value first, then the name of the run."""
    sign = -1 if higher_is_better(row.get("name")) else 1
    return str(row.get("metric")), sign * (row.get("value") or 0.0), row["run"]


def as_csv(rows: list[Row]) -> str:
    """All fields of all lines, the most asked for first; nested ones by their path, as versions.torch."""
    flat = []
    for row in rows:
        found = flatten({k: v for k, v in row.items() if k != "report"})
        flat.append(found | {"difference": difference(row), "not_comparable": not_comparable(row)})
    return csv_text(flat, [f for f in FIRST if any(f in row for row in flat)])


def listing(rows: list[Row]) -> str:
    """The main columns as text for a terminal."""
    names = ("metric", "value", "reference", "num_images", "sampler", "num_steps", "step", "run")
    titles = ("metric", "value", "paper", "images", "sampler", "steps", "at step", "run")
    lines = [titles, *(tuple(shown(row.get(name)) for name in names) for row in rows)]
    return "\n".join(aligned(lines))


# ---- two runs ----


def compared(run_dir: str, other: str) -> Comparison:
    """The fingerprints of two runs, held against each other; Refusal if there is nothing to compare."""
    for key, path in (("run_dir", run_dir), ("other", other)):
        if not any(logs(one_run(key, path).path).values()):
            raise Refusal(f"{key}={path} has no fingerprints: train with fingerprint_every=N.")
    found = compare(Path(run_dir), Path(other))
    if not found.steps:
        raise Refusal(
            f"run_dir={run_dir} and other={other}: there is no step of which both have the fingerprints of all their "
            f"ranks. Train both with the same fingerprint_every."
        )
    return found


def parting(found: Comparison, settings: list[str]) -> str:
    """Where two runs part, as text for a terminal. `settings`: in what they differ."""
    steps, differences = found.steps, found.differences
    logged = f"{len(steps):,} steps from {steps[0]} to {steps[-1]} that both have logged"
    if not differences:
        return f"The same to the bit, {', '.join(PARTS)}, at all {logged}."
    first = differences[0].step
    before = max((step for step in steps if step < first), default=0)
    lines = [f"They part at step {first}" + (f"; at step {before} they are the same." if before else ", the first.")]
    if any(p.step == first and p.part == "batch" for p in differences):
        lines.append("Its batch is another one: the data, their order or the seed differ.")
    else:
        unseen = f", or a batch after step {before}" if first - before > 1 else ""
        lines.append(f"Its batch is the same: what differs is how they compute{unseen}.")
    lines.append("Settings that differ:" + ("" if settings else " none"))
    lines += [f"  {setting}" for setting in settings]
    lines.append(f"First step of each difference, of {logged}:")
    where = {(p.rank, p.part): str(p.step) for p in differences}
    ranks = sorted({p.rank for p in differences}, key=lambda rank: -1 if rank is None else rank)
    rows = [("all" if r is None else str(r), *(where.get((r, part), "same") for part in PARTS)) for r in ranks]
    return "\n".join([*lines, *aligned([("rank", *PARTS), *rows])])


def differing_settings(run: RunFolder, other: RunFolder) -> list[str]:
    """'key: ours, theirs' of all settings but the names of the runs."""
    ours, theirs = flatten(run.config()), flatten(other.config())
    keys = sorted((ours.keys() | theirs.keys()) - {"name", "run_dir"})
    return [f"{key}: {ours.get(key)}, {theirs.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]


if __name__ == "__main__":
    main()
