"""Pictures of data in the plane: densities, arrows, points and paths, as PNG files and as an animation.

    panels(rows, path)        a table of frames, a title over each
    space_time(...)           a density over time, with paths in it
    animation(frames, path)   frames one after another, as a GIF

Knows arrays; it knows no mixture, no schedule and no sampler.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.files import write_atomically

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
SHADES = "Greys"
DARKEST = 1.7  # of the densest place, were it black
ARROW = 1.5  # of the distance between places, at most
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """A square of the plane, [-half, half]^2.

    Args:
        title: above it. half: of its side.
        density: (n, n), row i from the bottom; shaded from nothing to its highest.
        places, arrows: (m, 2): an arrow at each place; its length tells the longer from the shorter, and saturates.
        paths: (S, B, 2), lines, and points at their ends. points: (N, 2), dots.
        classes: (B,) or (N,), whose colours these have.
    """

    title: str
    half: float
    density: Array | None = None
    places: Array | None = None
    arrows: Array | None = None
    paths: Array | None = None
    points: Array | None = None
    classes: NDArray[np.int64] | None = None


def panels(rows: Sequence[Sequence[Frame]], path: Path) -> Path:
    """A PNG file with these frames, a row a row; its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.5 * columns, 2.75 * len(rows)), dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_axis_off()
        for axes, frame in zip(axes_row, row, strict=False):
            draw(axes, frame)
    return written(figure, FigureCanvasAgg, path)


def draw(axes: Any, frame: Frame) -> None:
    """A frame on matplotlib axes."""
    half = frame.half
    if frame.density is not None:
        shaded = np.sqrt(frame.density / max(frame.density.max(), 1e-300))
        axes.imshow(shaded, origin="lower", extent=(-half, half, -half, half), cmap=SHADES, vmin=0, vmax=DARKEST)
    if frame.places is not None and frame.arrows is not None:
        far = np.linalg.norm(frame.arrows, axis=1, keepdims=True)
        apart = 2 * half / (len(frame.places) ** 0.5 + 1)
        short = ARROW * apart * frame.arrows / (far + max(np.median(far), 1e-12))
        style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "color": "#b0411e", "headwidth": 4}
        axes.quiver(*frame.places.T, *short.T, **style)
    colours = [COLOURS[k % len(COLOURS)] for k in frame.classes] if frame.classes is not None else COLOURS[0]
    if frame.paths is not None:
        for k in range(frame.paths.shape[1]):
            colour = colours[k] if frame.classes is not None else colours
            axes.plot(*frame.paths[:, k].T, color=colour, linewidth=0.8, alpha=0.7)
        axes.scatter(*frame.paths[-1].T, s=8, c=colours, zorder=3, linewidths=0)
    if frame.points is not None:
        axes.scatter(*frame.points.T, s=3, c=colours, linewidths=0)
    axes.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[], aspect="equal")
    axes.set_title(textwrap.fill(frame.title, 30), fontsize=9)


def space_time(
    density: Array, half: float, paths: Array, classes: NDArray[np.int64], titles: tuple, path: Path
) -> Path:
    """A density over time as a picture, with paths in it.

    Args:
        density: (points, times), columns evenly apart. half: of the vertical axis.
        paths: (times, B), of the same times. classes: (B,), for colours.
        titles: (title, label of the horizontal axis, its first tick's name, its last).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title, label, first, last = titles
    figure = Figure(figsize=(8.2, 3.4), dpi=110, layout="constrained")
    axes, columns = figure.add_subplot(), density.shape[1]
    shaded = np.sqrt(density / density.max(axis=0, keepdims=True))
    axes.imshow(
        shaded, origin="lower", extent=(0, columns - 1, -half, half), cmap=SHADES, vmin=0, vmax=DARKEST, aspect="auto"
    )
    for k in range(paths.shape[1]):
        axes.plot(np.arange(columns), paths[:, k], color=COLOURS[classes[k] % len(COLOURS)], linewidth=0.8, alpha=0.8)
    axes.set(xlim=(0, columns - 1), ylim=(-half, half), xlabel=label, ylabel="first coordinate of x_t / std_t")
    axes.set_xticks([0, columns - 1], [first, last])
    axes.set_title(title, fontsize=10)
    return written(figure, FigureCanvasAgg, path)


def animation(frames: Sequence[Frame], path: Path, seconds: float = 6.0, pixels: int = 380) -> Path:
    """A GIF that shows the frames one after another, the last one longer, for ever; its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    pictures = []
    for frame in frames:
        figure = Figure(figsize=(4, 4.2), dpi=pixels / 4, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure.add_subplot(), frame)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        pictures.append(picture.quantize(palette=palette(), dither=Image.Dither.NONE))
    each = round(1000 * seconds / len(frames))
    buffer, durations = io.BytesIO(), [each] * (len(frames) - 1) + [each + 1500]
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )
    write_atomically(path, buffer.getvalue())
    return path


def palette() -> Any:
    """The colours of an animation: greys, and those of the classes, pure and on their way to paper and to shade."""
    from PIL import Image

    greys = [(round(255 * k / 63),) * 3 for k in range(64)]
    pure = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS]
    mixed = [
        tuple(round(share * a + (1 - share) * paper) for a in colour)
        for colour in pure
        for paper in (255, 170)
        for share in (0.25, 0.5, 0.75)
    ]
    image = Image.new("P", (1, 1))
    image.putpalette([value for colour in (*greys, *pure, *mixed) for value in colour])
    return image


def written(figure: Any, canvas: Any, path: Path) -> Path:
    """A figure as a PNG file, whole or not at all; its path."""
    buffer = io.BytesIO()
    canvas(figure).print_figure(buffer, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
    return path
