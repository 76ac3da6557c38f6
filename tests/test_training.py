"""One training step and what accompanies it: randomness by position, precision, averages, rates, and no waiting."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from test_experiments import composed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.build.run import run_parts
from diffusion.data.digit_sets import write_digits
from diffusion.distributed.place import FORMATS
from diffusion.distributed.signals import Signals
from diffusion.images import from_uint8
from diffusion.noise import ImageNoise
from diffusion.run import Run
from diffusion.runs.folder import RunFolder
from diffusion.samplers.ancestral import Ancestral
from diffusion.training.ema import EMA
from diffusion.training.module import QUARTILES, DiffusionModule

SMALL = ["+experiment=digits", "trainer=cpu", "callbacks=none", "data.batch_size=8", "save.every_steps=0"]
SMALL += ["model.blocks_per_level=1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    return root


@pytest.fixture
def make_run(shards, tmp_path):
    """`make_run(*words)`: a run of the digits as `diffusion.train` builds it, in a folder of its own."""
    made = []

    def make(*words: str) -> Run:
        folder = tmp_path / f"run_{len(made)}"
        cfg = composed(*SMALL, f"data.root={shards}", f"run_dir={folder}", *words)
        made.append(Run(run_parts(cfg, RunFolder(folder)), Signals()))
        return made[-1]

    return make


def train(run: Run) -> Run:
    run.folder.path.mkdir(parents=True)
    assert run.train() == 0
    return run


def batch_at(positions: torch.Tensor, channels: int = 1) -> dict[str, torch.Tensor]:
    """Random 8x8 images with labels for these positions; an image belongs to its position."""
    shape, generator = (int(positions.max()) + 1, channels, 8, 8), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {"image": images[positions], "label": positions % 10, "position": positions}


def seen_by_the_objective(module: DiffusionModule, batch: dict[str, torch.Tensor]) -> SimpleNamespace:
    """What a training step hands to the objective, and the loss it returns."""
    seen, objective = SimpleNamespace(), module._objective

    def watching(output, x_t, x0, epsilon, t):
        seen.output, seen.x_t, seen.x0, seen.epsilon, seen.t = output, x_t, x0, epsilon, t
        seen.losses = objective(output, x_t, x0, epsilon, t)
        return seen.losses

    module._objective = watching
    try:
        seen.loss = module.training_step(batch, 0)
    finally:
        module._objective = objective
    return seen


class Watched(torch.optim.SGD):
    """SGD that notes, at every step, its rate, the norm of the gradient it is given, and the weights it leaves."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, lr)
        self.rates, self.norms = [], []
        self.weights = [self.vector()]

    def vector(self, gradient: bool = False) -> torch.Tensor:
        parameters = self.param_groups[0]["params"]
        return torch.cat([(p.grad if gradient else p).detach().double().flatten() for p in parameters])

    def step(self, closure=None):
        loss = closure()
        self.rates.append(self.param_groups[0]["lr"])
        self.norms.append(float(self.vector(gradient=True).norm()))
        super().step()
        self.weights.append(self.vector())
        return loss


def watched(run: Run, lr: float = 0.1) -> Watched:
    """Train the run with SGD; the optimizer, and what it saw."""
    made = []
    run.training.module._optimizer = lambda parameters: made.append(Watched(parameters, lr)) or made[0]
    train(run)
    return made[0]


# ---- the host never waits for the device ----


LOOKED_AT = {("schedule.py", "__call__"), ("nonfinite.py", "settle")}
LOOKS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}


class Looks(TorchDispatchMode):
    """Notes every operation that needs a tensor's value on the host: the step in progress, and who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.noted = None, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if name in LOOKS or by_mask:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.noted.append((self.step, frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name, name))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [[], ["trainer.accumulate=2", "objective=hybrid"]], ids=["plain", "accumulated"])
def test_training_looks_at_no_value_between_two_rows_of_the_metrics(words, make_run, monkeypatch):
    """With EMA, meter, bar and saver at work. On the CPU the schedule checks its times: there alone. And the norm
    of the step before last is on the host, and long so, when it is looked at."""
    run, looks = make_run("log_every=5", "trainer.max_steps=12", *words), Looks()
    begin = DiffusionModule.on_train_batch_start

    def noting(module, batch, batch_idx):
        looks.step = module.trainer.global_step + 1
        return begin(module, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "on_train_batch_start", noting)
    with looks:
        train(run)
    within = [n for n in looks.noted if n[0] is not None]
    assert {n[1:3] for n in within if n[0] not in (5, 10, 12)} == LOOKED_AT
    assert {n[0] for n in within if n[1] == "meter.py"} == {5, 10, 12}


@pytest.mark.parametrize("objective", ["epsilon", "bound", "mu", "hybrid"])
def test_a_training_step_runs_on_tensors_without_values(objective, make_run):
    """On the device `meta` looking at a value is an error, and so is a copy to the host, which is none on a CPU."""
    run = make_run(f"objective={objective}", "data.flip=true", "optimizer.fused=false")
    module = run.training.module.to("meta")
    run.training.ema.on_train_start(SimpleNamespace(global_step=0, max_steps=10_000), module)
    optimizer = module.configure_optimizers()["optimizer"]
    batch = {k: v.to("meta") for k, v in batch_at(torch.arange(8)).items()}
    for step in (1, 2):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        run.training.ema.on_train_batch_end(SimpleNamespace(global_step=step), module)
    assert module.take_counts().shape == (2, 3 + QUARTILES)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()


@pytest.mark.parametrize("objective", ["epsilon", "bound", "mu", "hybrid"])
def test_everything_a_step_makes_is_on_the_network_s_device(objective, make_run):
    """A fake GPU: tensors of the right device, shape and dtype without a device; mixing devices is an error."""
    run, batch = make_run(f"objective={objective}", "data.flip=true"), batch_at(torch.arange(8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layer in run.training.module.modules():
            for name, p in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        batch = {k: v.to("cuda") for k, v in batch.items()}
        loss = run.training.module.training_step(batch, 0)
        assert loss.device.type == run.training.module._sums.device.type == "cuda" and loss.dtype == torch.float32
        with pytest.raises(RuntimeError):
            loss.item()
        recipe, denoiser = run.parts.recipe, run.parts.denoiser
        sampler, times = recipe.sampler_of(denoiser.schedule)
        if objective == "hybrid":
            sampler = Ancestral(run.parts.denoiser.schedule, "learned")
        denoise = recipe.denoiser(denoiser, denoiser, run.place)
        noise = ImageNoise(0, batch["position"])
        start = noise(torch.empty(8, 1, 8, 8, device="cuda"))
        x = sampler.sample(functools.partial(denoise, labels=batch["label"]), start, times[:3], noise)
        assert x.device.type == "cuda" and x.dtype == torch.float32


# ---- precision and memory format ----


def test_bf16_stays_inside_the_network(make_run):
    run, inputs, outputs, states = make_run("trainer.precision=bf16-mixed", "trainer.max_steps=2"), set(), set(), {}
    network, objective = run.parts.denoiser.network, run.training.module._objective
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, output: outputs.add(output.dtype))
    network.register_forward_pre_hook(lambda _, given: inputs.update(x.dtype for x in given[:2]))

    def watching(*arguments):
        losses = objective(*arguments)
        states.update(zip(("output", "x_t", "x0", "epsilon"), (a.dtype for a in arguments), strict=False))
        states["losses"] = losses.dtype
        return losses

    module, optimizers = run.training.module, []
    module._objective = watching
    module._optimizer = lambda p, make=module._optimizer: optimizers.append(make(p)) or optimizers[0]
    train(run)
    assert outputs == {torch.bfloat16}
    assert inputs == {torch.float32}
    assert set(states) == {"output", "x_t", "x0", "epsilon", "losses"} and set(states.values()) == {torch.float32}
    kept = [*network.parameters(), *run.training.ema.average]
    kept += [v for state in optimizers[0].state.values() for v in state.values()]
    assert {v.dtype for v in kept} == {torch.float32}


def test_without_bf16_the_network_computes_in_float32(make_run):
    run, outputs = make_run("trainer.max_steps=1"), set()
    for layer in run.parts.denoiser.network.modules():
        layer.register_forward_hook(lambda _, __, output: outputs.add(output.dtype))
    train(run)
    assert outputs == {torch.float32}


@pytest.mark.parametrize("name", FORMATS)
def test_memory_format_reaches_every_convolution(name, make_run):
    run = make_run(f"trainer.memory_format={name}", "trainer.max_steps=1")
    met = []
    for layer in run.parts.denoiser.network.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels > 1 and layer.out_channels > 1:
            layer.register_forward_hook(lambda layer, given, output: met.append((given[0], layer.weight, output)))
    train(run)
    assert len(met) > 10
    for tensors in met:
        for tensor in tensors[: 3 if tensors[1].shape[-1] > 1 else 1]:  # a 1x1 weight is in both formats at once
            assert tensor.is_contiguous(memory_format=FORMATS[name])
    module = make_run(f"trainer.memory_format={name}", "data.channels=3").training.module
    assert seen_by_the_objective(module, batch_at(torch.arange(4), 3)).x_t.is_contiguous(memory_format=FORMATS[name])


# ---- randomness belongs to positions ----


def test_times_noise_flips_and_dropped_labels_belong_to_the_position(make_run):
    module = make_run("data.flip=true", "objective.label_dropout=0.5").training.module
    positions, order = torch.arange(64), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    whole = seen_by_the_objective(module, batch_at(positions))
    shuffled = seen_by_the_objective(module, {k: v[order] for k, v in batch_at(positions).items()})
    part = seen_by_the_objective(module, {k: v[40:] for k, v in batch_at(positions).items()})
    for name in ("t", "epsilon", "x0", "x_t"):
        assert torch.equal(getattr(shuffled, name), getattr(whole, name)[order])
        assert torch.equal(getattr(part, name), getattr(whole, name)[40:])
    labels = module.hidden_labels(positions % 10, positions)
    assert torch.equal(module.hidden_labels((positions % 10)[order], positions[order]), labels[order])

    module.seed += 1
    other = seen_by_the_objective(module, batch_at(positions))
    assert (other.t != whole.t).float().mean() > 0.9
    assert not torch.equal(other.x0, whole.x0)  # other flips
    assert not torch.equal(module.hidden_labels(positions % 10, positions), labels)


def test_half_of_the_images_are_mirrored_and_only_on_request(make_run):
    positions = torch.arange(4000)
    batch = batch_at(positions)
    straight = from_uint8(batch["image"])
    module = make_run(
        "data.flip=true", "model.width=32", "model.multipliers=[1]", "model.attention_resolutions=[]"
    ).training.module
    module._denoiser[0].output = lambda x_t, t, labels: torch.zeros_like(x_t)  # the network plays no part here
    x0 = seen_by_the_objective(module, batch).x0
    same = (x0 == straight).flatten(1).all(1)
    mirrored = (x0 == straight.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    module.flip = False
    assert torch.equal(seen_by_the_objective(module, batch).x0, straight)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_label_dropout_hides_its_share(share, make_run):
    module = make_run(f"objective.label_dropout={share}").training.module
    positions = torch.arange(20_000)
    labels = positions % 10
    given = module.hidden_labels(labels, positions)
    hidden = given == module.network.null_label
    assert torch.equal(given[~hidden], labels[~hidden])
    deviation = (share * (1 - share) / len(positions)) ** 0.5
    assert hidden.float().mean() == pytest.approx(share, abs=4 * deviation)
    for label in range(10):  # whatever the label
        assert hidden[labels == label].float().mean() == pytest.approx(share, abs=4 * deviation * 10**0.5)


# ---- what is counted ----


@pytest.mark.parametrize("num_timesteps", [1000, 10])
def test_quartiles_of_t_add_up_to_the_whole(num_timesteps, make_run):
    module = make_run(f"schedule.num_timesteps={num_timesteps}", "sampler.num_steps=5").training.module
    t = torch.arange(1, num_timesteps + 1)
    loss = torch.rand(num_timesteps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module.count(loss[: num_timesteps // 3], t[: num_timesteps // 3])
    module.count(loss[num_timesteps // 3 :], t[num_timesteps // 3 :])
    module._norms = torch.ones(2, dtype=torch.float64)
    values, numbers = module.take_counts()
    place = 4 * (t - 1) / num_timesteps
    quarters = [loss[(q <= place) & (place < q + 1)] for q in range(4)]
    torch.testing.assert_close(values[1:5], torch.stack([q.sum() for q in quarters]))
    assert numbers[1:5].tolist() == [len(q) for q in quarters]
    assert float(values[1:5].sum()) == pytest.approx(float(values[0])) == pytest.approx(float(loss.sum()))
    assert int(numbers[0]) == num_timesteps
    assert module.take_counts() is None  # taken


def test_metrics_hold_the_mean_loss_of_the_steps_between_two_rows(make_run, monkeypatch):
    losses, step = [], DiffusionModule.training_step

    def noting(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(DiffusionModule, "training_step", noting)
    run = train(make_run("trainer.max_steps=7", "log_every=4", "trainer.accumulate=2"))
    header, *rows = [line.split(",") for line in run.folder.metrics_path.read_text().splitlines()]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert [int(r["step"]) for r in rows] == [4, 7]
    for row, of_it in zip(rows, (losses[:8], losses[8:]), strict=True):
        assert float(row["train/loss"]) == pytest.approx(sum(of_it) / len(of_it), rel=1e-6)


# ---- the optimizer step ----


def test_learning_rate_rises_linearly(make_run):
    run = make_run("trainer.max_steps=6", "lr_schedule.warmup_steps=4")
    assert watched(run, lr=0.1).rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_without_warmup_the_rate_is_whole_from_the_first_step(make_run):
    assert watched(make_run("trainer.max_steps=2", "lr_schedule.warmup_steps=0"), lr=0.1).rates == [0.1, 0.1]


def test_gradients_are_clipped_by_their_global_norm_and_reported_before(make_run):
    words = ["trainer.max_steps=3", "log_every=1", "lr_schedule.warmup_steps=0"]
    free = watched(make_run(*words, "optimizer.gradient_clip=0"), lr=1e-3)
    limit = min(free.norms) / 2
    run = make_run(*words, f"optimizer.gradient_clip={limit}")
    clipped = watched(run, lr=1e-3)
    assert clipped.norms == pytest.approx([limit] * 3, rel=1e-4)
    header, *rows = [line.split(",") for line in run.folder.metrics_path.read_text().splitlines()]
    reported = [float(row[header.index("train/grad_norm")]) for row in rows]
    assert reported[0] == pytest.approx(free.norms[0], rel=1e-5)  # the same weights, hence the same gradient
    assert min(reported) > limit
    loose = watched(make_run(*words, f"optimizer.gradient_clip={10 * max(free.norms)}"), lr=1e-3)
    assert loose.norms == free.norms


def test_micro_batches_change_rounding_alone(make_run):
    words = ["model.dropout=0", "trainer.max_steps=4", "lr_schedule.warmup_steps=0"]
    one, four = (watched(make_run(*words, f"trainer.accumulate={n}"), lr=0.1) for n in (1, 4))
    assert len(one.weights) == len(four.weights) == 5
    moved = (one.weights[-1] - one.weights[0]).norm()
    assert moved > 0.1
    assert (one.weights[-1] - four.weights[-1]).norm() < 1e-5 * moved


# ---- the average ----


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("warmup", ["false", "true"])
def test_average_equals_its_closed_form(warmup, accumulate, make_run):
    """average_n = prod d w_0 + sum_k (1 - d_k) (d_(k+1) ... d_n) w_k, one term an optimizer step."""
    run = make_run("trainer.max_steps=5", f"trainer.accumulate={accumulate}", "ema.decay=0.5", f"ema.warmup={warmup}")
    weights = watched(run).weights
    decays = [min(0.5, (1 + n) / (10 + n)) if warmup == "true" else 0.5 for n in range(1, 6)]
    expected = weights[0]
    for decay, w in zip(decays, weights[1:], strict=True):
        expected = decay * expected + (1 - decay) * w
    average = torch.cat([a.double().flatten() for a in run.training.ema.average])
    assert (weights[-1] - weights[0]).abs().max() > 1e-3
    torch.testing.assert_close(average, expected, atol=1e-6, rtol=1e-6)
    stored = torch.load(run.folder.last, weights_only=True)["ema"]
    assert torch.equal(torch.cat([a.double().flatten() for a in stored.values()]), average)


def test_ramp_rises_to_the_decay_and_stays():
    ema = EMA(0.9, warmup=True)
    assert [ema.decay_at(n) for n in (1, 2, 8)] == [2 / 11, 3 / 12, 9 / 18]
    assert ema.decay_at(80) == 81 / 90 == 0.9 and ema.decay_at(10_000) == 0.9
    assert EMA(0.9).decay_at(1) == 0.9


def test_average_is_swapped_in_and_out_again(make_run):
    run = train(make_run("trainer.max_steps=2"))
    network = run.parts.denoiser.network
    own = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(KeyError), run.training.ema.swapped_in(network):
        for p, average in zip(network.parameters(), run.training.ema.average, strict=True):
            assert torch.equal(p, average)
        raise KeyError
    for p, before in zip(network.parameters(), own, strict=True):
        assert torch.equal(p, before)
    assert any(not torch.equal(a, w) for a, w in zip(run.training.ema.average, own, strict=True))


def test_dropout_belongs_to_the_step_and_not_to_the_generator(make_run):
    """Whatever was drawn from torch's generator before: the same weights."""
    ends = []
    for draws in (0, 1000):
        run = make_run("trainer.max_steps=2", "model.dropout=0.5")
        torch.manual_seed(draws)
        train(run)
        ends.append([p.detach().clone() for p in run.parts.denoiser.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
