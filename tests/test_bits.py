"""Bits per dimension of a trained model on its data: what is measured in pieces, put together, and written."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import inside
from PIL import Image

from diffusion.build import door
from diffusion.data.module import ImageShardsDataModule
from diffusion.denoiser import Clipped, NetworkDenoiser
from diffusion.distributed.place import Place
from diffusion.errors import Refusal
from diffusion.likelihood.bound import COLUMNS, bound_terms
from diffusion.models.unet import UNet
from diffusion.runs.recorded import Recorded
from diffusion.scoring.bits import Bits, Settings, stages, variance_of

T = 12
WHERE = Place(torch.device("cpu"), "32", torch.contiguous_format)


@pytest.fixture(scope="module")
def model(tmp_path_factory, digits):
    """A model of a few steps that has learned a variance, by class."""
    folder = tmp_path_factory.mktemp("model")
    words = ["callbacks=none", "trainer=cpu", "trainer.max_steps=3", "data.batch_size=16", "objective=hybrid"]
    words += ["model.blocks_per_level=1", "schedule.beta_end=0.6", f"schedule.num_timesteps={T}"]
    words += ["sampler.num_steps=4", "objective.label_dropout=0.2", f"data.root={digits}", "run_dir=run"]
    assert inside("train", words, folder) == 0
    return door.trained(str(folder / "run"))


@pytest.fixture
def bits(model):
    """`bits(**settings)`: a measurement of the digits."""
    return lambda **settings: Bits(model, WHERE, door.data_of(model), Settings(**settings))


def fixed_variance(model, run):
    """A model whose network predicts no variance, of a run with these settings."""
    network = UNet(image_size=8, channels=1, width=32, multipliers=[1], attention_resolutions=[], num_classes=10)
    denoiser = NetworkDenoiser(network, model.denoiser.schedule)
    return model._replace(denoiser=denoiser, record=Recorded({"data": {"name": "digits"}, **run}, "here"))


def measured(bits):
    return [bits.measure(numbers) for numbers in bits.batches()]


def test_the_row_says_what_was_measured_and_its_parts_add_up(bits, model):
    it = bits(num_images=20, batch_size=8, seed=3)
    (row,) = it.rows(measured(it))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["metric"], row["name"], row["likelihood"], row["num_images"]) == (
        "bits/dim",
        "bits_per_dim",
        "bound",
        20,
    )
    assert row["value"] == pytest.approx(row["L_T"] + row["L_t"] + row["L_0"], rel=1e-12)
    assert row["rate"] == pytest.approx(row["L_T"] + row["L_t"]) and row["distortion"] == row["L_0"]
    assert (row["split"], row["data"], row["weights"], row["step"]) == ("train", "digits", "ema", 3)
    assert (row["nfe"], row["variance"], row["given_labels"]) == (T, "learned", True)
    assert row["standard_error"] > 0 and row["reference"] is None
    assert {"seed", "commit", "versions", "precision", "parameters"} <= row.keys()
    module, schedule = door.data_of(model), model.denoiser.schedule
    numbers = it.numbers()
    images, labels, *_ = module.samples.batch(numbers)
    denoise = partial(Clipped(model.denoiser, schedule), labels=labels)
    whole = bound_terms(denoise, schedule, images, torch.from_numpy(numbers), 3, "learned")
    assert row["value"] == pytest.approx((whole.prior + whole.bits.sum(1)).mean(), rel=1e-6)


@pytest.mark.parametrize("by", ["bound", "ode"])
def test_pieces_are_stored_and_another_process_goes_on(by, bits, tmp_path):
    """Other batches, in another order, some from a file: the same rows, to the rounding of the network."""
    settings = {"by": by, "num_images": 7, "seed": 1, "tolerance": 1e-4}
    one, other = bits(batch_size=4, **settings), bits(batch_size=3, **settings)
    assert np.concatenate(one.batches()).tolist() == one.numbers().tolist() == other.numbers().tolist()
    first, *rest = measured(other)
    np.savez(tmp_path / "first.npz", **first)
    with np.load(tmp_path / "first.npz", allow_pickle=False) as stored:
        parts = [*rest[::-1], dict(stored)]
    (expected,), (got,) = one.rows(measured(one)), other.rows(parts)
    numbers = {k for k, v in expected.items() if isinstance(v, float)} - {"nfe"}
    near = {"rel": 1e-5} if by == "bound" else {"rel": 1e-3, "abs": 1e-4}
    assert {k: got[k] for k in numbers} == pytest.approx({k: expected[k] for k in numbers}, **near)
    assert one.identity() == other.identity() and json.dumps(one.identity())
    assert bits(by=by, seed=2).identity() != one.identity()


def test_the_flow_says_how_sure_it_is(bits):
    it = bits(by="ode", num_images=3, probes=3, probe="gaussian", tolerance=0.1)
    (row,) = it.rows(measured(it))
    assert row["likelihood"] == "ode" and row["nfe"] > 6 and row["probes"] == 3 and row["precision"] == "32"
    assert 0 < row["probe_error"] < row["value"] and row["standard_error"] > 0
    json.dumps(row, allow_nan=False)
    exact = bits(by="ode", num_images=3, probes=0, tolerance=0.3)
    (sure,) = exact.rows(measured(exact))
    assert sure["probe_error"] is None and "probe" not in sure
    assert row["value"] == pytest.approx(sure["value"], abs=5 * row["probe_error"] + 0.1)


def test_the_files_hold_the_terms_and_what_a_receiver_sees(bits, tmp_path):
    it = bits(num_images=9, batch_size=9)
    parts = measured(it)
    table, plot, progressive = it.write(parts, tmp_path)
    names = ["bound_step_00000003.csv", "bound_step_00000003.png", "progressive_step_00000003.png"]
    assert [str(p.relative_to(tmp_path)) for p in (table, plot, progressive)] == [f"likelihood/{n}" for n in names]
    header, *lines = csv.reader(table.read_text().splitlines())
    assert tuple(header) == COLUMNS and [int(line[0]) for line in lines] == list(range(1, T + 1))
    (row,) = it.rows(parts)
    values = np.array(lines, dtype=float)
    assert values[0, 1] == row["L_0"] and values[0, 4] == row["rate"] and values[0, 5] == row["rmse_255"]
    assert values[-1, 4] == row["L_T"] and (np.diff(values[:, 4]) < 0).all()
    assert Image.open(plot).size == (1200, 480)
    width = 2 + 34 * (len(stages(T)) + 1)  # tiles of 32 pixels and a gap of 2
    assert Image.open(progressive).size == (width, 2 + 34 * 8)
    assert bits(by="ode").write([], tmp_path / "other") == [] and not (tmp_path / "other").exists()


def test_the_stages_are_those_of_the_papers_table():
    assert stages(1000) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert stages(3) == [3, 2, 1] and stages(T)[-1] == 1


def test_a_choice_of_images_belongs_to_the_seed(bits):
    some, same, other = (bits(num_images=50, seed=seed).numbers() for seed in (0, 0, 1))
    assert np.array_equal(some, same) and not np.array_equal(some, other)
    assert len(set(some.tolist())) == 50 and (np.diff(some) > 0).all() and some.max() > 1000
    assert bits().numbers().tolist() == list(range(1797)) == bits(num_images=5000).numbers().tolist()


def test_the_variance_follows_the_run_unless_it_is_chosen(bits, model):
    assert bits().variance == "learned" and bits(variance="small").variance == "small"
    of = lambda run: variance_of(fixed_variance(model, run))  # noqa: E731
    assert of({"objective": {"variance": "large"}, "sampler": {"variance": "small"}}) == "large"
    assert of({"objective": {}, "sampler": {"variance": "small"}}) == "small"
    assert of({"objective": {}, "sampler": {"eta": 0.0}}) == "small"


def test_the_papers_figure_stands_beside_the_bound_of_the_test_split_alone(bits, model):
    config = Recorded({"paper": {"bits_per_dim": 3.75}, "data": {"name": "digits"}}, "here")
    for split, by, data, figure in (
        ("test", "bound", "digits", 3.75), ("train", "bound", "digits", None), ("test", "ode", "digits", None),
        ("test", "bound", "data/others", None),
    ):  # fmt: skip
        it = bits(by=by, num_images=2, tolerance=0.1)
        parts = measured(it)
        it.model, it.module.split, it.data = model._replace(record=config), split, data
        assert (it.rows(parts)[0]["reference"], it.rows(parts)[0]["data"]) == (figure, data)


def test_bf16_is_for_the_bound_alone(model):
    where = WHERE._replace(precision="bf16-mixed")
    rows = []
    for place in (WHERE, where):
        it = Bits(model, place, door.data_of(model), Settings(num_images=6))
        rows += it.rows(measured(it))
    assert [row["precision"] for row in rows] == ["32", "bf16-mixed"]
    assert rows[0]["value"] != rows[1]["value"] == pytest.approx(rows[0]["value"], rel=0.02)
    it = Bits(model, where, door.data_of(model), Settings(by="ode", num_images=2, tolerance=0.1))
    assert it.rows(measured(it))[0]["precision"] == "32"


def test_what_cannot_be_measured_is_refused(bits, model, root):
    for settings, mentions in (
        ({"by": "flow"}, "likelihood.by=flow must be one of bound, ode"),
        ({"variance": "medium"}, "likelihood.variance=medium must be one of small, large, learned"),
        ({"num_images": 0}, "likelihood.num_images=0 must be at least 1"),
        ({"probes": -1}, "likelihood.probes=-1 must be at least 0"),
        ({"tolerance": 2}, r"likelihood.tolerance=2 is outside \(0, 1\)"),
        ({"start": 0}, "likelihood.start=0 must be above 0"),
    ):
        with pytest.raises(Refusal, match=mentions):
            bits(**settings)
    with pytest.raises(Refusal, match="likelihood.variance=learned"):
        Bits(fixed_variance(model, {}), WHERE, door.data_of(model), Settings(variance="learned"))
    with pytest.raises(ValueError, match=rf"likelihood.start=12.0 is outside \(0, schedule.num_timesteps={T}\)"):
        bits(by="ode", start=12.0)
    assert bits(start=12.0)  # the bound has no flow
    with pytest.raises(Refusal, match="the data set has"):
        Bits(model, WHERE, ImageShardsDataModule(root, batch_size=1), Settings())


def test_a_measurement_can_be_ended_at_any_evaluation(model):
    calls = []

    def attend():
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    it = Bits(model, WHERE, door.data_of(model), Settings(num_images=2), attend)
    with pytest.raises(KeyboardInterrupt):
        it.measure(it.numbers())
    assert len(calls) == 5
