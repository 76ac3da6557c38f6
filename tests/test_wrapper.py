"""Wrappers of sampler and denoiser: what they are told, and that they are part of what identifies a sampling.

As a program it is one rank of a sampling that two share:  python tests/test_wrapper.py RANK MEETING FOLDER
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from diffusion.denoiser import NetworkDenoiser
from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.noise import ImageNoise, Stream
from diffusion.process.grids import times
from diffusion.process.kernels import renoised
from diffusion.process.schedule import Prediction, vp_linear
from diffusion.process.toy import Gaussian
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.base import Sampler
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.multistep import AdamsBashforth, Heun
from diffusion.samplers.predictor_corrector import LangevinCorrector, PredictorCorrector
from diffusion.samplers.wrapper import Batch, WrappedSampler, Wrapper, wrapped
from diffusion.scoring.gallery import Gallery
from diffusion.scoring.recipe import Plan, Recipe

CLASSES, NUMBER = 3, 13
CPU = Place(torch.device("cpu"), "32", torch.contiguous_format)


class Net(torch.nn.Module):
    """A network of three classes that does something with each of its arguments."""

    channels = out_channels = 1
    image_size, num_classes, null_label = 4, CLASSES, CLASSES

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, conditioning_value, labels):
        return self.scale * x + 0.01 * labels[:, None, None, None]


class Shifted(WrappedSampler):
    """The steps of another sampler, and at the end a shift by number and label of each image, with noise of its own."""

    def __init__(self, inner: Sampler, batch: Batch) -> None:
        super().__init__(inner)
        self.batch = batch

    def step(self, denoise, x_t, t, s, randn, past=()):
        x = self.inner.step(denoise, x_t, t, s, randn, past)
        if s:
            return x
        own = ImageNoise(self.batch.seed, self.batch.numbers, Stream.PROBE)(x)
        return x + (0.02 * self.batch.numbers - 0.1 * self.batch.labels)[:, None, None, None] + 0.1 * own


class Shift(Wrapper):
    """Notes what it is told, and wraps both."""

    def __init__(self, by: float = 0.0) -> None:
        self.by, self.seen = by, {}

    def identity(self):
        return {"name": "shift", "by": self.by}

    def sampler(self, sampler, batch):
        self.seen |= dict(zip(batch.numbers.tolist(), batch.labels.tolist(), strict=True))
        return Shifted(sampler, batch)

    def denoiser(self, denoise, batch):
        def shifted(x_t, t, labels=None):
            x0, epsilon, variance = denoise(x_t, t)
            return Prediction(x0 + self.by * batch.labels[:, None, None, None], epsilon, variance)

        return shifted


def sampling(*wrappers, batch_size=4):
    recipe = Recipe(partial(DDIM, eta=0.5), Plan(num_steps=5), seed=3, batch_size=batch_size, wrappers=wrappers)
    return recipe.sampling(NetworkDenoiser(Net().eval(), vp_linear(100)), CPU, (1, 4, 4))


def make(folder: Path, ranks: Ranks, wrapper: Wrapper, **more) -> np.ndarray | None:
    with Gallery(folder, sampling(wrapper, **more), NUMBER, {"step": 1}, ranks, setting=f"out={folder}") as gallery:
        gallery.make()
        return gallery.images(NUMBER).numpy() if ranks.main else None


def as_rank(rank: int, meeting: str, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    wrapper = Shift(0.05)
    images = make(folder / "two", Ranks(rank, 2), wrapper)
    (folder / f"seen_{rank}.json").write_text(json.dumps(wrapper.seen))
    if images is not None:
        np.save(folder / "images.npy", images)


def test_a_wrapper_is_told_the_numbers_and_labels_of_its_images_on_one_rank_and_on_two(tmp_path):
    wrapper = Shift(0.05)
    one = make(tmp_path / "one", Ranks(), wrapper)
    assert wrapper.seen == {k: k % CLASSES for k in range(NUMBER)}
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    words = [str(tmp_path / "meeting"), str(tmp_path)]
    ranks = [subprocess.Popen([sys.executable, __file__, str(k), *words], env=env) for k in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    seen = [json.loads((tmp_path / f"seen_{k}.json").read_text()) for k in (0, 1)]
    assert all(seen) and not seen[0].keys() & seen[1].keys()
    assert {int(k): label for k, label in (seen[0] | seen[1]).items()} == wrapper.seen
    assert np.array_equal(np.load(tmp_path / "images.npy"), one)
    assert np.array_equal(make(tmp_path / "large", Ranks(), Shift(0.05), batch_size=NUMBER), one)


def test_a_wrapper_changes_the_images_and_the_innermost_comes_first():
    numbers = torch.arange(4)
    plain, once = sampling().images(numbers), sampling(Shift()).images(numbers)
    assert not torch.equal(plain, once)
    assert not torch.equal(once, sampling(Shift(0.3)).images(numbers))
    order = []

    class Named(Shift):
        def denoiser(self, denoise, batch):
            return lambda x_t, t, labels=None: order.append(self.by) or denoise(x_t, t)

        def sampler(self, sampler, batch):
            return sampler

    sampling(Named(1), Named(2)).images(numbers)
    assert order[:2] == [2, 1]


class Plain(Wrapper):
    """Wraps the sampler in another that changes nothing."""

    def __init__(self, make=WrappedSampler):
        self.make = make

    def identity(self):
        return {"name": "plain"}

    def sampler(self, sampler, batch):
        return self.make(sampler)


BATCH = Batch(torch.arange(3), None, 0)


def wrapped_sampler(sampler, *wrappers):
    return wrapped(wrappers, None, sampler, BATCH)[1]


@pytest.mark.parametrize(
    "make",
    [
        AdamsBashforth,
        partial(AdamsBashforth, start="heun"),
        Heun,
        partial(PredictorCorrector, predictor=Heun, corrector=partial(LangevinCorrector, norms="batch")),
        partial(Ancestral, variance="learned"),
    ],
)
def test_a_wrapped_sampler_is_the_inner_one_with_its_memory_and_calls(make):
    schedule, data, grid = vp_linear(100), Gaussian([0.2, 0.1], std=0.5), times(100, 7, "trailing", visits=2)
    inner = make(schedule)
    outer = wrapped_sampler(inner, Plain(), Plain())
    facts = ("of_batch", "memory", "learned_by")
    assert outer is not inner and all(getattr(outer, name) == getattr(inner, name) for name in facts)
    assert outer.calls(grid) == inner.calls(grid) and outer.schedule is schedule
    if inner.learned_by is None:
        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ends = [by.sample(data.denoiser(schedule), x, grid, ImageNoise(0, BATCH.numbers)) for by in (inner, outer)]
        assert torch.equal(*ends)


class Forgetful(WrappedSampler):
    """Around another, but not with what that must keep."""

    def __init__(self, inner):
        super().__init__(inner)
        self.memory = 0


class Unrelated(Sampler):
    def __init__(self, inner):
        super().__init__(inner.schedule)
        self.inner = inner

    def step(self, denoise, x_t, t, s, randn, past=()):
        return self.inner.step(denoise, x_t, t, s, randn, past)


@pytest.mark.parametrize("make", [Forgetful, Unrelated, lambda inner: DDIM(inner.schedule), lambda inner: None])
def test_a_wrapper_whose_sampler_would_lose_the_memory_of_the_inner_one_is_refused(make):
    sampler = AdamsBashforth(vp_linear(100))
    with pytest.raises(TypeError, match=r"Plain.sampler gives a .* return the sampler itself, or a WrappedSampler"):
        wrapped_sampler(sampler, Plain(make))
    assert wrapped_sampler(sampler, Plain(lambda inner: inner)) is sampler


class Renoising(WrappedSampler):
    """Steps that go up add noise, by no call of the denoiser: as RePaint and restarts do."""

    def calls_of_step(self, t, s, past=0):
        return 0 if s > t else super().calls_of_step(t, s, past)

    def step(self, denoise, x_t, t, s, randn, past=()):
        if s > t:
            return renoised(self.schedule, x_t, t, s, randn(x_t))
        return super().step(denoise, x_t, t, s, randn, past)


def test_a_step_without_a_prediction_is_no_part_of_the_past_and_is_shown_with_the_estimate_before():
    schedule, data, grid = vp_linear(100), Gaussian([0.2, 0.1], std=0.5), [100, 60, 20, 60, 80, 40, 0]
    sampler, x = Renoising(AdamsBashforth(schedule)), torch.zeros(3, 2, dtype=torch.float64)
    called, exact = [], data.denoiser(schedule)

    def denoise(x_t, t, labels=None):
        called.append(t)
        return exact(x_t, t)

    visits = list(sampler.walk(denoise, x, grid, ImageNoise(0, BATCH.numbers)))
    assert [visit.prediction is None for visit in visits] == [False, False, True, True, False, False]
    assert called == [100, 60, 80, 40] and sampler.calls(grid) == 4
    assert list(sampler.pasts(grid)) == [[], [100], [], [], [], [80]]
    made = sampling(Plain(Renoising))
    made.times = [100, 50, 80, 0]
    noisy, estimates = made.film(torch.arange(2), 3)
    assert torch.equal(estimates[:, 1], estimates[:, 0]) and not torch.equal(noisy[:, 1], noisy[:, 0])
    made.times = [50, 100, 0]
    noisy, estimates = made.film(torch.arange(2), 2)
    assert torch.equal(noisy[:, 0], estimates[:, 0]), "before the first estimate there is x itself"


def test_it_is_part_of_what_identifies_a_sampling(tmp_path):
    assert "wrappers" not in sampling().identity()
    assert sampling(Shift(0.5)).identity()["wrappers"] == [{"name": "shift", "by": 0.5}]
    make(tmp_path / "a", Ranks(), Shift(0.05))
    with pytest.raises(ValueError, match=r'wrappers: was \[\{"by": 0.05, "name": "shift"\}\], is .*0.06, '):
        make(tmp_path / "a", Ranks(), Shift(0.06))
    whole = sampling(type("Whole", (Shift,), {"of_batch": True})())
    assert whole.of_batch and "batch_size" in whole.identity()


# ---- gradients ----


class Towards(Wrapper):
    """Moves x0 along the gradient of -|x0(x_t) - y|^2 / 2 with respect to x_t."""

    def __init__(self, goal: float, needs_gradients: bool = True) -> None:
        self.goal, self.needs_gradients = goal, needs_gradients

    def identity(self):
        return {"name": "towards", "goal": self.goal}

    def denoiser(self, denoise, batch):
        def moved(x_t, t, labels=None):
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                x0, epsilon, variance = denoise(x, t)
                (gradient,) = torch.autograd.grad(-((x0 - self.goal) ** 2).sum() / 2, x)
            return Prediction(x0.detach() + gradient, epsilon.detach(), variance)

        return moved


def test_one_that_says_so_differentiates_the_denoiser():
    schedule, data = vp_linear(100), Gaussian([0.2], covariance=torch.tensor([[0.5]], dtype=torch.float64))
    exact = data.denoiser(schedule)
    batch = Batch(torch.arange(6), None, 0)
    x_t = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Towards(0.7).denoiser(exact, batch)(x_t, 40.0).x0
    alpha, sigma = (float(v) for v in schedule(40.0))
    gain = alpha * 0.5 / (alpha**2 * 0.5 + sigma**2)  # of E[x0 | x_t] = 0.2 + gain (x_t - 0.2 alpha)
    x0 = 0.2 + gain * (x_t - alpha * 0.2)
    assert torch.allclose(found, x0 + gain * (0.7 - x0), atol=1e-9)


def test_one_that_does_not_say_so_gets_no_gradients():
    numbers = torch.arange(3)
    assert not torch.equal(sampling(Towards(0.7)).images(numbers), sampling().images(numbers))
    with pytest.raises(RuntimeError, match="does not require grad"):
        sampling(Towards(0.7, needs_gradients=False)).images(numbers)
    sampling(Towards(0.7), Shift()).images(numbers)  # another one beside it does not take them away


if __name__ == "__main__":
    as_rank(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
