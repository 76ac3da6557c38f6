"""Check of a GPU: whether it computes what the CPU computes, whether the host has to wait, and how fast it trains.

Training and sampling use the code of runs. They run in float32 with TF32 off, and in bf16 with channels_last, and are
compared with float32 on the CPU. All random numbers are functions of counters (noise.py), so that both have the same
images, times and noise. The reasons for the tolerances are given beside them.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.benchmark.settings import GpuCheck
from diffusion.build.run import Parts, parts_of
from diffusion.config.composer import PACKAGE
from diffusion.data.module import Described
from diffusion.data.shards.writer import ShardWriter
from diffusion.files import write_atomically
from diffusion.images import to_uint8
from diffusion.noise import ImageNoise, Stream
from diffusion.runs.folder import RunFolder
from diffusion.scoring.scores import commit
from diffusion.training.meter import MetricsCsv

EXPERIMENTS, TIMED = ("digits", "cifar10"), "cifar10"
BATCH, STEPS_OF_DDIM, IMAGES = 16, 10, 2560
NO_GPU = 3  # exit status


class Way(NamedTuple):
    """A device and precision: its name, and its settings of conf/trainer."""

    name: str
    words: tuple[str, ...]


CPU = Way("CPU float32", ("trainer=cpu",))
GPU = Way("GPU float32", ("trainer=gpu", "trainer.precision=32", "trainer.memory_format=contiguous"))
GPU_BF16 = Way("GPU bf16", ("trainer=gpu",))


class Tolerances(NamedTuple):
    """The largest allowed differences, relative unless stated otherwise.

    step: of the loss, of the gradient norm, and of the gradient, |g - g'| / |g| over all parameters as one vector.
    update: of the change of the weights by clipping and the optimizer, for the same gradient.
    sample: root mean square over the pixels of images in [-1, 1].
    levels: mean absolute difference of the uint8 images.
    """

    step: float
    update: float
    sample: float
    levels: float


# Summing the 10^4 to 10^6 terms of the gradient of a convolution in another order loses about two digits of float32 (24
# bits, 6e-8). The update is float32 on every device: a few roundings of weights that are a thousand times larger.
FLOAT32 = Tolerances(step=1e-4, update=1e-4, sample=1e-3, levels=0.02)
# bf16 has 8 bits, 4e-3 per rounding. Over tens of layers this adds up to a few per cent. In a sample of an untrained
# network most pixels are clipped to -1 or 1, and a few end at the other one. On a CPU, bf16 differs from float32 by
# 0.02 (cifar10) and 0.08 (digits, guided); the standard deviation of the images is 0.9.
BF16 = Tolerances(step=5e-2, update=1e-4, sample=0.15, levels=6.0)


class Comparison(NamedTuple):
    """One figure compared with that of the CPU. `difference` must not be above `tolerance`."""

    experiment: str
    way: str
    figure: str
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # false for nan

    def line(self) -> str:
        verdict = "" if self.holds else "  FAILED"
        title = f"{self.experiment}, {self.way}: {self.figure}"
        return f"  {title:64} {self.difference:9.2e}   at most {self.tolerance:.0e}{verdict}"


# ---- the comparison ----


def awaken(network: nn.Module) -> None:
    """Scale the layers that are initialised to almost zero (1e-5 of the others) to the size of the others.

    Otherwise the output of a new network is almost zero, and so are most gradients.
    """
    with torch.no_grad():
        for p in network.parameters():
            if 0 < p.abs().max() < 1e-4:
                p.mul_(1e5)


def build_run(experiment: str, way: Way, *more: str) -> Parts:
    """The parts of a run of the experiment, without dropout and without learning rate warmup.

    Its network is on its device, and scaled by `awaken`. more: further settings.
    """
    words = [f"+experiment={experiment}", "callbacks=none", "model.dropout=0", "lr_schedule.warmup_steps=0", *way.words]
    run = parts_of([*words, *more])
    awaken(run.denoiser.network)
    run.training.module.to(run.place.device)
    return run


def random_batch(run: Parts, size: int) -> dict[str, Tensor]:
    """A batch of random images at positions 0 ... size - 1, with labels, as the loader returns it."""
    described = run.described
    shape = (size, described.channels, described.image_size, described.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    position = torch.arange(size)
    batch = {"image": images, "position": position, "label": position % max(described.num_classes, 1)}
    return {name: values.to(run.place.device) for name, values in batch.items()}


class Step(NamedTuple):
    """One training step: its loss, its gradient, and the change of the weights."""

    loss: float
    gradient: Tensor
    update: Tensor


def training_step(experiment: str, way: Way, gradient_used: Tensor | None = None) -> Step:
    """Run one step of the module and its optimizer. Vectors are float64 on the CPU, over all parameters.

    Args:
        gradient_used: the gradient for clipping and the optimizer; None means that of the step.
    """
    run = build_run(experiment, way)
    module = run.training.module
    parameters = list(module.network.parameters())
    optimizer = module.configure_optimizers()["optimizer"]
    batch = random_batch(run, BATCH)
    with run.place.autocast():
        loss = module.training_step(batch, 0)
    loss.backward()
    gradient, before = flat([p.grad for p in parameters]), flat(parameters)
    if gradient_used is not None:
        parts = gradient_used.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad.copy_(part.reshape(p.shape))
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    return Step(float(loss.detach()), gradient, flat(parameters) - before)


def flat(tensors: list[Tensor]) -> Tensor:
    """All tensors as one float64 vector on the CPU."""
    return torch.cat([x.detach().to("cpu", torch.float64).flatten() for x in tensors])


def ddim_sample(experiment: str, way: Way) -> Tensor:
    """Sample images, float32 (BATCH, C, H, W) on the CPU, before rounding to uint8, in the same way as `generate`."""
    run = build_run(experiment, way, "sampler=ddim", f"sampler.num_steps={STEPS_OF_DDIM}")
    device, network = run.place.device, run.denoiser.network.eval()
    sampler, times = run.recipe.sampler_of(run.denoiser.schedule)
    denoise = run.recipe.denoiser(run.denoiser, run.denoiser, run.place)
    numbers = torch.arange(BATCH, device=device)
    if network.num_classes:
        denoise = functools.partial(denoise, labels=numbers % network.num_classes)
    shape = (BATCH, network.channels, network.image_size, network.image_size)
    start = ImageNoise(0, numbers, Stream.PRIOR)(torch.empty(shape, device=device))
    x = float(run.denoiser.schedule.std(times[0])) * start
    return sampler.sample(denoise, x, times, ImageNoise(0, numbers)).cpu()


def compare(experiment: str, way: Way, allowed: Tolerances, reference: Way = CPU) -> list[Comparison]:
    """Compare a training step and a DDIM sample on one device with those on another."""
    known, known_images = _references(experiment, reference)
    step, images = training_step(experiment, way, gradient_used=known.gradient), ddim_sample(experiment, way)
    norm, levels = known.gradient.norm(), (to_uint8(images).int() - to_uint8(known_images).int()).abs().float()
    figures = [
        ("loss", abs(step.loss - known.loss) / abs(known.loss), allowed.step),
        ("gradient norm", float((step.gradient.norm() - norm).abs() / norm), allowed.step),
        ("gradient", float((step.gradient - known.gradient).norm() / norm), allowed.step),
        ("update of the weights", float((step.update - known.update).norm() / known.update.norm()), allowed.update),
        ("sample, root mean square", float((images - known_images).square().mean().sqrt()), allowed.sample),
        ("sample, mean difference in levels of 255", float(levels.mean()), allowed.levels),
    ]
    return [Comparison(experiment, way.name, *figure) for figure in figures]


@functools.cache
def _references(experiment: str, way: Way) -> tuple[Step, Tensor]:
    return training_step(experiment, way), ddim_sample(experiment, way)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Context without TF32 in matrix products and convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# ---- waiting of the host ----


def host_waits(experiment: str, way: Way) -> str | None:
    """The operation that makes the host wait for the GPU in a training step, including the EMA, or None."""
    run = build_run(experiment, way)
    module = run.training.module
    configured = module.configure_optimizers()
    optimizer, ramp = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batch = random_batch(run, run.training.data.batch_size)
    ema, length = run.training.ema, run.training.length
    ema.on_train_start(SimpleNamespace(global_step=0, max_steps=length.max_steps), module)

    def step(number: int) -> None:
        with run.place.autocast():
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        ramp.step()
        ema.on_train_batch_end(SimpleNamespace(global_step=number), module)

    for number in (1, 2):  # tables are copied to the device, and the optimizer creates its state
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (3, 4, 5):
            step(number)
    except RuntimeError as e:
        return str(e).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


# ---- speed ----


def write_random_images(root: Path, described: Described) -> None:
    """Write a data set of noise with this image size, channels and classes."""
    random, shape = np.random.default_rng(0), (described.channels, described.image_size, described.image_size)
    classes = described.num_classes
    with ShardWriter(root, described.name, shape[1], shape[0], classes, max_samples=IMAGES // 16) as writer:
        for i in range(IMAGES):
            writer.write(random.integers(0, 256, shape, dtype=np.uint8), i % classes if classes else None)


def timed_training(experiment: str, steps: int, *words: str) -> dict[str, float]:
    """Run `python -m diffusion.train +experiment=...` on random images in a temporary folder. Returns its figures.

    Rates are medians over the rows of metrics.csv, without the first row, which includes the warmup. `seconds` is for
    the whole command.

    Args:
        steps: optimizer steps; at least two rows, 2 * log_every.
        words: further settings.
    """
    run = parts_of([f"+experiment={experiment}", "callbacks=none", *words])
    batch_size = run.training.data.batch_size
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as scratch:
        folder = Path(scratch)
        write_random_images(folder / "data", run.described)
        command = [sys.executable, "-m", "diffusion.train", f"+experiment={experiment}", "callbacks=none"]
        command += [f"trainer.max_steps={steps}", f"data.root={folder / 'data'}", f"run_dir={folder / 'run'}", *words]
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True
        )
        seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        rows = MetricsCsv(RunFolder(folder / "run").metrics_path).rows()
    rate = statistics.median(float(row["train/images_per_second"]) for row in rows[1:])
    figures = {"images_per_second": rate, "steps_per_second": rate / batch_size, "steps": steps}
    figures |= {"batch_size": batch_size, "seconds": seconds, "last_loss": float(rows[-1]["train/loss"])}
    if "train/peak_memory_gb" in rows[-1]:
        figures["peak_memory_gb"] = float(rows[-1]["train/peak_memory_gb"])
    return figures


# ---- the task ----


def machine() -> dict[str, Any] | None:
    """The GPU and the versions of its software; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    about = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    device = torch.cuda.get_device_properties(0)
    about |= {"gpu": device.name, "gpu_memory_gb": device.total_memory / 1e9, "gpus": torch.cuda.device_count()}
    return about | {"cpus": os.cpu_count(), "commit": commit()}


def main(asked: GpuCheck, out: Path | None, say: Callable[[str], None]) -> int:
    """Run all checks, print the figures and write them to `out`. Returns 0 if all pass, 1 if not, 3 without a GPU."""
    about = machine()
    if about is None:
        say("task=gpu_check needs a CUDA device, but torch finds none. Nothing was compared.")
        return NO_GPU
    found: dict[str, Any] = {"machine": about, "comparisons": []}
    say(f"{about['gpu']}, torch {about['torch']}, CUDA {about['cuda']}")
    say("Differences from float32 on the CPU, relative unless stated otherwise")
    holds = True
    for experiment in EXPERIMENTS:
        for way, allowed in ((GPU, FLOAT32), (GPU_BF16, BF16)):
            with exact_float32():
                comparisons = compare(experiment, way, allowed)
            for comparison in comparisons:
                holds &= comparison.holds
                say(comparison.line())
                found["comparisons"].append(comparison._asdict() | {"holds": comparison.holds})
    found["host_waits"] = host_waits(TIMED, GPU_BF16)
    holds &= found["host_waits"] is None
    say(f"A training step makes the host wait: {found['host_waits'] or 'never'}")
    say(f"Training +experiment={TIMED} for {asked.steps} steps on random images")
    figures = found["training"] = timed_training(TIMED, asked.steps, *GPU_BF16.words)
    say(
        f"  {figures['steps_per_second']:.2f} steps/s, {figures['images_per_second']:,.0f} images/s, "
        f"{figures['peak_memory_gb']:.2f} GB of GPU memory at most"
    )
    found["holds"] = holds
    if out is not None:
        write_atomically(out, json.dumps(found, indent=2) + "\n")
        say(f"Figures: {out}")
    say("All checks passed." if holds else "Not all checks passed.")
    return 0 if holds else 1
