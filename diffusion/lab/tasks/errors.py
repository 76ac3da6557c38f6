"""lab task=errors: where a sampler's error comes from, of data whose score is known; of images see lab_images.py."""

from collections.abc import Sequence

import torch

from diffusion.errors import Refusal
from diffusion.lab import errors, initialisation, refinement, training_error, verdict
from diffusion.lab.gaussian import denoising_error, end_of, fitted, law_at
from diffusion.lab.page import Grid, Page, Words
from diffusion.lab.tasks import images as lab_images
from diffusion.lab.tasks.ideas import ideas
from diffusion.lab.tasks.laboratory import LOWEST, SHADES, Laboratory, Named, refuse_stays
from diffusion.noise import Stream, seed63
from diffusion.page.chart import Chart, Series
from diffusion.process.grids import even, refined, steps_of
from diffusion.process.schedule import Denoiser
from diffusion.process.toy import Gaussian
from diffusion.samplers.base import Sampler

SHORT_STEPS = 4000  # of walks that stand for exact ones, at most, unless they have only two in a step
FEWER = 1000  # points of a mixture where many walks are compared


def main(lab: Laboratory) -> None:
    """Measure, write, and say which error is largest."""
    if lab.toy is None:
        lab_images.main(lab)
        return
    check_settings(lab)
    denoise, name = denoiser_of(lab)
    steps, walker = steps_of(lab.times), type(lab.sampler).__name__
    lab.say(f"Errors of {walker}, {steps} steps, on {lab.toy_name} by {name or 'the exact denoiser'}")
    page = lab.page(
        f"Where the error comes from: {lab.toy_name}",
        f"A walk of {steps} steps by {walker} on {lab.schedule_name}, from t = {lab.times[0]:g} to {lab.times[-1]:g}: "
        f"what "
        f"it is off by because it starts from noise in place of noised data, because its denoiser is not the exact "
        f"one, and because its steps are not infinitely short.",
    )
    page.add(*ends_of_walks(lab, denoise, name))
    at_the_start(lab, page)
    step_by_step(lab, page)
    against_steps(lab, page)
    of_training(lab, page, denoise, trained=name is not None)
    page.add(*ideas("sum", "initialisation", "irreducible", "gaussian" if exactly(lab) else "noise"))
    lab.finish(page)


def check_settings(lab: Laboratory) -> None:
    """Refuse what cannot be measured, before anything is."""
    if exactly(lab):
        compared = {named.words: named.make(lab.schedule) for named in lab.samplers if not named.plain}
        for words, sampler in {"sampler": lab.sampler, **compared}.items():
            refuse_curved(words, sampler, lab)
        for named in lab.samplers:
            named.times(lab.schedule, min(lab.asked.num_steps), LOWEST)
    else:
        refuse_stays(lab.times)
        nested_grids([1.0, 0.0], sorted(set(lab.asked.num_steps)))


def refuse_curved(words: str, sampler: Sampler, lab: Laboratory) -> None:
    """Refuse a sampler whose steps are not affine on Gaussian data: one that stays, and those after it."""
    top, exact = lab.schedule.num_timesteps, lab.toy.denoiser(lab.schedule)
    try:
        down = even(top, top / 2, 1 + sampler.memory)
        end_of(sampler, exact, law_at(lab.toy, lab.schedule(top)), [top, *down])
    except ValueError as error:
        raise Refusal(
            f"samplers: {words!r}: its step depends on x by more than the denoiser does, so that the law of Gaussian "
            f"data is not known after it. Of a corrector give corrector.norms=expected."
        ) from error


def exactly(lab: Laboratory) -> bool:
    """Whether laws are known exactly: of Gaussian data, where the denoiser is affine."""
    return isinstance(lab.toy, Gaussian) and lab.model is None


def parts(lab: Laboratory) -> int:
    """Short steps in each step of a walk that stands for an exact one: 16, fewer of many."""
    return max(2, min(16, SHORT_STEPS // (len(lab.times) - 1)))


def denoiser_of(lab: Laboratory) -> tuple[Denoiser, str | None]:
    """The denoiser whose walk is measured, and what to call it; None of the exact one."""
    number = lab.fitted_on
    if lab.model is not None:
        return lab.trained_on_points(), f"the network of {lab.model.path.name}"
    if number is None:
        return lab.toy.denoiser(lab.schedule), None
    if not isinstance(lab.toy, Gaussian):
        raise Refusal(
            f"gaussian.fitted_on={number} is for toy=gaussian. Train a network on {lab.toy_name}, by python -m "
            f"diffusion.train +experiment=gmm data.toy={lab.toy_name}, and give checkpoint=runs/gmm."
        )
    generator = torch.Generator().manual_seed(seed63(lab.seed, Stream.SAMPLES))
    return fitted(lab.toy, number, generator).denoiser(lab.schedule), f"that of the Gaussian of {number:,} points"


def ends_of_walks(lab: Laboratory, denoise: Denoiser, name: str | None) -> list[Words | Grid]:
    """The parts of the three errors, their sum and the total, and which is largest."""
    exact = lab.toy.denoiser(lab.schedule)
    found = {name or "the exact denoiser": parts_of(lab, denoise)}
    if name is not None:
        found["the exact denoiser"] = parts_of(lab, exact)
    said = verdict.of_parts(next(iter(found.values())), lab.walk)
    for text in said.words:
        lab.say(text)
    columns = ("denoiser", "initialisation", "training", "discretisation", "their sum", "total")
    rows = [(who, p.initialisation, p.training, p.discretisation, p.sum, p.total) for who, p in found.items()]
    lab.table("parts.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    note = "Wasserstein distances (W2) of Gaussians, their mean and covariance carried through every step exactly."
    if not exactly(lab):
        note = (
            f"Root mean square distances of {lab.asked.num_points:,} points that share their noise: at least the "
            f"W2 of their laws. What stands for a walk without discretisation has {parts(lab)} steps in each step."
        )
    return [*(Words(text, "verdict") for text in said.words), Grid("The end of the walk", columns, rows, note)]


def parts_of(lab: Laboratory, denoise: Denoiser) -> errors.Parts:
    if exactly(lab):
        return errors.of_gaussian(lab.toy, lab.sampler, denoise, lab.times)
    x0 = lab.points(lab.asked.num_points)
    return errors.of_mixture(lab.toy, lab.sampler, denoise, lab.times, x0, lab.seed, parts(lab))


# ---- initialisation ----


def at_the_start(lab: Laboratory, page: Page) -> None:
    """W2 of the law of x_t from the prior, over t: what it would be to start there."""
    top, rows = lab.schedule.num_timesteps, []
    for t in sorted({1, *training_error.some_times(top, 60), top}):
        alpha, sigma, std = (float(value) for value in (*lab.schedule(t), lab.schedule.std(t)))
        low, high = initialisation.of_mixture(lab.toy, lab.schedule, t)
        rows.append({"t": t, "alpha": alpha, "sigma": sigma, "prior_std": std, "w2_low": low, "w2_high": high})
    lab.table("initialisation.csv", rows)
    begun, std = lab.times[0], float(lab.schedule.std(lab.times[0]))
    low, high = initialisation.of_mixture(lab.toy, lab.schedule, begun)
    known = high - low < 1e-9 * max(high, 1e-12)
    value = f"{low:.4g}" if known else f"between {low:.4g} and {high:.4g}"
    if not known and lab.wide(begun):
        value += ", and in so much noise all but the lower of the two"
    at = [row["t"] for row in rows]
    series = [Series("q3", "" if known else "at least", at, [row["w2_low"] for row in rows], tag="low")]
    if not known:
        series.append(Series("q4", "at most", at, [row["w2_high"] for row in rows], tag="high"))
    chart = Chart("Initialisation error", "W2(law of x_t, prior)", series, x_label="t", log=True)
    page.add(
        Words(
            f"Initialisation. The walk starts from N(0, {std:.4g}² I) at t = {begun:g}, the law of noised data of "
            f"mean 0 "
            f"and variance 1: N(0, I) under VP, N(0, (sigma² + 1) I) under VE. W2 from the law of x_t is {value}."
        ),
        lab.drawn(initialisation=chart),
    )


# ---- discretisation ----


def step_by_step(lab: Laboratory, page: Page) -> None:
    """1 - r_s^2 / r_t^2 of each step beside its measured error."""
    times = [t for t in lab.times if t > 0]
    if exactly(lab):
        steps = errors.steps_of_gaussian(lab.toy, lab.sampler, times)
        how = "The local error is W2 between the law after one exact step from the law at t, and the law at s."
    else:
        x0 = lab.points(min(lab.asked.num_points, FEWER))
        steps = errors.steps_of_mixture(lab.toy, lab.sampler, times, x0, lab.seed, parts(lab))
        how = (
            f"The local error is how far a step ends from {parts(lab)} short ones on the same noise, root mean square."
        )
    rows = [
        {
            "t": k.t,
            "s": k.s,
            "one_minus_ratio": k.renewed,
            "local_error": k.error,
            "std_s": float(lab.schedule.std(k.s)),
        }
        for k in steps
    ]
    lab.table("steps.csv", rows)
    relative = [row["local_error"] / row["std_s"] for row in rows]
    series = [
        Series("q3", "1 − r_s² / r_t²", [k.t for k in steps], [k.renewed for k in steps], tag="renewed"),
        Series("q4", "local error / std_s", [k.t for k in steps], relative, tag="error"),
    ]
    chart = Chart("Discretisation, step by step", "of a step from t", series, x_label="t", log=True)
    text = (
        "Discretisation. 1 − r_s²/r_t², with r = sigma / alpha (under VE 1 − sigma_s²/sigma_t²), is the share of the "
    )
    page.add(Words(f"{text}noise's variance that a step takes away. {how}"), lab.drawn(steps=chart))


def against_steps(lab: Laboratory, page: Page) -> None:
    """Distance from the exact law at t = 1 against the number of steps, for every sampler, with the fitted order."""
    wanted, rows, series, table = sorted(set(lab.asked.num_steps)), [], [], []
    chosen = [named for named in lab.samplers if not named.plain and (exactly(lab) or not named.anneals)]
    for k, named in enumerate(chosen):
        steps, found, order = distances(lab, named, wanted)
        rows += [{"sampler": named.words, "num_steps": n, "distance": d} for n, d in zip(steps, found, strict=True)]
        table.append((named.words, *found, order.order if order else None))
        series.append(Series(SHADES[k % len(SHADES)], named.words, steps, found, tag=f"sampler-{k}"))
        lab.say(f"{named.words}: " + (f"order {order.order:.3f}" if order else "no order to be read off"))
    lab.table("orders.csv", rows)
    if not series:
        return
    title, label = "Distance against steps", "distance at t = 1"
    chart = Chart(title, label, series, x_label="steps", log=True, x_log=True, wide=True)
    shown = wanted if exactly(lab) else wanted[:-1]
    columns = ("sampler", *(f"{n:,} steps" for n in shown), "order")
    note = "By the exact denoiser, from the exact law at T to t = 1. "
    note += (
        f"The order is that from {onset(wanted)} steps on."
        if exactly(lab)
        else "From the finest walk on the same noise."
    )
    page.add(lab.drawn(orders=chart), Grid("", columns, table, note))


def onset(wanted: Sequence[int]) -> int:
    """Steps from which on an order is read off: the error of few steps is not of one power."""
    return wanted[-1] // 4


def distances(
    lab: Laboratory, named: Named, wanted: Sequence[int]
) -> tuple[list[int], list[float], refinement.Order | None]:
    """By number of steps, exactly for Gaussian data, else from the walk of the most steps on the same noise; the "
    "order."""
    built = named.make(lab.schedule)
    if exactly(lab):
        grids = [named.times(lab.schedule, n, LOWEST) for n in wanted]
        found = [errors.distance_of_gaussian(lab.toy, built, grid) for grid in grids]
        taken = [len(grid) - 1 for grid in grids]
        return taken, found, refinement.fitted_order(taken, found, onset(taken))
    nested = nested_grids(named.times(lab.schedule, wanted[0], LOWEST), wanted)
    x0 = lab.points(min(lab.asked.num_points, FEWER))
    x = errors.starts(lab.schedule, nested[0][0], x0, lab.seed).data
    ends = refinement.refine(built, lab.toy.denoiser(lab.schedule), x, nested, lab.seed, torch.arange(len(x)))
    return ends.num_steps[:-1], ends.gaps(), refinement.order_of_gaps(ends.num_steps, ends.gaps())


def nested_grids(coarse: list[float], wanted: Sequence[int]) -> list[list[float]]:
    """Grids of so many steps, each of whose times is one of the last."""
    if len(wanted) < 2:
        raise Refusal(
            f"errors.num_steps={list(wanted)}: give two or more, the last of which the others are held against."
        )
    for n in wanted:
        if wanted[-1] % n or n % wanted[0]:
            raise Refusal(
                f"errors.num_steps={list(wanted)}: each must be a multiple of the least and divide the largest, as "
                f"walks on shared noise visit some of the times of the longest."
            )
    fine = refined(coarse, wanted[-1] // wanted[0])
    return [fine[:: wanted[-1] // n] for n in wanted]


# ---- training ----


def of_training(lab: Laboratory, page: Page, denoise: Denoiser, trained: bool) -> None:
    """E|D - x_0|^2 over t, irreducible and excess, and their sums."""
    top = lab.schedule.num_timesteps
    if exactly(lab):
        times = list(range(1, top + 1))
        found = [denoising_error(denoise, lab.toy, lab.schedule, t) for t in times]
    else:
        times, x0 = training_error.some_times(top, lab.asked.times), lab.points(lab.asked.num_points)
        found = [training_error.of_known(denoise, lab.toy, lab.schedule, t, x0, lab.seed) for t in times]
    irreducible, excess = [k.irreducible for k in found], [k.excess for k in found]
    lab.table("training.csv", [{"t": t, **k._asdict()} for t, k in zip(times, found, strict=True)])
    series = [Series("q3", "irreducible", times, irreducible, tag="irreducible")]
    if trained:
        series.insert(0, Series("q4", "excess", times, excess, tag="excess"))
    chart = Chart("Error of the denoiser", "E|D(x_t) − x_0|²", series, x_label="t", log=True)
    avoided, above = (top / len(times) * sum(part) for part in (irreducible, excess))
    total = (
        f"The sum over all t of E|D(x_t) − x_0|² is {avoided + above:.4g}: {avoided:.4g} that no denoiser avoids, and "
    )
    total += f"{above:.4g} in excess of it." if trained else "nothing else of the exact one."
    lab.say(total)
    page.add(Words(f"Training. {total}"), lab.drawn(training=chart))
    if lab.model is not None:
        page.add(in_units_of_the_loss(lab))


def in_units_of_the_loss(lab: Laboratory) -> Grid:
    """Excess of the network's own loss over the irreducible one, and of the loss of v, by quarter of t."""
    network, rows, cells = lab.model.denoiser, [], []
    for kind in dict.fromkeys((network.prediction, "v")):
        points = lab.points(training_error.POINTS_OF_A_QUARTER)
        found = training_error.loss_by_quarter(network, lab.toy, lab.schedule, kind, points, lab.seed)
        for quarter, (irreducible, excess) in enumerate(found, 1):
            share = f"{excess / irreducible:.2%}"
            cells.append((kind, quarter, irreducible, excess, share))
            rows.append({"loss": kind, "quarter": quarter, "irreducible": irreducible, "excess": excess})
            lab.say(f"loss of {kind}, quarter {quarter}: excess {share} of the irreducible")
    lab.table("quarters.csv", rows)
    note = f"t in four equal parts, the cleanest first; the network predicts {network.prediction}."
    return Grid("Loss by quarter of t", ("loss of", "quarter", "irreducible", "excess", "share"), cells, note)
