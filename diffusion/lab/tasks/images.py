"""lab task=errors checkpoint=...: the errors of a trained model of images, as far as they can be known without the
exact score, and a verdict."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.data.module import ImageShardsDataModule
from diffusion.denoiser import Clipped
from diffusion.errors import Refusal
from diffusion.images import LEVELS_PER_UNIT, from_uint8
from diffusion.lab import images, verdict
from diffusion.lab.initialisation import spectrum
from diffusion.lab.page import Grid, Words
from diffusion.lab.tasks.ideas import ideas
from diffusion.lab.tasks.laboratory import Laboratory
from diffusion.lab.training_error import Known, quarters, some_times
from diffusion.noise import Stream, keys, normal, permutation
from diffusion.page.chart import Chart, Series
from diffusion.process.grids import SPACINGS, steps_of, times
from diffusion.process.schedule import Denoiser, Prediction
from diffusion.progress import Progress
from diffusion.scoring.sampling import Counted

WALKS = 64  # images whose walks are compared, at most
KNOWN = 4096  # images that bounds, mean and covariance are taken from, at most
LEAST = 1e-8  # squared error a pixel that is drawn
LINES = (
    ("q4", "loss", "of the model"),
    ("q3", "linear", "of the best linear denoiser"),
    ("q1", "floor", "of the best denoiser of the known images"),
    ("paper", "gain", "what an affine change of the model gains"),
)
DISTANCES = 1e10  # and so many that their number squared, times the numbers in one, is not more


def main(lab: Laboratory) -> None:
    """Measure, write, judge."""
    found, split = measure(lab)
    model, steps = lab.model, steps_of(lab.times)
    unseen = split != model.facts.split
    said = verdict.of_images(found.begun, found.short, found.learned, found.tried, lab.walk, unseen)
    page = lab.page(
        f"Where the error comes from: {model.name}, step {model.step}",
        f"A walk of {steps} steps by {type(lab.sampler).__name__}. The exact score is not known, so errors are "
        f"bounded by "
        f"{lab.asked.num_images} images of {model.data_name}, split {split}, and by walks on shared "
        f"noise. Grey "
        f"levels, of 255: root mean square over pixels of the difference that an error makes to an image.",
    )
    page.add(*(Words(text, "verdict" if k < 2 else "") for k, text in enumerate(said.words)))
    page.add(effects(lab, found), at_the_start(lab, found.begun))
    page.add(
        *discretisation(lab, found),
        *training(lab, found.learned),
        *ideas("bounds", "carried", "noise", "initialisation"),
    )
    for text in said.words:
        lab.say(text)
    lab.finish(page)


class Found(NamedTuple):
    """All that is measured."""

    begun: images.Initialisation
    short: images.Discretisation
    learned: images.Training
    tried: list[images.Candidate]


def measure(lab: Laboratory) -> tuple[Found, str]:
    """All of it, and the split whose images it is measured on."""
    asked, model, device = lab.asked, lab.model, lab.place.device
    module, split = held_out(lab)
    known = known_images(module, asked.num_images, lab.seed, bool(model.denoiser.network.num_classes), device)
    x0, labels = first(known, asked.num_images)
    walked, given = first(known, WALKS)
    model.denoiser.network.to(device, memory_format=lab.place.memory_format)
    steps, at = steps_of(lab.times), some_times(lab.schedule.num_timesteps, asked.times)
    lab.say(
        f"Errors of {model.path} (step {model.step}, {model.weights} weights), {type(lab.sampler).__name__}, {steps} "
        f"steps, by {len(x0)} images of {model.data_name}, split {split}"
    )
    settings = settings_tried(lab)
    walks = images.calls_of_all(lab.sampler, lab.times, settings)
    total = walks * -(-len(walked) // lab.batch_size) + len(at) * -(-len(x0) // lab.batch_size)
    with Progress("errors", total, "network calls") as progress:
        attend = progress.add
        denoise = sampled(lab, attend, given)
        begun = images.initialisation(lab.sampler, denoise, lab.times, walked, known.spectrum, lab.seed)
        numbers = torch.arange(len(walked), device=device)
        z = normal(keys(numbers, lab.seed, Stream.PRIOR), walked.shape[1:])
        noise = float(lab.schedule.std(lab.times[0])) * z
        short = images.discretisation(lab.sampler, denoise, lab.times, noise, lab.seed)
        tried = images.candidates(settings, denoise, z, lab.seed)
        plain = measured(lab, attend)
        learned = images.training(lab.sampler, plain, lab.times, at, x0, labels, known, lab.seed, lab.batch_size)
    return Found(begun, short, learned, tried), split


# ---- what is measured with ----


def held_out(lab: Laboratory) -> tuple[ImageShardsDataModule, str]:
    """The split of the model's data that its denoiser is measured on."""
    of = lab.subject.data
    there, wanted = of(None).index.splits, lab.asked.split
    split = wanted or ("test" if "test" in there else "train")
    if split not in there:
        raise Refusal(f"errors.split={split}: the data set has no such split. It has: {', '.join(there)}.")
    return of(split), split


def chosen_images(module: Any, number: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """So many images of a split, at most all, chosen and put in order by the seed: (N, C, H, W) in [-1, 1], labels."""
    numbers = permutation(module.num_images, seed, Stream.BOUND)[:number]
    order = numbers.argsort()
    found, labels, *_ = module.samples.batch(numbers[order])
    back = torch.from_numpy(order.argsort())
    return from_uint8(found)[back], None if labels is None else labels[back]


def known_images(module: Any, wanted: int, seed: int, conditional: bool, device: torch.device) -> Known:
    """The images that the bounds know, as many as their distances can be worked out of. The denoiser is measured on the
    first of them."""
    dim = module.channels * module.image_size**2
    number = max(wanted, min(KNOWN, int((DISTANCES / dim) ** 0.5)))
    x0, labels = chosen_images(module, number, seed)
    return Known(x0.to(device), labels.to(device) if conditional and labels is not None else None, spectrum(x0))


def first(known: Known, number: int) -> tuple[Tensor, Tensor | None]:
    """The first so many of them, at most all, and their labels."""
    return known.images[:number], None if known.labels is None else known.labels[:number]


def sampled(lab: Laboratory, attend: Callable[[], None], labels: Tensor | None) -> Denoiser:
    """What the sampler calls: guided, clipped, with labels bound, in batches."""
    denoise = lab.recipe.denoiser(Counted(lab.model.denoiser, attend), lab.model.denoiser, lab.place)

    def in_batches(x_t: Tensor, t: float, given: None = None) -> Prediction:
        parts = []
        for rows in torch.arange(len(x_t), device=x_t.device).split(lab.batch_size):
            parts.append(denoise(x_t[rows], t, None if labels is None else labels[rows]))
        x0, epsilon, variance = zip(*parts, strict=True)
        return Prediction(torch.cat(x0), torch.cat(epsilon), None if variance[0] is None else torch.cat(variance))

    return in_batches


def measured(lab: Laboratory, attend: Callable[[], None]) -> Denoiser:
    """The denoiser as it was trained, its x_0 clipped where the sampler's is."""
    called = Counted(lab.model.denoiser, attend)
    return Clipped(called, lab.schedule) if lab.recipe.plan.clip_x0 else called


def settings_tried(lab: Laboratory) -> list[tuple[str, Any, list[float]]]:
    """The present setting, other spacings of as many steps, and twice as many of each."""
    top, steps, plan = lab.schedule.num_timesteps, steps_of(lab.times), lab.recipe.plan
    present = plan.spacing
    found = [("the present setting", lab.sampler, list(lab.times))]
    for number in dict.fromkeys((steps, min(2 * steps, top))):
        for spacing in SPACINGS:
            if (number, spacing) != (steps, present):
                words = f"sampler.spacing={spacing}" if number == steps else f"sampler.num_steps={number}"
                if number != steps and spacing != present:
                    words += f" sampler.spacing={spacing}"
                found.append((words, lab.sampler, times(lab.schedule, number, spacing, rho=plan.rho)))
    return found


# ---- what comes out ----


def effects(lab: Laboratory, found: Found) -> Grid:
    """What each error does to an image."""
    low, high = found.learned.effect
    order = found.short.order
    by = f", which fall at order {order.order:.2f}" if order else ""
    rows = [
        ("initialisation", grey(found.begun.effect), "walks from noised images and from noise, on the same noise"),
        ("discretisation", grey(found.short.effect), f"walks of more steps on the same noise{by}"),
        (
            "training, at least",
            grey(low),
            "what an affine change of the output gains; errors that pull each its own way",
        ),
        ("training, at most", grey(high), "all above the bound of the best denoiser; errors that all pull one way"),
    ]
    lab.table("errors.csv", [{"error": error, "grey_levels": value} for error, value, _ in rows])
    note = "What training does is an estimate: errors on the way are carried to the end as on Gaussian data."
    return Grid("Effect on an image", ("error", "grey levels", "from"), rows, note)


def at_the_start(lab: Laboratory, begun: images.Initialisation) -> Words:
    low, high = begun.distance
    std = float(lab.schedule.std(begun.t))
    return Words(
        f"Initialisation. At t = {begun.t:g} the law of these images, noised, is between {low:.3g} and {high:.3g} a "
        f"pixel (W2 over "
        f"the root of their number, in units of [-1, 1]) from N(0, {std:.4g}² I), the noise that walks start from."
    )


def discretisation(lab: Laboratory, found: Found) -> list[Any]:
    """Distances from the finest walk, and other settings of the sampler."""
    steps, gaps = found.short.num_steps[:-1], [grey(gap) for gap in found.short.gaps]
    lab.table("refinement.csv", [{"num_steps": n, "distance": g} for n, g in zip(steps, gaps, strict=True)])
    rows = [(c.words, c.num_steps, c.calls, grey(c.distance)) for c in found.tried]
    names = ("setting", "num_steps", "calls", "distance")
    lab.table("settings.csv", [dict(zip(names, row, strict=True)) for row in rows])
    chart = Chart(
        "Distance from the finest walk",
        "grey levels",
        [Series("q4", "", steps, gaps, tag="gaps")],
        x_label="steps",
        log=True,
        x_log=True,
        note=f"The finest has {found.short.num_steps[-1]:,} steps.",
    )
    columns = ("setting", "steps", "network calls", "grey levels")
    note = "From the images of the finest walk that begins at the highest of their first times."
    return [lab.drawn(refinement=chart), Grid("Other settings of the sampler", columns, rows, note)]


def training(lab: Laboratory, learned: images.Training) -> list[Any]:
    """Errors of x_0 by noise level, with their bounds, and by quarter of t."""
    held, at, dim = learned.held, learned.t, math.prod(lab.model.image_shape)
    bounds = [{"excess_low": h.excess.low, "excess_high": h.excess.high} for h in held]
    lab.table("training.csv", [{"t": t, **h._asdict(), **b} for t, h, b in zip(at, held, bounds, strict=True)])
    series = []
    for colour, field, name in LINES:
        kept = [(t, v / dim) for t, h in zip(at, held, strict=True) if (v := getattr(h, field)) / dim > LEAST]
        series.append(Series(colour, name, [t for t, _ in kept], [v for _, v in kept], tag=field))
    title, label = "Error of x_0 by noise level", "mean squared error a pixel"
    chart = Chart(title, label, series, x_label="t", log=True, wide=True)
    by_quarter = lambda values: quarters(lab.schedule.num_timesteps, at, [v / dim for v in values])  # noqa: E731
    cells = zip(
        verdict.QUARTERS,
        by_quarter([h.loss for h in held]),
        by_quarter([b["excess_low"] for b in bounds]),
        by_quarter([b["excess_high"] for b in bounds]),
        map(grey, learned.by_quarter),
        strict=True,
    )
    columns = ("quarter", "error of x_0", "excess, at least", "excess, at most", "grey levels, at most")
    note = "Squared errors a pixel; the last column is what they can move the end of a walk by."
    return [lab.drawn(training=chart), Grid("Training error by quarter of t", columns, list(cells), note)]


def grey(value: float) -> float:
    """In levels of 255."""
    return LEVELS_PER_UNIT * value
