"""Pictures of samples in a run folder: grids, and how a few images come about."""

from pathlib import Path

import torch

from diffusion.runs.folder import RunFolder
from diffusion.scoring.gallery import Gallery
from diffusion.scoring.pictures import grid, save_png
from diffusion.scoring.sampling import Sampling

FILM_IMAGES, FILM_STAGES = 4, 11


def save_grid(folder: RunFolder, step: int, gallery: Gallery) -> Path:
    """samples/step_00001000.png: the images of a gallery, which is not needed any more. Returns its path."""
    classes, number = gallery.sampling.num_classes, gallery.num_images
    path = grid_path(folder, step)
    save_png(grid(gallery.images(number), classes if classes and number % classes == 0 else None), path)
    gallery.remove()
    return path


def grid_path(folder: RunFolder, step: int) -> Path:
    return folder.samples / f"step_{step:08d}.png"


def film_path(folder: RunFolder, step: int) -> Path:
    return folder.samples / f"film_step_{step:08d}.png"


def save_film(folder: RunFolder, step: int, sampling: Sampling) -> Path:
    """samples/film_step_00001000.png: how a few images come about, each a row of x_t above one of the estimates of x0.
    Returns its path."""
    pairs = torch.stack(sampling.film(torch.arange(FILM_IMAGES), FILM_STAGES), dim=1)  # (B, 2, stages, C, H, W)
    save_png(grid(pairs.flatten(0, 2), FILM_STAGES), film_path(folder, step))
    return film_path(folder, step)
