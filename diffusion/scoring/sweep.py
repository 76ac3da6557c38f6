"""FID over numbers of steps and kinds of noise (Song et al. 2021, DDIM, table 1), point by point, in sweep.csv."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.files import csv_text, read_csv, write_atomically
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
        if ranks.main and path.is_file():
            done = {row["samples"]: row for row in read_csv(path)[0] if row.get("samples")}
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
            write_sweep(path, list(done.values()))
            self.kept()
            print(describe(row), flush=True)
        if ranks.main:
            write_sweep(path, [done[key] for key in [*(k for k in done if k not in mine), *mine]])  # the later count
        return path, [{**self.model.facts.described, **done[key]} for key in mine] if ranks.main else []


def write_sweep(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """sweep.csv: what varies first; written whole."""
    write_atomically(path, csv_text(rows, [n for n in FIRST if any(n in r for r in rows)]))
