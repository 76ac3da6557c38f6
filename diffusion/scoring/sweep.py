"""FID over numbers of steps and kinds of noise (Song et al. 2021, DDIM, table 1), point by point, in sweep.csv."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.errors import Refusal
from diffusion.files import csv_text, locked, read_csv, write_atomically
from diffusion.samplers.ancestral import Ancestral
from diffusion.scoring.evaluation import Evaluation, Sweep
from diffusion.scoring.recipe import Plan, Recipe, described
from diffusion.scoring.scores import describe

FIRST = ("eta", "variance", "words", "num_steps", "nfe", "fid", "num_images", "sampler")


class Swept(NamedTuple):
    """A sampling of a sweep. words: of the sampler, as the user gives them in sweep.samplers; "" for those of the
    published table."""

    words: str
    recipe: Recipe

    @property
    def title(self) -> str:
        """For messages, with the number of steps: "ddim eta=0.5, 20 steps"."""
        made = self.recipe.sampler
        settings = "".join(f" {key}={value}" for key, value in described(made).items())
        name = self.words or f"{getattr(made, 'func', made).__name__.lower()}{settings}"
        return f"{name}, {self.recipe.plan.num_steps} steps"


def samplings_of(
    sweep: Sweep, recipe: Recipe, others: Mapping[str, tuple[Callable, Plan]] | None = None
) -> list[Swept]:
    """The recipe with each sampler of the sweep in turn, all at each number of steps: DDIM at each eta, ancestral
    sampling with the large variance, and others, by their words, with their plans."""
    plan = {"spacing": recipe.plan.spacing, "rho": recipe.plan.rho, "clip_x0": recipe.plan.clip_x0}
    found = [Swept("", recipe.by_ddim(steps, eta, **plan)) for eta in sweep.eta for steps in sweep.num_steps]
    for steps in sweep.num_steps if sweep.large else ():
        large = replace(recipe, sampler=partial(Ancestral, variance="large"), plan=Plan(steps, **plan))
        found.append(Swept("", large))
    for words, (sampler, chosen) in (others or {}).items():
        for steps in sweep.num_steps:
            found.append(Swept(words, replace(recipe, sampler=sampler, plan=replace(chosen, num_steps=steps))))
    return found


class SweepEvaluation(Evaluation):
    """FID of each sampling of a sweep. Arguments as `Evaluation`.

    Args:
        sweep: which samplings. others: its further samplers, and their plans, by their words.
    """

    def __init__(
        self, *args: Any, sweep: Sweep, others: Mapping[str, tuple[Callable, Plan]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sweep, self.others = sweep, others

    def samplings(self) -> list[Swept]:
        assert self.recipe is not None
        return samplings_of(self.sweep, self.recipe, self.others)

    def recipes(self) -> list[Recipe]:
        return [swept.recipe for swept in self.samplings()]

    def check(self) -> None:
        """As `Evaluation.check`; and ValueError where two points are the same sampling, which would be one row."""
        super().check()
        known: dict[str, str] = {}
        for swept in self.samplings():
            name = self.name(self.gallery(swept.recipe, Ranks(), self.place).sampling)
            if name in known:
                raise Refusal(
                    f"The sweep has a point twice: {known[name]}, and {swept.title}, are the same sampling. Leave one "
                    f"of them out."
                )
            known[name] = swept.title

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
        chosen = self.samplings()
        for number, (words, recipe) in enumerate(chosen, 1):
            sampling = self.gallery(recipe, ranks, where).sampling
            key = f"{self.name(sampling)}_{self.num_images}_{against.extractor.digest[:12]}_{held}"
            mine.append(key)
            if key in done:
                done[key] = done[key] | {"words": words}
                continue
            if ranks.main:
                print(f"{number} of {len(chosen)}: {words or sampling.about['sampler']}, {sampling.num_steps} steps")
            rows = self.sampled(recipe, against.metrics, reference, ranks, where, neighbours=False)
            if not ranks.main:
                continue
            (row,) = rows
            flat = {k: v for k, v in row.items() if not isinstance(v, dict | list)} | {"fid": row["value"]}
            done[key] = flat | {"words": words, "samples": key}
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
