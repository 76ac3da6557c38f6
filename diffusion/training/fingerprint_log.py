"""The fingerprints of a run, a file for each of its ranks, and where those of two runs part. Needs no torch.

    fingerprints/rank_0000.csv      step,ranks,weights,ema,optimizer,batch      digests of 64 bits, in hexadecimal

Runs that are to be the same to the bit and are not are the same up to some step. What parts first tells why: the batch,
that other images came; the weights after the same batch, that something was computed in another way.

Weights, average and optimizer are the same on all ranks of a run. The digest of a batch is a sum over its images, and
so those of all ranks add up to that of the global batch, however many ranks it was divided among.
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
    """What a rank has logged of a step: how many ranks there were, and a digest for each of PARTS, unsigned."""

    ranks: int
    digests: tuple[int, ...]


def log_path(run: Path, rank: int) -> Path:
    return run / FOLDER / f"rank_{rank:04d}.csv"


def line(step: int, ranks: int, digests: Iterable[int]) -> str:
    """A line of the file; digests are taken as unsigned."""
    return ",".join((str(step), str(ranks), *(f"{digest & MASK:016x}" for digest in digests))) + "\n"


def read(path: Path) -> dict[int, Row]:
    """The rows of a file by step; damaged ones, and one that a kill has cut off, are left out."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    matches = map(ROW.fullmatch, text.splitlines())
    return {int(m[1]): Row(int(m[2]), tuple(int(digest, 16) for digest in m.groups()[2:])) for m in matches if m}


def logs(run: Path) -> dict[int, dict[int, Row]]:
    """Rank -> step -> row, of all ranks that a run has ever had."""
    named = ((re.fullmatch(r"rank_(\d+)\.csv", path.name), path) for path in sorted((run / FOLDER).glob("rank_*.csv")))
    return {int(match[1]): read(path) for match, path in named if match}


def cut_after(run: Path, step: int) -> None:
    """Drop the rows of steps that will be trained again, and last rows that a kill has cut off."""
    for rank, rows in logs(run).items():
        kept = (line(s, *row) for s, row in rows.items() if s <= step)
        write_atomically(log_path(run, rank), HEADER + "".join(kept))


# ---- two runs ----


class Parting(NamedTuple):
    """The first step at which a part is another one in the other run; rank None for all ranks together."""

    step: int
    rank: int | None
    part: str


class Comparison(NamedTuple):
    """Steps of which both runs have the rows of all their ranks, in order; the partings, the earliest first, no more
    than one for each rank and part."""

    steps: list[int]
    partings: list[Parting]


def compare(run: Path, other: Path) -> Comparison:
    """Hold the logs of two runs against each other, step by step and rank by rank; where a step was made by another
    number of ranks, the weights, average and optimizer of rank 0 and the global batch."""
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
    return Comparison(common, [Parting(step, rank, part) for (rank, part), step in first.items()])


def by_step(run: Path) -> dict[int, dict[int | None, tuple[int, ...]]]:
    """Step -> rank -> digests, of the steps that have a row of each rank."""
    found: dict[int, dict] = {}
    ranks = {}
    for rank, rows in logs(run).items():
        for step, row in rows.items():
            found.setdefault(step, {})[rank] = row.digests
            ranks[step] = row.ranks
    return {step: rows for step, rows in found.items() if rows.keys() == set(range(ranks[step]))}


def as_one(rows: dict[int | None, tuple[int, ...]]) -> dict[int | None, tuple[int, ...]]:
    """What the ranks of a step amount to together."""
    *same, _ = rows[0]
    return {None: (*same, sum(digests[-1] for digests in rows.values()) & MASK)}
