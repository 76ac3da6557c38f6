"""Evaluations and samplings: the same on any number of processes, gone on with after a stop, and of what they say."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, rows
from inceptions import OWN, write_random_inception
from PIL import Image

from diffusion.runs import results
from diffusion.scoring.bits import Bits

WORDS = ["guidance=classifier_free", "sampler.num_steps=4", "trainer.accelerator=cpu"]
FIGURES = ("value", "is_std", "kid_std", "real_value", "real_std", "per_class", "nfe")
METRICS = "metrics=[fid,is,kid,precision,recall,nearest]"


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A run of the digits without pictures and scores, to be copied or read."""
    folder = tmp_path_factory.mktemp("run")
    words = ["trainer.max_steps=30", "data.batch_size=16", "callbacks=none", f"data.root={digits}", "run_dir=run"]
    assert inside("train", words, folder) == 0
    return folder / "run"


def begun(words: list[str], cwd: Path) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SLURM_"))}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


# ---- any number of processes, any batch ----


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_more_processes_make_the_same_bytes_and_figures(run, ranks, tmp_path):
    words = [f"checkpoint={run}", *WORDS, METRICS, "num_images=75", "batch_size=10", "per_class=true"]
    processes = [
        begun(["diffusion.evaluate", *words, f"trainer.devices={n}", f"samples=s{n}", f"out={n}.jsonl"], tmp_path)
        for n in (1, ranks)
    ]
    for process in processes:
        status, output = ended(process)
        assert status == 0, output
    one, more = ((tmp_path / f"s{n}" / "samples.npz").read_bytes() for n in (1, ranks))
    assert one == more
    one, more = (rows(tmp_path / f"{n}.jsonl") for n in (1, ranks))
    assert set(one) == {"fid", "is", "kid", "precision", "recall", "nearest"}
    for name, row in one.items():
        assert more[name].keys() == row.keys()
        assert all(more[name][key] == row[key] for key in row if key not in ("neighbours", *FIGURES)), name
        for key in row.keys() & set(FIGURES):
            assert more[name][key] == pytest.approx(row[key], rel=1e-9), (name, key)
    assert not (tmp_path / "s1" / ".batches").exists()


def test_another_batch_size_changes_rounding_at_most(run, call, tmp_path):
    quick = [f"checkpoint={run}", "sampler.num_steps=10", "num_images=160"]
    for size in (64, 50):
        assert call("sample", *quick, f"batch_size={size}", f"out={size}")[0] == 0
    a, b = (np.load(tmp_path / str(size) / "samples.npz")["arr_0"].astype(int) for size in (64, 50))
    assert np.abs(a - b).max() <= 1 and (a != b).mean() <= 1e-4


@pytest.mark.parametrize("which", ["evaluate", pytest.param("sample", marks=pytest.mark.slow)])
def test_one_that_was_stopped_goes_on_and_ends_the_same(run, which, call, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    words = ["checkpoint=run", *WORDS, "num_images=60", "batch_size=10", "sampler.num_steps=10"]
    kept = "out" if which == "sample" else "samples"
    words += [] if which == "sample" else ["metrics=[fid]", "out=a.jsonl"]
    process = begun([f"diffusion.{which}", *words, f"{kept}=s"], tmp_path)
    batches = tmp_path / "s" / ".batches"
    while len(list(batches.glob("images_*.npz"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    status, output = ended(process)
    assert status == 143 and "Stopped by signal 15. Run the same command to continue" in output
    made = list(batches.glob("images_*.npz"))
    assert 2 <= len(made) < 6 and not (tmp_path / "s" / "samples.npz").exists()
    status, output = call(which, *words, f"{kept}=s")
    assert status == 0 and f"{10 * len(made)} of them existed" in output, output
    assert not batches.exists()
    assert call(which, *words, f"{kept}=t")[0] == 0
    assert (tmp_path / "s" / "samples.npz").read_bytes() == (tmp_path / "t" / "samples.npz").read_bytes()


def test_two_of_the_same_at_once_are_one_too_many(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    words = ["checkpoint=run", *WORDS, "num_images=400", "batch_size=10", "sampler.num_steps=10", "metrics=[fid]"]
    process = begun(["diffusion.evaluate", *words], tmp_path)
    while not list((tmp_path / "run").glob("evaluations/samples_*/images_*.npz")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    status, output = call("evaluate", *words)
    process.kill()
    process.communicate()
    assert status == 2 and "is in use by another process" in output
    assert list((tmp_path / "run").glob("evaluations/samples_*/images_*.npz"))


@pytest.mark.slow
def test_training_on_two_processes_looks_as_on_one(digits, tmp_path):
    words = ["trainer=cpu", "trainer.max_steps=12", "data.batch_size=16", "sampler.num_steps=4", "save.every_steps=6"]
    words += ["callbacks.grid.every_steps=6", "callbacks.grid.num_images=40", "callbacks.grid.batch_size=10"]
    words += ["callbacks.score.every_steps=6", "callbacks.score.num_images=60", "callbacks.score.batch_size=16"]
    words += [f"data.root={digits}", "data.lanes=8", "trainer.threads=1"]
    found = []
    for n in (1, 2):
        status, output = ended(begun(["diffusion.train", *words, f"trainer.devices={n}", f"run_dir=r{n}"], tmp_path))
        assert status == 0, output
        folder = tmp_path / f"r{n}"
        assert not (folder / "evaluations").exists()
        found.append([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()])
        assert {p.name for p in (folder / "samples").glob("step_*")} == {"step_00000006.png", "step_00000012.png"}
    assert [(r["name"], r["step"], r["nfe"]) for r in found[0]] == [(r["name"], r["step"], r["nfe"]) for r in found[1]]
    for one, two in zip(*found, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=0.02)
    pictures = [
        np.asarray(Image.open(tmp_path / f"r{n}" / "samples" / "step_00000012.png")).astype(int) for n in (1, 2)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


# ---- by class, and against what ----


def test_a_model_is_scored_by_class(run, call, tmp_path):
    quick = [f"checkpoint={run}", *WORDS, "num_images=40", "metrics=[fid]", "out=r.jsonl", "per_class=true"]
    assert call("evaluate", *quick)[0] == 0
    row = rows(tmp_path / "r.jsonl")["fid"]
    assert len(row["per_class"]) == 10 and all(value > 0 for value in row["per_class"])
    assert row["real_value"] > 0 and row["real_std"] > 0 and row["real_images"] == 40
    assert row["nfe"] == 8 and row["batch_size"] == 256 and row["split"] == "train" and row["rounding"] == "nearest"


def test_the_reference_is_kept_beside_the_shards_and_used_again(run, call, tmp_path, digits, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "digits"
    shutil.copytree(digits, data, ignore=shutil.ignore_patterns("reference_*"))
    words = [f"checkpoint={run}", f"reference={data}", *WORDS, "num_images=12", "metrics=[fid]", "extractor=digits"]
    outputs = [call("evaluate", *words, f"out={n}.jsonl")[1] for n in range(2)]
    assert "reference: 1797 images" in outputs[0] and "reference:" not in outputs[1]
    (kept,) = data.glob("reference_digits_train_*.safetensors")
    assert rows(tmp_path / "0.jsonl")["fid"]["value"] == rows(tmp_path / "1.jsonl")["fid"]["value"]
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\1")  # damaged
    assert "reference: 1797 images" in call("evaluate", *words, "out=2.jsonl")[1]
    assert rows(tmp_path / "0.jsonl")["fid"]["value"] == rows(tmp_path / "2.jsonl")["fid"]["value"]


# ---- likelihood, sweeps ----


@pytest.mark.slow
def test_bits_per_dim_is_measured_with_its_terms(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    words = ["checkpoint=run", "metrics=[bits_per_dim]", "likelihood.num_images=3"]
    status, output = call("evaluate", *words, "likelihood.batch_size=2")
    assert status == 0 and "bits/dim" in output, output
    row = rows(tmp_path / "run" / "results.jsonl")["bits_per_dim"]
    assert row["value"] == pytest.approx(row["L_T"] + row["L_t"] + row["L_0"], rel=1e-9)
    assert (row["num_images"], row["split"], row["nfe"], row["likelihood"]) == (3, "train", 1000, "bound")
    made = {path.name for path in (tmp_path / "run" / "likelihood").iterdir()}
    assert made == {"bound_step_00000030.csv", "bound_step_00000030.png", "progressive_step_00000030.png"}
    assert len((tmp_path / "run" / "likelihood" / "bound_step_00000030.csv").read_text().splitlines()) == 1001
    assert "bits/dim" in (tmp_path / "run" / "report.html").read_text()
    assert not list((tmp_path / "run").glob("evaluations/likelihood_*"))


def test_a_sweep_is_a_table_of_fid_over_steps_and_eta_and_goes_on(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    words = ["checkpoint=run", "task=sweep", "num_images=20", "sweep.eta=[0.0,1.0]", "guidance=classifier_free"]
    status, output = call("evaluate", *words, "sweep.num_steps=[2]")
    assert status == 0 and "3 of 3: ancestral, 2 steps" in output, output
    status, output = call("evaluate", *words, "sweep.num_steps=[2,4]")
    assert status == 0 and "2 of 6: ddim, 4 steps" in output and "1 of 6" not in output
    path = tmp_path / "run" / "evaluations" / "sweep.csv"
    with open(path, newline="") as file:
        found = {(row["eta"], row["num_steps"]): row for row in csv.DictReader(file)}
    assert found.keys() == {(eta, steps) for eta in ("0.0", "1.0", "") for steps in ("2", "4")}
    assert all(float(row["fid"]) > 0 and float(row["nfe"]) == 2 * int(row["num_steps"]) for row in found.values())
    assert len({row["fid"] for row in found.values()}) == 6
    assert path.with_suffix(".png").is_file() and "η = 1" in output
    one = call("evaluate", "checkpoint=run", "num_images=20", "guidance=classifier_free", "sampler.eta=1.0",
               "sampler.num_steps=4", "metrics=[fid]", "out=r.jsonl")  # fmt: skip
    assert one[0] == 0
    assert rows(tmp_path / "r.jsonl")["fid"]["value"] == pytest.approx(float(found["1.0", "4"]["fid"]), rel=1e-9)


def test_samplers_of_a_sweep_are_told_by_their_words(run, call, tmp_path):
    words = [f"checkpoint={run}", "task=sweep", "sweep.num_steps=[2,3]", "sweep.eta=[]", "sweep.large=false"]
    words += ["num_images=20", "sweep.samplers=['heun','heun clip_x0=false']", "out=sweep"]
    status, output = call("evaluate", *words)
    assert status == 0 and "3 of 4: heun clip_x0=false, 2 steps" in output, output
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        found = {(row["words"], row["num_steps"]): float(row["fid"]) for row in csv.DictReader(file)}
    assert found.keys() == {(name, steps) for name in ("heun", "heun clip_x0=false") for steps in "23"}
    table = [line for line in output.splitlines() if line.startswith("heun")]
    assert len(table) == 2 and table[1].startswith("heun clip_x0=false  ")
    assert all(f"{found['heun', steps]:.2f}" in table[0] for steps in "23")


def test_a_point_of_a_sweep_is_of_one_reference_and_one_number_of_images(run, call, tmp_path):
    """And the table shows the points that were asked for, whatever else the file holds."""
    np.savez(tmp_path / "real.npz", arr_0=np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8, 1))
    words = [f"checkpoint={run}", "task=sweep", "sweep.num_steps=[2]", "sweep.eta=[0.0]", "sweep.large=false"]
    shown = []
    for more in (["num_images=20"], ["num_images=20", "reference=real.npz"], ["num_images=30"], ["num_images=20"]):
        status, output = call("evaluate", *words, *more, "out=sweep")
        assert status == 0, output
        shown.append(output.split("η = 0")[1].split()[0])
    with open(tmp_path / "sweep" / "sweep.csv", newline="") as file:
        kept = [(row["num_images"], row["data"], f"{float(row['fid']):.2f}") for row in csv.DictReader(file)]
    assert shown[3] == shown[0] and len(set(shown)) == 3 and len(kept) == 3
    assert kept[-1] == ("20", "digits", shown[0])  # the later of two counts


@pytest.mark.slow
@pytest.mark.parametrize("whom, number", [(1, signal.SIGKILL), (0, signal.SIGTERM)])
def test_an_end_before_the_ranks_have_met_is_the_end_of_all(run, whom, number, tmp_path):
    process = begun(["diffusion.sample", f"checkpoint={run}", "out=s", "trainer.devices=2"], tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def ranks() -> list[int]:
        with contextlib.suppress(OSError):
            ours = lambda pid: b"diffusion.sample" in Path(f"/proc/{pid}/cmdline").read_bytes()  # noqa: E731
            return [int(pid) for pid in children.read_text().split() if ours(pid)]
        return []

    started: list[int] = []
    while not (started and started == ranks()):  # others come and go while torch is imported
        started = ranks()
        time.sleep(1)  # and then rank 0 waits for the other, in torch
    os.kill([process.pid, *started][whom], number)
    status, output = ended(process, 40)
    assert status == (1 if whom else 143), output
    assert not whom or "before the ranks were connected, rank 1 ended with signal 9" in output
    assert not Path(f"/proc/{started[0]}/exe").exists()


def test_what_was_measured_of_other_images_is_not_gone_on_with(run, call, tmp_path, monkeypatch):
    """The first two of six images are others than the first two of four."""
    quick = ["trainer.accelerator=cpu", "metrics=[bits_per_dim]", "likelihood.by=ode", "likelihood.tolerance=0.1"]
    quick += ["likelihood.batch_size=2"]
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name, symlinks=True)
    measure, left = Bits.measure, [1]

    def once(bits, numbers):
        if not left.pop():
            raise ValueError("stopped here")
        left.append(0)
        return measure(bits, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(Bits, "measure", once)
        assert call("evaluate", *quick, "checkpoint=a", "likelihood.num_images=4")[0] == 2
    assert list((tmp_path / "a" / "evaluations").glob("likelihood_*/terms_00000000_2*"))
    for name in ("a", "b"):
        status, output = call("evaluate", *quick, f"checkpoint={name}", "likelihood.num_images=6")
        assert status == 0, output
    a, b = (rows(tmp_path / name / "results.jsonl")["bits_per_dim"] for name in ("a", "b"))
    assert a["num_images"] == 6 and a["value"] == b["value"]


@pytest.mark.parametrize("wanted", [[], ["samples=s"]])
def test_samples_stay_until_the_results_are_kept(run, wanted, call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    words = ["checkpoint=run", "num_images=20", "sampler.num_steps=2", "neighbours=0", "out=r.jsonl", *wanted]
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    with monkeypatch.context() as patched:
        patched.setattr(results, "write_atomically", full)
        status, output = call("evaluate", *words)
    assert status == 2 and "No space left" in output
    assert not (tmp_path / "r.jsonl").exists()
    assert (tmp_path / "s" / ".batches" / "about.json").exists() == bool(wanted)  # by which the command may go on
    status, output = call("evaluate", *words)
    assert status == 0 and "20 of them existed" in output
    assert not list((tmp_path / "run").glob("evaluations/samples_*")) and not (tmp_path / "s" / ".batches").exists()
    assert (tmp_path / "s" / "samples.npz").exists() == bool(wanted)


# ---- the paper's protocol, in small ----


@pytest.mark.slow  # Inception at 299 x 299 pixels, five times over 2048 x 2048 matrices
def test_a_run_of_the_shape_of_cifar10_is_scored_by_inception_beside_the_paper(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", arr_0=pixels, arr_1=np.arange(200) % 10)
    write_random_inception(tmp_path / "inception.pth")
    digest = hashlib.sha256((tmp_path / "inception.pth").read_bytes()).hexdigest()
    words = ["source=set.npz", "dataset=cifar10"]
    status, output = ended(begun(["diffusion.prepare", *words], tmp_path))
    assert status == 0, output
    words = ["+experiment=cifar10", "trainer=cpu", "model.width=32", "data.batch_size=8", "trainer.max_steps=4"]
    words += ["callbacks.score.num_images=64", "callbacks.score.batch_size=32", "callbacks.score.every_steps=2"]
    words += ["callbacks.score.during.num_images=64", "callbacks.score.during.num_steps=2", "sampler.num_steps=2"]
    words += ["callbacks.grid.num_images=4", "extractor.weights=inception.pth", f"extractor.sha256={digest}"]
    words += ["logger=wandb", "logger.mode=offline", "log_every=1"]
    status, output = ended(begun(["diffusion.train", *words], tmp_path), 560)
    assert status == 0, output
    folder = tmp_path / "runs" / "cifar10"
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(r["metric"], r["step"], r["reference"]) for r in found] == [
        ("FID", 2, 3.17), ("IS", 2, 9.46), ("FID", 4, 3.17), ("IS", 4, 9.46),
    ]  # fmt: skip
    assert all(row["num_images"] == 64 and row["value"] > 0 for row in found)
    with open(folder / "metrics.csv", newline="") as file:
        at_two = next(row for row in csv.DictReader(file) if row["step"] == "2")
    assert float(at_two["eval/fid"]) == pytest.approx(found[0]["value"]) and float(at_two["eval/is"]) > 1
    report = (folder / "report.html").read_text()
    assert "3.17" in report and "9.46" in report and "FID" in report
    logged = b"".join(path.read_bytes() for path in (folder / "wandb").rglob("*.wandb"))
    assert all(word in logged for word in (b"eval/fid", b"eval/is", b"paper/fid", b"paper/is"))


# ---- what cannot be scored ----


WRONG = {
    "one real image for FID": (
        ["reference=one.npz", "metrics=[fid]"],
        "reference=one.npz: fid needs at least 2 real images",
    ),
    "one image for IS": (["num_images=9", "metrics=[is]"], "num_images=9: is needs at least 10 images"),
    "an unknown metric": (["metrics=[fid,sfid]"], "Unknown metric: sfid. Did you mean fid?"),
    "no such target": ([*OWN[:2], "extractor.target=inceptions.large"], "extractor.target=inceptions.large"),
    "a target that is no module": ([*OWN[:2], "extractor.target=os.getcwd"], "gives str, expected a torch module"),
    "a name without a target": (["extractor.name=dino"], "extractor=custom"),
    "a reference of another size": (["reference=large.npz"], "The images have 8x8 pixels, the reference has 20x20"),
    "no metric": (["metrics=[]"], "metrics=[] measures nothing: give some of bits_per_dim, fid, is, kid"),
    "a name that is taken": (
        [*OWN[:1], "extractor.name=digits", "extractor.target=inceptions.small"],
        "is the name of a built-in extractor",
    ),
    "weights that are not there": (["extractor.weights=no.pth"], "there are no weights at no.pth"),
    "classes of an unlabelled reference": (
        ["reference=large.npz", "per_class=true"],
        "reference=large.npz has no labels",
    ),
    "classes without FID": (["metrics=[is]", "per_class=true"], "per_class=true needs fid in metrics; metrics=[is]"),
    "samples in a file": (["samples=large.npz"], "samples=large.npz: large.npz is a file"),
    "samples where there are some": (["samples=."], "samples=. already holds png"),
    "nothing to overwrite": (["overwrite=true"], "overwrite=true is for samples=FOLDER"),
    "samples of a sweep": (["task=sweep", "samples=s", "out=sweep"], "of a sweep no samples are kept"),
    "half a step": (["task=sweep", "sweep.num_steps=[2.5]", "out=sweep"], "sweep.num_steps=[2.5]"),
    "a sweep over times that are given": (
        ["task=sweep", "sampler.spacing=[900,300]", "out=sweep"],
        "sampler.spacing=[900,300] gives the times themselves, the same for every number of sweep.num_steps",
    ),
    "times among its samplers": (
        ["task=sweep", "sweep.samplers=['heun spacing=[900,300]']", "out=sweep"],
        "sweep.samplers: 'heun spacing=[900,300]': spacing=[900,300] gives the times themselves",
    ),
    "a budget among its samplers": (
        ["task=sweep", "sweep.samplers=['heun max_calls=10']", "out=sweep"],
        "sweep.samplers: 'heun max_calls=10': max_calls=10 has no effect: sweep.num_steps sets the number of steps.",
    ),
    "steps among its samplers": (
        ["task=sweep", "sweep.samplers=['heun num_steps=10']", "out=sweep"],
        "sweep.samplers: 'heun num_steps=10': num_steps=10 has no effect: sweep.num_steps",
    ),
    "a point twice": (
        ["task=sweep", "sweep.eta=[0.5]", "sweep.num_steps=[3]", "sweep.samplers=['ddim eta=0.5']", "out=sweep"],
        "The sweep has a point twice: ddim eta=0.5, 3 steps, and ddim eta=0.5, 3 steps, are the same sampling.",
    ),
    "a sweep of nothing": (["task=sweep", "sweep.num_steps=[]", "out=sweep"], "The sweep has no point"),
    "an eta outside": (
        ["task=sweep", "sweep.eta=[2.0]", "out=sweep"],
        "sweep.eta=[2.0] holds 2.0, which is outside [0, 1]",
    ),
    "results in a file": (["out=large.npz/r.jsonl"], "out=large.npz/r.jsonl: large.npz is a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_be_are_refused(case, run, call, tmp_path):
    words, expected = WRONG[case]
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((20, 20, 20, 1), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 1), np.uint8))
    (tmp_path / "png").mkdir()
    given = words if any(word.startswith("out=") for word in words) else [*words, "out=r.jsonl"]
    status, output = call("evaluate", f"checkpoint={run}", *given)
    assert status == 2 and expected in output, output
    assert (tmp_path / "png").is_dir() and not (tmp_path / "sweep").exists()
    assert not (tmp_path / "r.jsonl").exists()


def test_a_network_that_gives_nan_is_refused(run, call, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    path = next((tmp_path / "run" / "checkpoints").glob("step_*.ckpt"))
    content = torch.load(path, weights_only=True)
    content["ema"]["head.bias"][:] = float("nan")
    torch.save(content, path)
    path.with_suffix(".sha256").unlink()
    status, output = call("sample", f"checkpoint={path}", "num_images=4", "sampler.num_steps=2", "out=s")
    assert status == 2 and "Sampling gave values that are not finite, in images 0 to 3" in output
    assert not (tmp_path / "s" / "samples.npz").exists()


def test_results_have_to_go_somewhere(run, call, tmp_path):
    shutil.copy(next((run / "checkpoints").glob("step_*.ckpt")), tmp_path / "bare.ckpt")
    for words, where in (([], "out=FILE"), (["task=sweep"], "out=FOLDER")):
        status, output = call("evaluate", "checkpoint=bare.ckpt", "num_images=20", *words)
        assert status == 2 and where in output and "The checkpoint is not in a run folder" in output
