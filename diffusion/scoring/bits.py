"""Bits per dimension of a trained model on a split of its data, in pieces that the caller stores and puts together.

    bits = Bits(model, where, module, Settings(by="bound", num_images=1000))
    parts = [bits.measure(numbers) for numbers in bits.batches()]     # arrays, each a function of its image numbers
    rows, files = bits.rows(parts), bits.write(parts, folder)

What one process has measured another can go on from: no piece depends on any other. The model's network is to be on the
device of the place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.module import ImageShardsDataModule
from diffusion.denoiser import Clipped
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.likelihood.bound import BoundSummary, Terms, bound_terms, predicted_at, summarise
from diffusion.likelihood.flow import START, TOLERANCE, FlowTerms, Tolerance, check_start, flow_bits, summarise_flow
from diffusion.metrics.extractors import full_precision
from diffusion.noise import Stream, permutation
from diffusion.process.kernels import Variance, needs_learned_variance
from diffusion.process.schedule import Denoiser, Prediction
from diffusion.scoring.likelihood_files import plot_terms, save_progressive, write_terms
from diffusion.scoring.scores import made_by
from diffusion.scoring.trained import Trained
from diffusion.settings import Count, Number, Positive, Seed, settings

Arrays = Mapping[str, NDArray]
SHOWN, STAGES = 8, 10  # rows, and columns but the last, of the picture of what a receiver sees


@settings("likelihood")
@dataclass(frozen=True)
class Settings:
    """What is measured, and how well.

    Args:
        by: "bound", the variational bound (Ho et al. 2020, sec. 2): T evaluations an image. "ode", the probability flow
            (Song et al. 2021, score SDE, sec. 4.3): as many as its solver takes.
        split: of the data; None: test where there is one, else train.
        num_images: of the split, chosen by the seed; None: all. batch_size: measured at a time.
        seed: of the noise, of the positions in the bins, of the probes and of the choice.
        variance: of the reverse step, for the bound: "small", "large", "learned"; None: what the model was trained or
            is sampled with.
        probes: of Hutchinson's estimate, 0 for the exact trace. probe: "rademacher" or "gaussian".
        start: time at which the flow begins, in (0, T). tolerance: of its solver, absolute and relative, in (0, 1).

    Raises:
        ValueError: a value that is not allowed.
    """

    by: Literal["bound", "ode"] = "bound"
    split: str | None = None
    num_images: Count | None = None
    batch_size: Count = 256
    seed: Seed = 0
    variance: Variance | None = None
    probes: Number = 1
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    start: Positive = START
    tolerance: Tolerance = TOLERANCE


class Bits:
    """A measurement, built and checked.

    Args:
        model: out of a checkpoint. where: it runs. module: of the split that is measured.
        attend: called at every evaluation of the network; may raise to end the measurement.
        data: name of the data set; None: the model's own.

    Raises:
        ValueError: the images are not the model's, the variance is not there, or the flow cannot begin at `start`.
    """

    def __init__(
        self,
        model: Trained,
        where: Place,
        module: ImageShardsDataModule,
        settings: Settings,
        attend: Callable[[], None] = lambda: None,
        data: str | None = None,
    ) -> None:
        self.model, self.where, self.module, self.settings, self.attend = model, where, module, settings, attend
        self.data = data or model.data_name
        self.variance = settings.variance or variance_of(model)
        if settings.by == "bound" and self.variance == "learned" and not model.learns_variance:
            raise needs_learned_variance("likelihood.variance")
        if settings.by == "ode":
            check_start(settings.start, model.denoiser.schedule)
        shape, found = model.image_shape, (module.channels, module.image_size, module.image_size)
        if shape != found:
            raise Refusal(f"The model makes images of {shape} (channels, height, width), the data set has {found}.")
        self.conditional = bool(model.denoiser.network.num_classes)
        if self.conditional and module.num_classes != model.denoiser.network.num_classes:
            raise Refusal(
                f"The model has {model.denoiser.network.num_classes} classes, the data set has {module.num_classes}: "
                f"the likelihood of an image is that given its label."
            )

    # ---- the pieces ----

    def numbers(self) -> NDArray[np.int64]:
        """Numbers of the images in their split, ascending: all, or a choice that belongs to the seed."""
        whole, wanted = self.module.num_images, self.settings.num_images
        if wanted is None or wanted >= whole:
            return np.arange(whole)
        return np.sort(permutation(whole, self.settings.seed, Stream.BOUND)[:wanted])

    def batches(self) -> list[NDArray[np.int64]]:
        """The same, cut into what is measured at a time."""
        numbers = self.numbers()
        return np.split(numbers, range(self.settings.batch_size, len(numbers), self.settings.batch_size))

    def measure(self, numbers: NDArray[np.int64]) -> dict[str, NDArray]:
        """Of the images with these numbers: arrays that `rows` and `write` read, to be stored as they are."""
        images, labels = self._images(numbers)
        at, settings = torch.from_numpy(numbers), self.settings
        schedule = self.model.denoiser.schedule
        if settings.by == "bound":
            denoise = Clipped(self._denoiser(labels), schedule)
            return bound_terms(denoise, schedule, images, at, settings.seed, self.variance)._asdict()
        with full_precision():
            return flow_bits(
                self._denoiser(labels), schedule, images, at, settings.seed, settings.probes, settings.probe,
                settings.start, settings.tolerance,
            )._asdict()  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What, beside the model and the data, decides the arrays of an image, as JSON."""
        bound = {"by": "bound", "seed": self.settings.seed, "variance": self.variance, "clip_x0": True}
        flow = {
            k: v for k, v in asdict(self.settings).items() if k not in ("split", "num_images", "batch_size", "variance")
        }
        known = bound if self.settings.by == "bound" else flow
        return {**known, "split": self.module.split, "precision": self._precision}

    def needs(self) -> int:
        """Bytes that `measure` gives of all images."""
        steps = self.model.denoiser.schedule.num_timesteps
        each = 2 + 3 * steps if self.settings.by == "bound" else 2 + max(self.settings.probes, 1)
        return 8 * each * len(self.numbers())

    # ---- the whole ----

    def bound(self, parts: Sequence[Arrays]) -> BoundSummary:
        return summarise([Terms(**part) for part in parts])

    def rows(self, parts: Sequence[Arrays]) -> list[dict[str, Any]]:
        """Lines of results.jsonl: bits per dimension, what they are made of, and all that they depend on."""
        if self.settings.by == "bound":
            whole: Any = self.bound(parts)
            of_it = {"L_T": whole.L_T, "L_t": whole.rate - whole.L_T, "L_0": whole.L_0, "rate": whole.rate}
            of_it |= {"distortion": whole.L_0, "rmse_255": whole.rmse_255, "variance": self.variance, "clip_x0": True}
            of_it |= {"nfe": self.model.denoiser.schedule.num_timesteps}
        else:
            whole, settings = summarise_flow([FlowTerms(**part) for part in parts]), self.settings
            of_it = {"probe_error": whole.probe_error, "probes": settings.probes, "start": settings.start}
            of_it |= {"tolerance": settings.tolerance, "nfe": whole.nfe}
            of_it |= {"probe": settings.probe} if settings.probes else {}
        network = self.model.denoiser.network
        row = {
            "metric": "bits/dim", "name": "bits_per_dim", "likelihood": self.settings.by,
            "value": whole.bits_per_dim, "standard_error": whole.standard_error, **of_it,
            "reference": self._published(), "num_images": whole.num_images, "split": self.module.split,
            "data": self.data, "data_digest": self.module.index.digest,
            "given_labels": self.conditional, "seed": self.settings.seed,
            "batch_size": self.settings.batch_size, "step": self.model.step,
            "weights": self.model.weights, "parameters": sum(p.numel() for p in network.parameters()),
            "precision": self._precision, **made_by(),
        }  # fmt: skip
        return [row]

    def write(self, parts: Sequence[Arrays], folder: Path) -> list[Path]:
        """Of the bound, below `folder`: likelihood/bound_step_00001000.csv and .png, progressive_step_00001000.png."""
        if self.settings.by != "bound":
            return []
        whole, name, here = self.bound(parts), f"step_{self.model.step:08d}", folder / "likelihood"
        here.mkdir(parents=True, exist_ok=True)
        table, plot, progressive = (
            here / f"bound_{name}.csv",
            here / f"bound_{name}.png",
            here / f"progressive_{name}.png",
        )
        write_terms(whole, table)
        about = f"{self.model.name}, step {self.model.step}, {self.model.weights} weights: "
        about += f"{whole.num_images} images of {self.data}, split {self.module.split}"
        plot_terms(whole, about, plot)
        images, predicted = self.progressive(self.numbers()[:SHOWN], stages(len(whole.curve["t"])))
        save_progressive(images, predicted, progressive)
        return [table, plot, progressive]

    def progressive(self, numbers: NDArray[np.int64], times: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, C, H, W), and what a receiver of x_t answers with at these times, (B, times, C, H, W)."""
        images, labels = self._images(numbers)
        schedule = self.model.denoiser.schedule
        denoise = Clipped(self._denoiser(labels), schedule)
        at = torch.from_numpy(numbers)
        return images, predicted_at(denoise, schedule, images, at, self.settings.seed, times)

    # ---- parts ----

    @property
    def _precision(self) -> str:
        """A flow is solved in float32: the noise of bf16, or TF32, would look like stiffness to its solver."""
        return self.where.precision if self.settings.by == "bound" else "32"

    def _images(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        images, labels, *_ = self.module.samples.batch(numbers)
        labels = labels.to(self.where.device) if self.conditional else None
        return images.to(self.where.device), labels

    def _denoiser(self, labels: Tensor | None) -> Denoiser:
        """The model given the labels of a batch, in its precision."""
        given = partial(self.model.denoiser, labels=labels)

        def denoise(x_t: Tensor, t: float | Tensor, labels: None = None) -> Prediction:
            self.attend()
            x_t = x_t.contiguous(memory_format=self.where.memory_format)
            if self._precision == "32":
                return given(x_t, t)
            with self.where.autocast():
                return given(x_t, t)

        return denoise

    def _published(self) -> float | None:
        """The paper's figure, which is the bound on the test split of the data that the model was trained on."""
        if (self.settings.by, self.module.split, self.data) != ("bound", "test", self.model.data_name):
            return None
        return self.model.facts.paper.get("bits_per_dim")


def variance_of(model: Trained) -> str:
    """The width of the reverse step that a model was trained with, or else is sampled with, or else the small one."""
    if model.learns_variance:
        return "learned"
    return next((variance for variance in model.facts.variances if variance in ("small", "large")), "small")


def stages(num_timesteps: int) -> list[int]:
    """Times at which a receiver has had a tenth, two tenths ... and all of the reverse steps (Ho et al. 2020, table 4):
    901, 801 ... 1 of 1000."""
    return sorted({num_timesteps + 1 - max(1, num_timesteps * k // STAGES) for k in range(1, STAGES + 1)}, reverse=True)
