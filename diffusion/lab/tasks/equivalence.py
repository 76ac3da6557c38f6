"""lab task=equivalence: DDPM's loss and DSM's on the same draws, VP's samples and VE's by the same model."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.denoiser import NetworkDenoiser
from diffusion.lab.equivalence import losses, walk_both
from diffusion.lab.page import Charts, Grid, Words
from diffusion.lab.tasks.ideas import ideas
from diffusion.lab.tasks.images import chosen_images
from diffusion.lab.tasks.laboratory import Laboratory
from diffusion.models.mlp import MLP
from diffusion.noise import Stream, keys, normal, seed63, uniform_int
from diffusion.page.chart import Chart, Series
from diffusion.process.grids import times
from diffusion.process.schedule import Denoiser, Prediction
from diffusion.process.variables import Exploding
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.annealed import AnnealedLangevin
from diffusion.samplers.ddim import DDIM

DTYPES = {"float64": torch.float64, "float32": torch.float32}
SAMPLERS = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "annealed_langevin": lambda schedule: AnnealedLangevin(schedule, 0.2),
}
"""Functions of x0, epsilon and lambda alone; with the large variance VP and VE take different steps."""
COLOURS = {"float64": ("q3", "q1", "q4"), "float32": ("q2", "paper", "ink")}
ROUNDING = 1e-9
WALKS = 16  # images that are sampled, at most


class LookedAt(NamedTuple):
    """network: what is looked at. prediction: what it outputs. who: what to call it. x0 (N, C, H, W) float64, labels
    (N,) or None: images for it."""

    network: nn.Module
    prediction: str
    who: str
    x0: Tensor
    labels: Tensor | None


def main(lab: Laboratory) -> None:
    subject = looked_at(lab)
    page = lab.page(
        f"One model under two names: {subject.who}",
        "DDPM's loss of the noise and score matching weighted by sigma², on the same draws of data, noise and times; "
        "and "
        "walks of the same samplers on a schedule and on its VE twin, which sees the same noised data divided by "
        "alpha.",
    )
    lab.say(f"Losses of {subject.who}: {len(subject.x0)} images, each at a time of its own")
    page.add(*same_losses(lab, subject), *same_walks(lab, subject), *ideas("dsm", "variables"))
    lab.finish(page)


def same_losses(lab: Laboratory, subject: LookedAt) -> list[Words | Grid]:
    """Both losses and their gradients, on the schedule and its twin, in two precisions."""
    network, prediction, _, x0, labels = subject
    seed, numbers, rows = lab.seed, torch.arange(len(x0)), []
    t = 1 + uniform_int(keys(numbers, seed, Stream.TIME), lab.schedule.num_timesteps)
    epsilon = normal(keys(numbers, seed, Stream.NOISE), x0.shape[1:], torch.float64)
    names = {lab.schedule_name: lab.schedule, f"VE twin of {lab.schedule_name}": Exploding(lab.schedule)}
    for name, schedule in names.items():
        for precision, dtype in DTYPES.items():
            network.to(dtype).eval().requires_grad_(True)
            found = losses(network, schedule, x0.to(dtype), epsilon.to(dtype), t, labels, prediction)
            rows.append({"schedule": name, "dtype": precision, **found._asdict()})
            lab.say(
                f"  {name}, {precision}: {found.simple:.6g} and {found.dsm:.6g}; they differ by {found.loss_gap:.1e}, "
                f"their gradients by {found.gradient_gap:.1e}"
            )
    lab.table("losses.csv", rows)
    worst = max(max(row["loss_gap"], row["gradient_gap"]) for row in rows if row["dtype"] == "float64")
    columns = ("schedule", "dtype", "L_simple", "DSM, weight sigma²", "difference", "of gradients")
    cells = [(*list(row.values())[:4], f"{row['loss_gap']:.1e}", f"{row['gradient_gap']:.1e}") for row in rows]
    said = f"In float64 the losses and their gradients differ by at most {worst:.1e}"
    said += ": they are one loss." if worst < ROUNDING else ", which is more than rounding."
    return [Words(said, "verdict"), Grid("Losses on the same draws", columns, cells, "Differences are relative.")]


def same_walks(lab: Laboratory, subject: LookedAt) -> list[Words | Charts]:
    """Samples of one model in both variables, step by step, in two precisions."""
    asked, schedule, seed = lab.asked, lab.schedule, lab.seed
    grid = times(schedule, min(asked.num_steps, schedule.num_timesteps), "trailing")
    shape, numbers = subject.x0.shape[1:], torch.arange(min(len(subject.x0), WALKS))
    start = float(schedule.std(grid[0])) * normal(keys(numbers, seed, Stream.PRIOR), shape, torch.float64)
    rows, series, worst = [], [], 0.0
    for precision, dtype in DTYPES.items():
        denoise = of_these(subject, NetworkDenoiser(subject.network.to(dtype), schedule, subject.prediction))
        for colour, (name, make) in zip(COLOURS[precision], SAMPLERS.items(), strict=True):
            found = walk_both(make, denoise, schedule, start.to(dtype), grid, seed)
            pairs = list(zip(found.times, found.gaps, strict=True))
            rows += [{"sampler": name, "dtype": precision, "t": t, "difference": gap} for t, gap in pairs]
            shown = [(t, gap) for t, gap in pairs[::-1] if t > 0 and gap > 0]
            at, gaps = [t for t, _ in shown], [gap for _, gap in shown]
            series.append(Series(colour, f"{name}, {precision}", at, gaps, tag=f"{name}-{precision}"))
            worst = max(worst, *found.gaps) if precision == "float64" else worst
            lab.say(f"  {name}, {precision}: VP and VE walks differ by at most {max(found.gaps):.1e}")
    lab.table("walks.csv", rows)
    title, label = "VP and VE walks of one model", "largest difference, relative"
    chart = Chart(title, label, series, x_label="t", log=True, wide=True)
    said = f"In float64 the samples of both are the same to {worst:.1e}; float32 adds its rounding."
    return [Words(said, "verdict"), lab.drawn(walks=chart)]


def of_these(subject: LookedAt, denoiser: Denoiser) -> Denoiser:
    """With the labels of the first images bound."""

    def denoise(x_t: Tensor, t: float | Tensor, labels: None = None) -> Prediction:
        return denoiser(x_t, t, None if subject.labels is None else subject.labels[: len(x_t)])

    return denoise


def looked_at(lab: Laboratory) -> LookedAt:
    """The checkpoint's network with images of its data, or a small network of random weights with points."""
    number = lab.asked.num_images
    if lab.model is None:
        points = lab.points(number)[..., None, None]
        return LookedAt(random_network(lab), "epsilon", "a small network with random weights", points, None)
    network, who = lab.model.denoiser.network, f"the network of {lab.model.path.name}"
    if lab.toy is not None:
        return LookedAt(network, lab.model.denoiser.prediction, who, lab.points(number)[..., None, None], None)
    images, labels = chosen_images(lab.subject.data(None), number, lab.seed)
    given = labels if network.num_classes else None
    return LookedAt(network, lab.model.denoiser.prediction, who, images.double(), given)


def random_network(lab: Laboratory) -> nn.Module:
    """A network of points; a function of the seed. As it is first made it would answer 0."""
    state = torch.get_rng_state()
    torch.manual_seed(seed63(lab.seed, Stream.INIT))
    try:
        network = MLP(channels=lab.dim, width=64, blocks=2)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        return network
    finally:
        torch.set_rng_state(state)
