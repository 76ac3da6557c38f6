"""lab task=modes: how much of each mode every sampler makes of exact scores, against the modes' weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffusion.errors import Refusal
from diffusion.lab.modes import Interval, Shares, class_weights, shares
from diffusion.lab.page import Charts, Grid, Words
from diffusion.lab.tasks.ideas import ideas
from diffusion.lab.tasks.laboratory import SHADES, Laboratory
from diffusion.noise import ImageNoise
from diffusion.page.chart import Chart, Level, Series
from diffusion.samplers.base import Sampler

LEAST = 5  # expected of the rarest class
CHUNK = 5000  # points whose walks are taken together
UNLIKELY = 1e-3  # p below which shares are not those of the data


class Counted(NamedTuple):
    """What a sampler has made; None where its walks ran away."""

    words: str
    shares: Shares | None
    intervals: list[Interval]

    @property
    def right(self) -> bool:
        return self.shares is not None and self.shares.p > UNLIKELY


def main(lab: Laboratory) -> None:
    asked, weights = lab.asked, class_weights(lab.toy).tolist()
    if len(weights) < 2:
        raise Refusal(f"task=modes: toy={lab.toy_name} has a single class, of which there is nothing to count.")
    if asked.num_points * min(weights) < LEAST:
        raise Refusal(
            f"modes.num_points={asked.num_points}: of the rarest class {LEAST} samples or more must be expected, for a "
            f"test to mean anything: give at least {math.ceil(LEAST / min(weights))}."
        )
    page = lab.page(
        f"Shares of modes: {lab.toy_name} on {lab.schedule_name}",
        f"{asked.num_points:,} samples of each sampler in {asked.num_steps:,} steps by exact scores, counted by the "
        f"class they belong to. One that samples from the data makes of each class what its weight is, but for chance; "
        f"p is the chance of shares as far off as these, were there no other reason.",
    )
    found = []
    for named in lab.samplers:
        times = named.times(lab.schedule, asked.num_steps, widest=lab.widest)
        counted = sampled_shares(lab, named.make(lab.schedule), times)
        found.append(Counted(named.words, counted, counted.intervals(asked.confidence) if counted else []))
        p = "its walks ran away" if counted is None else f"p = {counted.p:.3g}"
        lab.say(f"{named.words}: {p}" + ("" if found[-1].right else ", not the weights of the data"))
    said = verdict(found)
    for text in said:
        lab.say(text)
    table(lab, found, weights)
    page.add(*(Words(text, "verdict") for text in said), *charts(lab, found, weights))
    page.add(grid(lab, found, weights), *ideas("langevin", "ladder", "corrector", "shares"))
    lab.finish(page)


def sampled_shares(lab: Laboratory, sampler: Sampler, times: Sequence[float]) -> Shares | None:
    """Counts of the samples; None if some are not finite."""
    denoise, ends = lab.toy.denoiser(lab.schedule), []
    for numbers in torch.arange(lab.asked.num_points).split(CHUNK):
        noise = ImageNoise(lab.seed, numbers)
        x = float(lab.schedule.std(times[0])) * noise(torch.zeros(len(numbers), lab.dim, dtype=torch.float64))
        ends.append(sampler.sample(denoise, x, times, noise))
    x = torch.cat(ends)
    return shares(lab.toy, x) if x.isfinite().all() else None


def verdict(found: Sequence[Counted]) -> list[str]:
    """Who samples the data's shares, in a sentence or two."""
    right, wrong = ([c.words for c in found if c.right == wanted] for wanted in (True, False))
    text = [f"As far as so many samples tell, these give each class its weight: {', '.join(right)}."] if right else []
    return text + ([f"These do not: {', '.join(wrong)}."] if wrong else [])


def table(lab: Laboratory, found: Sequence[Counted], weights: Sequence[float]) -> None:
    rows = []
    for counted in found:
        for label, (weight, interval) in enumerate(zip(weights, counted.intervals, strict=False)):
            about = {"sampler": counted.words, "class": label, "weight": weight}
            of_it = {"count": counted.shares.counts[label], **interval._asdict(), "p": counted.shares.p}
            rows.append(about | of_it)
    lab.table("modes.csv", rows, ("sampler", "class", "weight"))


def grid(lab: Laboratory, found: Sequence[Counted], weights: Sequence[float]) -> Grid:
    """Shares of each class by each sampler, below the weights."""
    rows = [("weights", *(f"{weight:.4f}" for weight in weights), "", "")]
    for counted in found:
        if counted.shares is None:
            rows.append((counted.words, *[None] * len(weights), None, "ran away: its steps are too long"))
            continue
        cells = (f"{interval.share:.4f}" for interval in counted.intervals)
        rows.append((counted.words, *cells, f"{counted.shares.p:.2g}", "yes" if counted.right else "no"))
    columns = ("sampler", *map(str, range(len(weights))), "p", "the weights?")
    note = f"Intervals of {lab.asked.confidence:.0%} (Wilson) are in modes.csv. No: p is below {UNLIKELY:g}."
    return Grid("Shares by class", columns, rows, note)


def charts(lab: Laboratory, found: Sequence[Counted], weights: Sequence[float]) -> list[Charts]:
    """Share over weight by class; and the interval of the rarest class, sampler by sampler."""
    shown = [counted for counted in found if counted.shares is not None]
    if not shown:
        return []
    labels, series = list(range(len(weights))), []
    for k, counted in enumerate(shown):
        ratios = [interval.share / weight for interval, weight in zip(counted.intervals, weights, strict=True)]
        series.append(Series(SHADES[k % len(SHADES)], counted.words, labels, ratios, tag=f"sampler-{k}"))
    title, note = "Share of each class over its weight", "1 is right; the rarer a class, the more it is chance's."
    ratio = Chart(title, "share / weight", series, x_label="class", wide=True, log=True, note=note)
    rare = weights.index(min(weights))
    series = [
        Series("q3", "share", list(range(len(shown))), [c.intervals[rare].share for c in shown], "points", "share")
    ]
    for k, counted in enumerate(shown):
        name = "" if k else f"interval of {lab.asked.confidence:.0%}"
        ends = [counted.intervals[rare].low, counted.intervals[rare].high]
        series.append(Series("q4", name, [k, k], ends, tag=f"interval-{k}"))
    note = "; ".join(f"{k}: {counted.words}" for k, counted in enumerate(shown))
    level, title = Level("paper", "its weight", weights[rare], tag="weight"), f"The rarest class, {rare}"
    rarest = Chart(title, "share", series, [level], x_label="sampler", log=True, note=note, wide=True)
    return [lab.drawn(modes=ratio), lab.drawn(rarest=rarest)]
