"""Trained models in a program or a notebook of one's own.

    model = diffusion.load("runs/digits")
    images = model.sample(16, sampler="ddim", num_steps=50, guidance=2.0, labels=[3, 7])
    images.pil()[0].save("three.png")

The settings, their defaults and their checks are those of `python -m diffusion.sample`, and the images are the same,
byte for byte. A fault is an exception with the command's message. Nothing here ends the process, installs a signal
handler or changes the state of Hydra or of torch's random number generators; several threads may load and sample at
once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.build import door
from diffusion.build.sampling import recipe
from diffusion.build.take import take
from diffusion.config.check import check, check_guidance
from diffusion.config.compose import Typed, composed
from diffusion.config.composer import searching
from diffusion.config.words import typeable
from diffusion.denoiser import NetworkDenoiser
from diffusion.distributed.launcher import Compute
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.notices import as_warnings
from diffusion.process.schedule import Schedule
from diffusion.progress import Progress
from diffusion.samplers.base import Visit
from diffusion.scoring.sampling import Sampling
from diffusion.scoring.trained import Trained


class Images(np.ndarray):
    """Images as an array: uint8 (N, H, W, C), C = 1 or 3.

    `labels` holds the class of each image, int64 (N,); None for an unconditional model. Slices keep no labels.
    """

    labels: NDArray[np.int64] | None = None

    def pil(self) -> list[Image.Image]:
        """Return the images as PIL images: of mode L for one channel, RGB for three."""
        images = np.asarray(self)
        if images.ndim == 3:  # one image, as images[0]
            images = images[None]
        return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


class Model:
    """A trained model. It is made by `load`.

    Attributes:
        denoiser: (x_t, t, labels) -> Prediction(x0, epsilon, variance); x_t float32 (B, C, H, W) on `device`.
        schedule: time -> Level(alpha, sigma), t in [0, num_timesteps]; 0 is clean data.
        device: where the network is.
        image_shape: (C, H, W). num_classes: 0 for an unconditional model. step: optimizer steps it was trained.
        path: its checkpoint.
    """

    def __init__(self, trained: Trained, place: Place, config_dirs: Sequence[str] = ()) -> None:
        self._trained, self._place, self._config_dirs = trained, place, tuple(config_dirs)
        trained.denoiser.network.to(place.device, memory_format=place.memory_format)

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"<Model {self._trained.name}, step {self.step}: {height}x{width}, {channels} channels{classes}>"

    @property
    def denoiser(self) -> NetworkDenoiser:
        return self._trained.denoiser

    @property
    def schedule(self) -> Schedule:
        return self._trained.denoiser.schedule

    @property
    def device(self) -> torch.device:
        return self._place.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._trained.image_shape

    @property
    def num_classes(self) -> int:
        return self._trained.num_classes

    @property
    def step(self) -> int:
        return self._trained.step

    @property
    def path(self) -> Path:
        return self._trained.path

    def sample(
        self,
        num_images: int = 64,
        *,
        seed: int = 0,
        sampler: str = "ddim",
        guidance: float | None = None,
        labels: Sequence[int] = (),
        batch_size: int = 256,
        as_pil: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> Images | list[Image.Image]:
        """Sample images.

        Args:
            num_images: number of images. Image k is a function of (seed, k) and the other settings alone.
            seed: of the noise.
            sampler: an option of the group `sampler`: ddim, ancestral, heun …
            guidance: scale of classifier-free guidance, the papers' 1 + w; None or 1: without guidance.
            labels: classes, given to the images in turn; empty: image k of a conditional model gets k mod classes.
            batch_size: images at a time; changes rounding at most.
            as_pil: return a list of PIL images instead of an array.
            progress: show progress on stderr.
            settings: of the sampler, by their names in the group `sampler`: num_steps=50, eta=0.5, clip_x0=False …

        Returns:
            uint8 (N, H, W, C), the bytes of `arr_0` in the samples.npz of the command.

        Raises:
            ValueError: a setting is unknown, has a value that it cannot have, or has no effect.
        """
        sampling, numbers = self._sampling(num_images, seed, sampler, guidance, labels, batch_size, settings)
        found = []
        with Progress("sampling", num_images, shown=progress) as bar:
            for batch in sampling.batches(numbers):
                found.append(batch.permute(0, 2, 3, 1).numpy())
                bar.add(len(batch))
        images = np.ascontiguousarray(np.concatenate(found)).view(Images)
        chosen = sampling.labels_of(numbers)
        images.labels = None if chosen is None else chosen.numpy()
        return images.pil() if as_pil else images

    def walk(
        self,
        num_images: int = 1,
        *,
        seed: int = 0,
        sampler: str = "ddim",
        guidance: float | None = None,
        labels: Sequence[int] = (),
        **settings: Any,
    ) -> Iterator[Visit]:
        """Sample images as one batch and yield every step on the way: its times, x and the prediction.

        Arguments as `sample`. `x` and the prediction are float32 (N, C, H, W) in [-1, 1] at the end.
        """
        sampling, numbers = self._sampling(num_images, seed, sampler, guidance, labels, num_images, settings)
        return sampling.walk(numbers)

    def _sampling(
        self,
        num_images: int,
        seed: int,
        sampler: str,
        guidance: float | None,
        labels: Sequence[int],
        batch_size: int,
        settings: dict[str, Any],
    ) -> tuple[Sampling, Tensor]:
        """The command's sampling of these settings, and the numbers of its images."""
        words = [_word("sampler", sampler)] + [_word(f"sampler.{key}", value) for key, value in settings.items()]
        words += [_word("num_images", num_images), _word("seed", seed), _word("batch_size", batch_size)]
        if len(labels):
            words.append(_word("labels", labels))
        if guidance is not None and guidance != 1:
            words += ["guidance=classifier_free", _word("guidance.scale", guidance)]
        with searching(self._config_dirs):
            cfg = composed("sample", words)
            check(cfg, Typed("sample", tuple(words)))
            chosen = recipe(cfg, cfg.batch_size, cfg.labels)
        check_guidance(cfg.guidance.scale, self.num_classes, self._trained.facts.label_dropout)
        sampling = chosen.sampling(self._trained.denoiser, self._place, self.image_shape)
        return sampling, torch.arange(cfg.num_images)


def load(
    checkpoint: str | Path,
    *,
    ema: bool | float = True,
    trust: Sequence[str] = (),
    device: Literal["auto", "cpu", "gpu"] = "auto",
    precision: Literal["auto", "32", "bf16-mixed"] = "auto",
    config_dirs: Sequence[str | Path] = (),
) -> Model:
    """Load a trained model for sampling.

    Args:
        checkpoint: a run folder, of which the newest sound checkpoint is taken, or a .ckpt file.
        ema: True: the averaged weights; False: the raw ones; a number: the average of that decay.
        trust: modules of your own that the checkpoint may name, as ["mine"]; importing them runs their code.
        device: "auto": a GPU if there is one.
        precision: of the network; "auto": bf16 on a GPU.
        config_dirs: folders of config files of your own, for samplers beside ours.

    Raises:
        ValueError: the checkpoint cannot be used, or it asks for something that may not be built.
    """
    words = [_word("trainer.accelerator", device), _word("trainer.precision", precision)]
    if isinstance(trust, str):
        raise Refusal(f"trust={trust!r}: give a list of modules: trust=[{trust!r}].")
    words += [_word("trust", trust)] if len(trust) else []
    words.append(_word("ema", ema))
    cfg = composed("sample", words)
    folders = [str(folder) for folder in config_dirs]
    with searching(folders):
        pass  # which refuses folders that do not exist
    with as_warnings():
        trained = door.trained(str(Path(checkpoint).expanduser()), cfg.ema, cfg.trust)
    if trained.image_shape[0] not in (1, 3):
        raise Refusal(f"checkpoint={checkpoint} is a model of points, of which there are no pictures.")
    return Model(trained, Place.of(take(cfg.trainer, Compute)), folders)


def _word(key: str, value: Any) -> str:
    """A setting as the command takes it."""
    if isinstance(value, np.generic):
        value = value.item()
    elif isinstance(value, np.ndarray | Tensor | tuple | range):
        value = [one.item() if hasattr(one, "item") else one for one in value]
    return f"{key}={typeable(value)}"
