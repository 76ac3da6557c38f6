"""FID over numbers of steps and kinds of noise (Song et al. 2021, DDIM, table 1), point by point, in sweep.csv."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.files import csv_text, locked, read_csv, write_atomically
from diffusion.samplers.ancestral import Ancestral
from diffusion.scoring.evaluation import Evaluation, Sweep
from diffusion.scoring.recipe import Plan, Recipe
from diffusion.scoring.scores import describe

FIRST = ("eta", "variance", "num_steps", "nfe", "fid", "num_images", "sampler")


def recipes_of(sweep: Sweep, recipe: Recipe, others: Sequence[tuple[Callable, Plan]] = ()) -> list[Recipe]:
    """The recipe with each sampler of the sweep in turn, all at each number of steps: DDIM at each eta, ancestral
    sampling with the large variance, and others with their plans."""
    plan = {"spacing": recipe.plan.spacing, "clip_x0": recipe.plan.clip_x0}
    found = [recipe.by_ddim(steps, eta, **plan) for eta in sweep.eta for steps in sweep.num_steps]
    for steps in sweep.num_steps if sweep.large else ():
        found.append(replace(recipe, sampler=partial(Ancestral, variance="large"), plan=Plan(steps, **plan)))
    for sampler, chosen in others:
        found += [replace(recipe, sampler=sampler, plan=replace(chosen, num_steps=n)) for n in sweep.num_steps]
    return found


class SweepEvaluation(Evaluation):
    """FID of each sampling of a sweep. Arguments as `Evaluation`.

    Args:
        sweep: which samplings. others: its further samplers, and their plans.
    """

    def __init__(self, *args: Any, sweep: Sweep, others: Sequence[tuple[Callable, Plan]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sweep, self.others = sweep, others

    def recipes(self) -> list[Recipe]:
        assert self.recipe is not None
        return recipes_of(self.sweep, self.recipe, self.others)

    def points(self, ranks: Ranks, where: Place) -> tuple[Path, list[dict[str, Any]]]:
        """The path of sweep.csv, and its rows of this sweep, on rank 0. Points that are there are not made again."""
        against, path = self.against, self.output.file
        assert against is not None and path is not None
        against.extractor.network.to(where.device)
        reference, done, mine = against.reference(against.extractor, ranks), {}, []
        held = ranks.from_main(reference.digest[:12] if reference is not None else None)
        if ranks.main:
            done = read_sweep(path)
        done = ranks.from_main(done)
        chosen = self.recipes()
        for number, recipe in enumerate(chosen, 1):
            sampling = self.gallery(recipe, ranks, where).sampling
            key = f"{self.name(sampling)}_{self.num_images}_{against.extractor.digest[:12]}_{held}"
            mine.append(key)
            if key in done:
                continue
            if ranks.main:
                print(f"{number} of {len(chosen)}: {sampling.about['sampler']}, {len(sampling.times) - 1} steps")
            rows = self.sampled(recipe, against.metrics, reference, ranks, where, neighbours=False)
            if not ranks.main:
                continue
            (row,) = rows
            flat = {k: v for k, v in row.items() if not isinstance(v, dict | list)} | {"fid": row["value"]}
            done[key] = flat | {"samples": key}
            add_points(path, {key: done[key]})
            self.kept()
            print(describe(row), flush=True)
        if ranks.main:
            add_points(path, {key: done[key] for key in mine})
        return path, [{**self.model.facts.described, **done[key]} for key in mine] if ranks.main else []


def read_sweep(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of sweep.csv by what they are of; none where there is no file."""
    rows = read_csv(path)[0] if path.is_file() else []
    return {row["samples"]: row for row in rows if row.get("samples")}


def add_points(path: Path, points: Mapping[str, Mapping[str, Any]]) -> None:
    """Put rows at the end of sweep.csv, where the later count, under its lock: other sweeps may write to it as well.
    Written whole, what varies first."""
    with locked(path.with_name(f".{path.name}.lock"), str(path), wait=True):
        others = {key: row for key, row in read_sweep(path).items() if key not in points}
        rows = [*others.values(), *points.values()]
        write_atomically(path, csv_text(rows, [n for n in FIRST if any(n in r for r in rows)]))
