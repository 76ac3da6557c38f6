"""The log of fingerprints of a run, one file per rank, and the comparison of two runs. Needs no torch.

    fingerprints/rank_0000.csv      step,ranks,weights,ema,optimizer,batch      digests of 64 bits, in hexadecimal

Two runs that should be identical but are not are identical up to some step. What differs first shows the cause. If it
is the batch, the runs got different images. If it is the weights, after the same batch, something was computed
differently.

Weights, average and optimizer are the same on all ranks of a run. The digest of a batch is a sum over its images. So
the digests of all ranks add up to that of the global batch, for any number of ranks.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffusion.files import write_atomically

FOLDER = "fingerprints"
PARTS = ("weights", "ema", "optimizer", "batch")
HEADER = ",".join(("step", "ranks", *PARTS)) + "\n"
ROW = re.compile(r"([0-9]{1,18}),([0-9]{1,9})" + ",([0-9a-f]{16})" * len(PARTS))
MASK = (1 << 64) - 1


class Row(NamedTuple):
    """One row of the log: the number of ranks, and an unsigned digest for each of PARTS."""

    ranks: int
    digests: tuple[int, ...]


def log_path(run: Path, rank: int) -> Path:
    """Path of the log of a rank."""
    return run / FOLDER / f"rank_{rank:04d}.csv"


def line(step: int, ranks: int, digests: Iterable[int]) -> str:
    """One line of the file. Digests are written as unsigned numbers."""
    return ",".join((str(step), str(ranks), *(f"{digest & MASK:016x}" for digest in digests))) + "\n"


def read(path: Path) -> dict[int, Row]:
    """The rows of a file by step, without damaged rows and without a last row that a kill has truncated."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    matches = map(ROW.fullmatch, text.splitlines())
    return {int(m[1]): Row(int(m[2]), tuple(int(digest, 16) for digest in m.groups()[2:])) for m in matches if m}


def logs(run: Path) -> dict[int, dict[int, Row]]:
    """The rows of all ranks that a run has ever had: rank -> step -> row."""
    named = ((re.fullmatch(r"rank_(\d+)\.csv", path.name), path) for path in sorted((run / FOLDER).glob("rank_*.csv")))
    return {int(match[1]): read(path) for match, path in named if match}


def cut_after(run: Path, step: int) -> None:
    """Delete the rows of steps after `step`, which will be trained again, and rows that a kill has truncated."""
    for rank, rows in logs(run).items():
        kept = (line(s, *row) for s, row in rows.items() if s <= step)
        write_atomically(log_path(run, rank), HEADER + "".join(kept))


# ---- two runs ----


class Difference(NamedTuple):
    """The first step at which a part differs between two runs; rank None stands for all ranks together."""

    step: int
    rank: int | None
    part: str


class Comparison(NamedTuple):
    """The result of `compare`.

    steps: the steps, in order, of which both runs have the rows of all their ranks.
    differences: the first difference for each rank and part, the earliest first; [] if the runs are identical.
    """

    steps: list[int]
    differences: list[Difference]


def compare(run: Path, other: Path) -> Comparison:
    """Compare the logs of two runs, step by step and rank by rank.

    If the number of ranks differs at a step, compare weights, average and optimizer of rank 0, and the global batch.
    """
    ours, theirs = by_step(run), by_step(other)
    common, first = sorted(ours.keys() & theirs.keys()), {}
    for step in common:
        sides = ours[step], theirs[step]
        if len(sides[0]) != len(sides[1]):
            sides = as_one(sides[0]), as_one(sides[1])
        for rank, digests in sides[0].items():
            for part, digest, another in zip(PARTS, digests, sides[1][rank], strict=True):
                if digest != another:
                    first.setdefault((rank, part), step)
    return Comparison(common, [Difference(step, rank, part) for (rank, part), step in first.items()])


def by_step(run: Path) -> dict[int, dict[int | None, tuple[int, ...]]]:
    """The digests of the steps that have a row of every rank: step -> rank -> digests."""
    found: dict[int, dict] = {}
    ranks = {}
    for rank, rows in logs(run).items():
        for step, row in rows.items():
            found.setdefault(step, {})[rank] = row.digests
            ranks[step] = row.ranks
    return {step: rows for step, rows in found.items() if rows.keys() == set(range(ranks[step]))}


def as_one(rows: dict[int | None, tuple[int, ...]]) -> dict[int | None, tuple[int, ...]]:
    """The digests of all ranks of a step together, under the rank None."""
    *same, _ = rows[0]
    return {None: (*same, sum(digests[-1] for digests in rows.values()) & MASK)}
