"""The bound of a model as files a person looks at: its terms as a table and as curves, and what a receiver sees."""

import io
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffusion.files import csv_text, write_atomically
from diffusion.images import to_uint8
from diffusion.likelihood.bound import COLUMNS, BoundSummary
from diffusion.scoring.pictures import grid, save_png

INK, MUTED, BLUE, ORANGE = "#222222", "#777777", "#2a6fb5", "#c4622d"
NEGLIGIBLE = 1e-4  # of the whole rate: what is above it is where the curve begins


def write_terms(bound: BoundSummary, path: Path) -> None:
    """A line for each t from 1 up: t, bits of its term, mean squared errors, rate so far and RMSE on 0..255."""
    columns = zip(*(bound.curve[name].tolist() for name in COLUMNS), strict=True)
    write_atomically(path, csv_text([dict(zip(COLUMNS, row, strict=True)) for row in columns]))


def plot_terms(bound: BoundSummary, title: str, path: Path) -> None:
    """Left the terms over t, right how good a picture a rate buys (Ho et al. 2020, sec. 4.3, fig. 5)."""
    curve = bound.curve
    with matplotlib.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK}):
        figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2)
        left.loglog(curve["t"], curve["bits"].clip(min=1e-12), color=BLUE, lw=1.5)
        left.scatter([1], [bound.L_0], color=ORANGE, zorder=3, s=24)
        left.annotate(f"L_0 = {bound.L_0:.3g}", (1, bound.L_0), (8, -3), textcoords="offset points", color=ORANGE)
        left.set(xlabel="t", ylabel="term of t, bits per dimension")
        whole = bound.bits_per_dim
        left.set_title(f"bits/dim {whole:.4g} = L_0 {bound.L_0:.3g} + rate {bound.rate:.3g}, of it L_T {bound.L_T:.2g}")
        begun = curve["rate"] >= bound.L_T + NEGLIGIBLE * bound.rate
        right.plot(curve["rate"][begun], curve["rmse_255"][begun], color=BLUE, lw=1.5)
        right.scatter([bound.rate], [bound.rmse_255], color=ORANGE, zorder=3, s=24)
        label = f"t = 1: {bound.rmse_255:.3g}"
        right.annotate(
            label, (bound.rate, bound.rmse_255), (-6, 8), textcoords="offset points", color=ORANGE, ha="right"
        )
        right.set(
            xlabel="rate, bits per dimension", ylabel="distortion, RMSE of 0..255", xlim=(0, None), ylim=(0, None)
        )
        right.set_title("progressive code")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, lw=0.5)
        figure.suptitle(title)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def save_progressive(images: Tensor, predicted: Tensor, path: Path) -> None:
    """A row for each image: what a receiver answers with from the noisiest x_t to the cleanest, and the image itself.

    Args:
        images: uint8 (B, C, H, W). predicted: (B, times, C, H, W) in [-1, 1], noisiest first.
    """
    rows = torch.cat([to_uint8(predicted).cpu(), images[:, None].cpu()], dim=1)
    save_png(grid(rows.flatten(0, 1), columns=rows.shape[1]), path)
