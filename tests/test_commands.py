"""train, sample, evaluate and prepare from end to end, on a small run of the digits."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import inside
from PIL import Image

QUICK = ["trainer.max_steps=6", "data.batch_size=16", "sampler.num_steps=4", "log_every=2", "save.every_steps=4"]
QUICK += ["callbacks.grid.every_steps=3", "callbacks.grid.num_images=20", "callbacks.score.num_images=40"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A finished run, to be copied or read, never written to."""
    folder = tmp_path_factory.mktemp("run")
    words = [*QUICK, f"data.root={digits}", "run_dir=run", "callbacks.score.every_steps=4"]
    assert inside("train", words, folder) == 0
    return folder / "run", words


def test_a_run_leaves_what_the_design_says(run):
    folder, _ = run
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.csv", "results.jsonl", "report.html", "checkpoints/last.ckpt"}
    expected |= {f"checkpoints/step_{s:08d}.{e}" for s in (3, 4, 6) for e in ("ckpt", "sha256")}  # 3: it is looked at
    expected |= {"checkpoints/best.ckpt"}
    expected |= {f"samples/step_{s:08d}.png" for s in (3, 6)} | {"samples/film_step_00000006.png"}
    assert names == expected
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert {f"network.{k}" for k in checkpoint["ema"]} == set(checkpoint["state_dict"])
    assert all(v.dtype == torch.float32 for v in checkpoint["ema"].values())


def test_scores_say_what_they_are_of(run):
    rows = [json.loads(line) for line in (run[0] / "results.jsonl").read_text().splitlines()]
    assert [(r["metric"], r["step"]) for r in rows] == [(m, s) for s in (4, 6) for m in ("digits-FID", "digits-IS")]
    for row in rows:
        assert row["num_images"] == 40 and row["num_reference"] == 1797 and row["weights"] == "ema"
        assert (row["sampler"], row["num_steps"], row["nfe"], row["guidance_scale"]) == ("ddim", 4, 8.0, 2.0)
        assert row["extractor"] == "digits" and len(row["extractor_sha256"]) == 64
        assert {"seed", "commit", "versions", "reference"} <= row.keys() and row["value"] > 0
    header, *lines = (run[0] / "metrics.csv").read_text().splitlines()
    values = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    assert [v["step"] for v in values] == ["2", "4", "6"]
    assert [bool(v["eval/fid"]) for v in values] == [False, True, True]
    assert float(values[2]["eval/fid"]) == pytest.approx(rows[2]["value"], rel=1e-6)


def test_a_finished_run_says_so_and_what_is_missing_is_made(run, call, tmp_path):
    shutil.copytree(run[0], tmp_path / "run", symlinks=True)
    before = (tmp_path / "run" / "results.jsonl").read_text()
    status, output = call("train", *run[1])
    assert status == 0 and "Already complete (6 steps)" in output
    grid = tmp_path / "run" / "samples" / "step_00000006.png"
    pixels = np.asarray(Image.open(grid))
    grid.unlink()
    (tmp_path / "run" / "report.html").unlink()
    lines = before.splitlines(keepends=True)
    (tmp_path / "run" / "results.jsonl").write_text("".join(lines[:2]))
    status, output = call("train", *run[1])
    assert status == 0
    assert (np.asarray(Image.open(grid)) == pixels).all()
    assert (tmp_path / "run" / "report.html").is_file()
    again = [json.loads(x) for x in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    for row, old in zip(again, map(json.loads, lines), strict=True):
        assert row["value"] == pytest.approx(old["value"], rel=1e-5)


def test_longer_training_goes_on(run, call, tmp_path):
    shutil.copytree(run[0], tmp_path / "run", symlinks=True)
    status, output = call(
        "train", *[w for w in run[1] if not w.startswith("callbacks.")], "trainer.max_steps=8", "callbacks=none"
    )
    assert status == 0 and "continuing from step 6" in output
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_image_k_depends_on_the_seed_and_k_alone(run, call, tmp_path):
    words = [f"checkpoint={run[0]}", "sampler=ancestral", "sampler.num_steps=5", "guidance=classifier_free"]
    call("sample", *words, "out=a", "num_images=12", "batch_size=5")
    call("sample", *words, "out=b", "num_images=7", "batch_size=7")
    call("sample", *words, "out=c", "num_images=7", "seed=1")
    a, b, c = (np.load(tmp_path / name / "samples.npz") for name in "abc")
    assert a["arr_0"].shape == (12, 8, 8, 1) and a["arr_0"].dtype == np.uint8
    assert a["arr_1"].tolist() == [k % 10 for k in range(12)]
    difference = np.abs(a["arr_0"][:7].astype(int) - b["arr_0"])
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-2
    assert (b["arr_0"] != c["arr_0"]).mean() > 0.5


def test_labels_and_single_pictures(run, call, tmp_path):
    quick = [f"checkpoint={run[0]}", "sampler.num_steps=2", "num_images=5", "out=s"]
    assert call("sample", *quick, "labels=[3,7]", "png=true")[0] == 0
    samples = np.load(tmp_path / "s" / "samples.npz")
    assert samples["arr_1"].tolist() == [3, 7, 3, 7, 3]
    for k, image in enumerate(samples["arr_0"]):
        picture = np.asarray(Image.open(tmp_path / "s" / "png" / f"{k:06d}.png").convert("L"))
        assert (picture == image[..., 0]).all()
    status, output = call("sample", *quick, "labels=12", "overwrite=true")
    assert status == 2 and "labels=[12]" in output


def test_ema_and_raw_weights_differ(run, call, tmp_path):
    quick = [f"checkpoint={run[0]}", "sampler.num_steps=2", "num_images=4"]
    call("sample", *quick, "out=ema")
    call("sample", *quick, "out=raw", "ema=false")
    ema, raw = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("ema", "raw"))
    assert not (ema == raw).all()


def test_evaluate_adds_to_the_results_of_the_run(run, call, tmp_path):
    shutil.copytree(run[0], tmp_path / "run", symlinks=True)
    words = ["checkpoint=run", "num_images=30", "sampler.num_steps=3", "metrics=fid"]
    status, output = call("evaluate", *words)
    assert status == 0 and "digits-FID" in output
    row = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert (row["metric"], row["num_images"], row["nfe"], row["num_steps"]) == ("digits-FID", 30, 3.0, 3)
    assert call("evaluate", *words, "out=other.jsonl")[0] == 0
    assert json.loads((tmp_path / "other.jsonl").read_text())["value"] == row["value"]


def test_evaluate_of_the_real_images_is_perfect(call, tmp_path, digits):
    from sklearn.datasets import load_digits

    pixels = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    status, output = call("evaluate", "images=real.npz", f"reference={digits}", "extractor=digits", "out=r.jsonl")
    assert status == 0, output
    fid, score = (json.loads(line)["value"] for line in (tmp_path / "r.jsonl").read_text().splitlines())
    assert abs(fid) < 1e-3
    assert score > 9  # ten classes, recognised


def test_evaluate_refuses_images_it_cannot_score(call, tmp_path, digits):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((20, 16, 16, 1), np.uint8))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((20, 8, 8, 1)))
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{"a": 1}], dtype=object))
    (tmp_path / "empty").mkdir()
    expected = {"large.npz": "16x16", "float.npz": "float64", "pickle.npz": "Python objects", "empty": "no image"}
    for name, word in expected.items():
        status, output = call("evaluate", f"images={name}", f"reference={digits}", "extractor=digits")
        assert status == 2 and word in output, output
    status, output = call("evaluate", "images=large.npz", f"reference={digits}")
    assert status == 2 and "extractor=inception" in output and "6726825d" in output and "extractor.weights" in output


def test_prepare_makes_the_digits_and_leaves_them_alone(call, tmp_path, digits):
    assert call("prepare", "source=digits")[0] == 0
    made = sorted((tmp_path / "data" / "digits").iterdir())
    times = [p.stat().st_mtime_ns for p in made]
    assert call("prepare", "source=digits")[0] == 0
    assert times == [p.stat().st_mtime_ns for p in made]
    for path in made:  # the same bytes as on any other start
        assert path.read_bytes() == (digits / path.name).read_bytes()
