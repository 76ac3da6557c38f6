"""lab task=forward and task=reverse: how modes merge in noise and part again, as pictures, tables and an animation."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.errors import Refusal
from diffusion.lab import plane
from diffusion.lab.page import Charts, Picture
from diffusion.lab.pictures import Frame, animation, panels, space_time
from diffusion.lab.tasks.ideas import ideas
from diffusion.lab.tasks.laboratory import SHADES, Laboratory
from diffusion.page.chart import Chart, Series
from diffusion.process.grids import geometric
from diffusion.process.schedule import Schedule
from diffusion.samplers.ddim import DDIM

SHOWN_PATHS = 40  # of points that move, and of walks along the flow
SHOWN_WALKS = 12  # of each sampler
COLUMNS = 160  # of the picture of space and time
EVERY = 4  # of these, that a density is looked for its peaks at
KNOWN = 2000  # points of the data that information is estimated from
WIDTHS = (1 / 3, 2 / 3, 4 / 3, 3)  # of the noise over the data's, at times that are shown
A_ROW = 3  # frames beside each other


def main(lab: Laboratory) -> None:
    if lab.dim != 2:
        raise Refusal(f"task={lab.task} shows the plane: gaussian.mean and gaussian.stds need two numbers each.")
    (forward if lab.task == "forward" else reverse)(lab)


# ---- noise comes ----


def forward(lab: Laboratory) -> None:
    """Densities and scores at some times, what is left to know of the class, space and time, an animation."""
    asked, toy, schedule = lab.asked, lab.toy, lab.schedule
    page = lab.page(
        f"Noise comes: {lab.toy_name} on {lab.schedule_name}",
        "Each point of the data is moved towards noise, x_t = alpha_t x_0 + sigma_t epsilon. Modes widen, meet and "
        "become "
        "one; the score, which points to where the density rises, turns from many pits to a single one. Everything is "
        "drawn at the width that data and noise have together, x_t / std_t.",
    )
    times = telling(lab) if asked.times is None else checked(asked.times, schedule.num_timesteps)
    lab.say(f"{lab.toy_name} on {lab.schedule_name} at t = {', '.join(f'{t:g}' for t in times)}")
    x0 = lab.points(asked.num_points)
    walk = plane.noising(toy, schedule, times, x0, lab.seed)
    fields = [plane.field(toy, schedule, t) for t in times]
    above = [
        Frame(f"t = {t:g}", plane.HALF, found.density, found.places, found.scores)
        for t, found in zip(times, fields, strict=True)
    ]
    below = [Frame("", plane.HALF, points=places, classes=walk.classes) for places in walk.places]
    words = (
        "Above, densities and scores: dark where data are, arrows uphill. Below, the same points at each time, in the "
    )
    page.add(Picture(panels([above, below], lab.path("fields.png")), words + "colours of their classes."))
    page.add(known_of_the_class(lab))
    ladder = down(schedule)[::-1]
    moving = plane.noising(toy, schedule, ladder, x0[:SHOWN_PATHS], lab.seed)
    words = "The first coordinate over time: from modes at the left to one bell at the right."
    page.add(Picture(landscape(lab, ladder, moving, "Density over time, and points of data in it"), words))
    if asked.frames:
        stops = [0.0, *thinned(ladder, asked.frames - 1)]
        page.add(Picture(film(lab, plane.noising(toy, schedule, stops, x0, lab.seed)), "Noise comes."))
    page.add(*ideas("score", "class", "langevin"))
    lab.finish(page)


def known_of_the_class(lab: Laboratory) -> Charts:
    """I(class; x_t) and the peaks of the density over t."""
    toy, schedule, x0, rows = lab.toy, lab.schedule, lab.points(KNOWN), []
    for t in down(schedule)[::-1][::EVERY]:
        alpha, sigma = (float(value) for value in schedule(t))
        bits = plane.class_bits(toy, schedule, t, x0, lab.seed)
        peaks = plane.peaks_at(toy, schedule, t)
        rows.append({"t": t, "alpha": alpha, "sigma": sigma, "class_bits": bits, "peaks": peaks})
    lab.table("forward.csv", rows)
    at, over = [row["t"] for row in rows], {"x_label": "t", "x_log": True, "zero": True}
    bits = Series("q4", "", at, [row["class_bits"] for row in rows], tag="bits")
    peaks = Series("q3", "", at, [float(row["peaks"]) for row in rows], tag="peaks")
    return lab.drawn(
        class_bits=Chart("What a noised point tells of its class", "bits", [bits], **over),
        peaks=Chart("Peaks of the density", "peaks", [peaks], **over),
    )


# ---- noise goes ----


def reverse(lab: Laboratory) -> None:
    """Walks of the samplers from noise, when each is decided, and an animation of the flow."""
    asked, toy, schedule = lab.asked, lab.toy, lab.schedule
    page = lab.page(
        f"Noise goes: {lab.toy_name} on {lab.schedule_name}",
        f"Walks of {asked.num_steps} steps from pure noise to data by exact scores. A walk is decided when the class "
        f"that "
        f"its x_t makes most probable is the one it ends in. Where a walk along the flow ends is settled by its "
        f"start; a sampler that adds noise may change its mind for as long as modes overlap.",
    )
    walks = walks_of_all(lab)
    frames = [
        Frame(words, plane.HALF, paths=walk.places[:, :SHOWN_WALKS], classes=walk.classes[:SHOWN_WALKS])
        for words, walk in walks.items()
    ]
    rows = [frames[i : i + A_ROW] for i in range(0, len(frames), A_ROW)]
    words = f"{SHOWN_WALKS} walks of each sampler from the same noise, in the colours of the classes that they end in."
    page.add(Picture(panels(rows, lab.path("paths.png")), words), when_decided(lab, walks))
    ladder = down(schedule)
    flow, exact = DDIM(schedule), toy.denoiser(schedule)
    some = plane.denoising(toy, flow, exact, ladder, SHOWN_PATHS, lab.seed)
    words = "The first coordinate over time, from one bell at the left to modes at the right."
    page.add(Picture(landscape(lab, ladder, some, "Density over time, and walks along the flow in it"), words))
    if asked.frames:
        stops = [*thinned(ladder, asked.frames - 1), 0.0]
        walk = plane.denoising(toy, flow, exact, stops, asked.num_points, lab.seed)
        page.add(Picture(film(lab, walk), "Noise goes, along the flow."))
    page.add(*ideas("flow", "langevin", "class"))
    lab.finish(page)


def walks_of_all(lab: Laboratory) -> dict[str, plane.Paths]:
    """By the words of each sampler that goes from noise to data."""
    asked, exact, found = lab.asked, lab.toy.denoiser(lab.schedule), {}
    for named in lab.samplers:
        if named.plain:
            continue
        lab.say(f"{named.words}: {asked.num_points} walks")
        times = named.times(lab.schedule, asked.num_steps, widest=lab.widest)
        sampler = named.make(lab.schedule)
        walk = plane.denoising(lab.toy, sampler, exact, times, asked.num_points, lab.seed)
        if not np.isfinite(walk.places).all():
            raise Refusal(
                f"samplers: {named.words!r} runs away in reverse.num_steps={asked.num_steps} steps: give more."
            )
        found[named.words] = walk
    if not found:
        raise Refusal("samplers: none of them goes from noise to data; give ddim or ancestral, for example.")
    return found


def when_decided(lab: Laboratory, walks: dict[str, plane.Paths]) -> Charts:
    """The share of walks already in their class, over t."""
    rows, series = [], []
    for k, (words, walk) in enumerate(walks.items()):
        decided = list(zip(walk.times, walk.decided, strict=True))
        rows += [{"sampler": words, "step": step, "t": t, "decided": share} for step, (t, share) in enumerate(decided)]
        at, shares = zip(*[pair for pair in decided[::-1] if pair[0] > 0], strict=True)
        series.append(Series(SHADES[k % len(SHADES)], words, at, shares, tag=f"sampler-{k}"))
    lab.table("reverse.csv", rows)
    title, label = "When a walk is decided", "share of walks already in their class"
    chart = Chart(title, label, series, x_label="t", x_log=True, wide=True, zero=True)
    return lab.drawn(decided=chart)


# ---- both ----


def telling(lab: Laboratory) -> list[float]:
    """0, T, and the times between them at which noise is as wide as the data, and somewhat less and more."""
    width, top = float(lab.toy.spread(lab.schedule(0)).max()), lab.schedule.num_timesteps
    least = float(lab.schedule.log_ratio(top))
    ratios = [share * width for share in WIDTHS if -math.log(share * width) > least]
    found = [lab.schedule.time_of(-math.log(ratio)) for ratio in ratios]
    return [0.0, *(float(round(t)) if t > 10 else t for t in found), float(top)]


def checked(times: Sequence[float], top: int) -> list[float]:
    """Rising times, 0 allowed."""
    found = sorted(set(map(float, times)))
    if not found or found[0] < 0 or found[-1] > top:
        raise Refusal(f"forward.times={list(times)}: give times from 0 to schedule.num_timesteps={top}, at least one.")
    return found


def down(schedule: Schedule) -> list[float]:
    """Times from T to 1, evenly in lambda."""
    return geometric(schedule, schedule.num_timesteps, 1.0, COLUMNS - 1)


def thinned(times: Sequence[float], number: int) -> list[float]:
    """So many of the times, evenly, the first and the last among them."""
    return [times[round(k * (len(times) - 1) / max(number - 1, 1))] for k in range(min(number, len(times)))]


def landscape(lab: Laboratory, times: Sequence[float], walk: plane.Paths, title: str) -> Path:
    """Space and time with paths in it."""
    across = plane.marginal(lab.toy, lab.schedule, times)
    titles = (title, "t, evenly in log(sigma / alpha)", f"{times[0]:g}", f"{times[-1]:g}")
    return space_time(across, plane.HALF, walk.places[..., 0], walk.classes, titles, lab.path("space_time.png"))


def film(lab: Laboratory, walk: plane.Paths) -> Path:
    """An animation of points over the density that they are drawn from."""
    frames = []
    for t, places in zip(walk.times, walk.places, strict=True):
        density = plane.field(lab.toy, lab.schedule, t, points=120).density
        frames.append(Frame(f"t = {t:.4g}", plane.HALF, density, points=places, classes=walk.classes))
    return animation(frames, lab.path(f"{lab.task}.gif"))
