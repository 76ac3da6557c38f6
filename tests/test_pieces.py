"""An interrupted sampling loses nothing silently: what is there is used, whatever the batch size, or it is refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import inside, rows

from diffusion.build.evaluation import evaluation
from diffusion.config.compose import composed
from diffusion.distributed.ranks import Ranks
from diffusion.process.schedule import ve_geometric
from diffusion.samplers.predictor_corrector import LangevinCorrector, PredictorCorrector
from diffusion.scoring.bits import Bits
from diffusion.scoring.evaluation import MEASURED
from diffusion.scoring.gallery import Gallery
from diffusion.scoring.pieces import Pieces, batches, united, without
from diffusion.scoring.sampling import Sampling

QUICK = ["sampler.num_steps=4", "trainer.accelerator=cpu"]
KIND = "things_*"


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A run of the digits without pictures and scores, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    words = ["trainer=cpu", "trainer.max_steps=4", "save.every_steps=2", "data.batch_size=16", "callbacks=none"]
    assert inside("train", [*words, f"data.root={digits}", "run_dir=run"], folder) == 0
    return folder / "run"


@pytest.fixture
def stopped(call, monkeypatch):
    """`stopped(images, command, *words)`: a command that is stopped after so many images, as by a failure."""

    def start(count: int, *words: str) -> str:
        made, sample = [0], Sampling.images

        def limited(sampling, numbers):
            if made[0] + len(numbers) > count:
                raise ValueError("stopped here")
            made[0] += len(numbers)
            return sample(sampling, numbers)

        with monkeypatch.context() as patched:
            patched.setattr(Sampling, "images", limited)
            status, output = call(*words)
        assert status == 2 and "stopped here" in output, output
        return output

    return start


def samples(folder) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


# ---- ranges ----


def test_gaps_are_cut_where_a_work_without_gaps_would_be():
    assert batches(range(0, 25), 10) == [range(0, 10), range(10, 20), range(20, 25)]
    assert batches(range(12, 32), 10) == [range(12, 20), range(20, 30), range(30, 32)]
    assert batches(range(12, 15), 10) == [range(12, 15)]
    assert without([range(30)], [range(5, 10), range(8, 12), range(20, 40)]) == [range(5), range(12, 20)]
    assert without([range(30)], []) == [range(30)] and without([range(3)], [range(9)]) == []
    assert united([range(4, 6), range(0, 4), range(8, 9), range(0)]) == [range(6), range(8, 9)]


@pytest.mark.parametrize("seed", range(20))
def test_readers_join_any_files_to_the_same_arrays(tmp_path, seed):
    """Files of random ranges, that overlap and leave gaps, then rounds of any batch size and number."""
    draw = np.random.default_rng(seed)
    for _ in range(3):
        total, size = int(draw.integers(1, 60)), int(draw.integers(1, 20))
        with Pieces(tmp_path / "work", "about", Ranks(), total, size) as pieces:
            work = pieces.missing(KIND)

            def make(part, pieces=pieces):
                pieces.write(KIND, part, {"x": np.arange(part.start, part.stop), "one": np.int64(7)})
                return True

            made = [part for part in work if draw.random() < 0.5]
            pieces.make(made, make, "first")
            pieces.make(pieces.missing(KIND), make, "rest")
            found = [pieces.read(KIND, part) for part in pieces.parts(KIND)]
            assert np.concatenate([f["x"] for f in found]).tolist() == list(range(total))
            assert all(set(f) == {"x", "one"} and f["one"] == 7 for f in found)
            inner = range(total // 3, total)
            middle = [pieces.read(KIND, part)["x"] for part in pieces.parts(KIND, inner)]
            assert np.concatenate(middle).tolist() == list(inner)
    assert not (tmp_path / "work.lock").exists()


def test_a_damaged_file_is_made_again(tmp_path, capsys):
    with Pieces(tmp_path / "work", "about", Ranks(), total=100, batch_size=100) as pieces:
        made = []

        def make(part):
            pieces.write(KIND, part, {"x": np.arange(100)})
            made.append(part)
            return True

        pieces.make(pieces.missing(KIND), make, "work")
        path = tmp_path / "work" / "things_00000000_100.npz"
        data = bytearray(path.read_bytes())
        data[200] ^= 255
        np.savez(tmp_path / "few.npz", x=np.arange(3))
        np.savez(tmp_path / "objects.npz", x=np.array([{}] * 100))
        other = [(tmp_path / name).read_bytes() for name in ("few.npz", "objects.npz")]
        for content in (bytes(data), data[:100], b"", *other):
            path.write_bytes(content)
            pieces.make(pieces.missing(KIND), make, "work")
            (part,) = pieces.parts(KIND)
            assert (pieces.read(KIND, part)["x"] == np.arange(100)).all()
            assert f"{path} is damaged: its content is made again." in capsys.readouterr().out
        assert pieces.missing(KIND) == [] and len(made) == 6
        pieces.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.npz", "objects.npz"]


# ---- sample ----


def test_another_batch_size_goes_on_with_the_batches_that_are_there(run, call, stopped, tmp_path):
    words = ["sample", f"checkpoint={run}", *QUICK, "num_images=40"]
    stopped(30, *words, "batch_size=10", "out=s")
    kept = {path: path.read_bytes() for path in (tmp_path / "s" / ".batches").glob("images_*")}
    assert len(kept) == 3 and not (tmp_path / "s" / ".batches.lock").exists()
    stopped(0, *words, "batch_size=16", "out=s")
    assert {path: path.read_bytes() for path in (tmp_path / "s" / ".batches").glob("images_*")} == kept
    status, output = call(*words, "batch_size=16", "out=s")
    assert status == 0 and "30 of them existed" in output, output
    assert "Batch sizes 10 and 16 were mixed, which changes rounding at most." in output
    assert call(*words, "batch_size=16", "out=t")[0] == 0
    a, b = samples(tmp_path / "s").astype(int), samples(tmp_path / "t").astype(int)
    assert a.shape == (40, 8, 8, 1) and np.abs(a - b).max() <= 1
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["grid.png", "samples.npz"]


@pytest.mark.parametrize("first, then", [(40, 25), (25, 40)])
def test_another_number_of_images_uses_what_is_there(run, call, stopped, tmp_path, first, then):
    words = ["sample", f"checkpoint={run}", *QUICK, "batch_size=10", "out=s"]
    stopped(20, *words, f"num_images={first}")
    status, output = call(*words, f"num_images={then}")
    assert status == 0 and "20 of them existed" in output and "mixed" not in output, output
    assert call(*words[:-1], f"num_images={then}", "out=t")[0] == 0
    assert (tmp_path / "s" / "samples.npz").read_bytes() == (tmp_path / "t" / "samples.npz").read_bytes()


OTHER = {
    "seed=1": "seed: was 0, is 1",
    "sampler=ancestral": "sampler: was ddim, is ancestral",
    "sampler.eta=0.5": "sampler.eta: was 0.0, is 0.5",
    "sampler.num_steps=5": "sampler.num_steps: was 4, is 5",
    "labels=[3,7]": "labels: was [], is [3, 7]",
    "guidance=classifier_free": "guidance.scale: was 1.0, is 2.0",
    "ema=false": "ema: was true, is false",
    "trainer.precision=bf16-mixed": "trainer.precision: was 32, is bf16-mixed",
    "checkpoint": "checkpoint: was step 4 (sha256 ",
}


@pytest.mark.parametrize("change", OTHER)
def test_another_sampling_is_refused_with_the_difference(run, call, stopped, tmp_path, change):
    words = ["sample", f"checkpoint={run}", *QUICK, "num_images=40", "batch_size=10", "out=s"]
    stopped(30, *words)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "s").rglob("*.*")) if path.is_file()}
    if change == "checkpoint":
        change = f"checkpoint={run / 'checkpoints' / 'step_00000002.ckpt'}"
    changed = [w for w in words if w.partition("=")[0] != change.partition("=")[0]] + [change]
    status, output = call(*changed)
    expected = OTHER.get(change, OTHER["checkpoint"])
    assert status == 2 and output.count("error: ") == 1 and "Traceback" not in output
    assert "error: out=s holds 30 images of another sampling: " in output and expected in output, output
    assert "times" not in output
    assert output.endswith("Give the same settings, another folder, or overwrite=true.\n")
    assert {p: p.read_bytes() for p in sorted((tmp_path / "s").rglob("*.*")) if p.is_file()} == before
    if change == "seed=1":
        status, output = call(*changed, "overwrite=true")
        assert status == 0 and "out=s: 30 images of another sampling are removed: seed: was 0, is 1." in output
        assert call(*changed[:-2], "seed=1", "out=t")[0] == 0
        assert (samples(tmp_path / "s") == samples(tmp_path / "t")).all()


@pytest.mark.parametrize("about", ["", "{", '{"model": "another"}', "null", "[1]"])
def test_images_of_an_unknown_sampling_are_not_lost_either(run, call, tmp_path, about):
    begin = ["sample", f"checkpoint={run}", *QUICK, "num_images=12", "batch_size=4", "out=s"]
    other = tmp_path / "s" / ".batches"
    other.mkdir(parents=True)
    if about:
        (other / "about.json").write_text(about)
    np.savez(other / "images_00000000_4.npz", images=np.zeros((4, 8, 8, 1), np.uint8), work=4)
    status, output = call(*begin)
    assert status == 2 and "out=s holds 4 images of another sampling: its record, about.json, cannot be read" in output
    assert (other / "images_00000000_4.npz").exists()
    assert call(*begin, "overwrite=true")[0] == 0
    assert samples(tmp_path / "s")[:4].any()


def test_batches_of_the_former_program_are_used(run, call, stopped, tmp_path):
    """They hold no batch size of their own; it was in about.json, as was every batch's beginning in its name."""
    words = ["sample", f"checkpoint={run}", *QUICK, "num_images=40", "out=s"]
    stopped(20, *words, "batch_size=10")
    folder = tmp_path / "s" / ".batches"
    about = json.loads((folder / "about.json").read_text())
    del about["model"]["step"]
    about["sampling"]["batch_size"] = 10
    (folder / "about.json").write_text(json.dumps(about, sort_keys=True))
    for path in folder.glob("images_*.npz"):
        with np.load(path) as old:
            arrays = {name: old[name] for name in ("images", "work")}
        np.savez(path, **arrays)
    status, output = call(*words, "batch_size=20")
    assert status == 0 and "20 of them existed" in output and "Batch sizes 10 and 20 were mixed" in output, output


def test_steps_are_recorded_as_they_are_asked_for_and_a_former_record_goes_on(run, call, stopped, tmp_path):
    """Levels, and their visits beside; former versions said six steps of three levels that are visited twice."""
    words = ["sample", f"checkpoint={run}", "num_images=20", "out=s", "trainer.accelerator=cpu", "batch_size=8"]
    words += ["sampler=predictor_corrector", "sampler.num_steps=3"]
    stopped(8, *words)
    path = tmp_path / "s" / ".batches" / "about.json"
    about = json.loads(path.read_text())
    assert (about["sampling"]["num_steps"], about["sampling"]["visits"], len(about["sampling"]["times"])) == (3, 2, 7)
    about["sampling"]["num_steps"] = 6
    path.write_text(json.dumps(about, sort_keys=True))
    status, output = call(*words)
    assert status == 0 and "predictorcorrector, 3 steps of 2 visits" in output and "8 of them existed" in output
    scored = ["evaluate", f"checkpoint={run}", *words[4:], "num_images=20", "metrics=[fid]", "out=r.jsonl"]
    assert call(*scored)[0] == 0
    found = rows(tmp_path / "r.jsonl")["fid"]
    assert (found["num_steps"], found["visits"], found["nfe"]) == (3, 2, 6)


def test_of_a_sampler_that_looks_at_the_batch_the_batch_size_decides(run, call, stopped):
    norms = lambda kind: lambda levels: LangevinCorrector(levels, norms=kind)  # noqa: E731
    known = {kind: PredictorCorrector(ve_geometric(10), LangevinCorrector, norms(kind)) for kind in ("batch", "image")}
    assert known["batch"].of_batch and not known["image"].of_batch
    words = ["sample", f"checkpoint={run}", "num_images=20", "out=s", "trainer.accelerator=cpu"]
    words += ["sampler=predictor_corrector", "sampler.num_steps=3", "sampler.corrector.norms=batch"]
    stopped(8, *words, "batch_size=4")
    status, output = call(*words, "batch_size=5")
    assert status == 2 and "another sampling: batch_size: was 4, is 5. Give" in output, output


def test_what_fails_before_the_first_image_leaves_nothing(run, stopped, tmp_path):
    stopped(0, "sample", f"checkpoint={run}", *QUICK, "num_images=4", "out=a/b")
    assert not any(tmp_path.iterdir())


# ---- evaluate ----


def test_an_evaluation_goes_on_in_other_batches_and_the_record_says_so(run, call, stopped, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    words = ["evaluate", "checkpoint=run", *QUICK, "num_images=40", "metrics=[fid]", "neighbours=0", "out=a.jsonl"]
    stopped(30, *words, "batch_size=10")
    status, output = call(*words, "batch_size=16")
    assert status == 0 and "30 of them existed" in output and "Batch sizes 10 and 16 were mixed" in output, output
    assert call(*words[:-1], "batch_size=16", "out=b.jsonl")[0] == 0
    a, b = (rows(tmp_path / f"{name}.jsonl")["fid"] for name in "ab")
    assert a["batch_size"] == b["batch_size"] == 16
    assert a["batch_sizes"] == "10 and 16" and "batch_sizes" not in b
    assert a["value"] == pytest.approx(b["value"], rel=0.02) and a["nfe"] == b["nfe"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "run"]


def test_samples_of_another_sampling_are_refused_and_replaced_on_request(run, call, stopped, tmp_path):
    words = ["evaluate", f"checkpoint={run}", *QUICK, "num_images=20", "metrics=[fid]", "neighbours=0"]
    words += ["batch_size=10", "samples=s", "out=a.jsonl"]
    stopped(10, *words)
    status, output = call(*words, "seed=1")
    message = (
        "samples=s holds 10 images of another sampling: seed: was 0, is 1. Give the same settings, another folder, "
    )
    assert status == 2 and f"error: {message}or overwrite=true." in output, output
    status, output = call(*words, "seed=1", "overwrite=true")
    assert status == 0 and "samples=s: 10 images of another sampling are removed: seed: was 0, is 1." in output, output
    status, output = call(*words, "seed=1")
    assert status == 2 and "samples=s already holds samples.npz, grid.png" in output and "overwrite=true" in output
    assert call(*words, "seed=1", "overwrite=true")[0] == 0


def test_an_evaluation_that_ends_while_it_writes_its_samples_keeps_its_rows_once(run, call, tmp_path, monkeypatch):
    words = ["evaluate", f"checkpoint={run}", *QUICK, "num_images=20", "metrics=[fid]", "neighbours=0"]
    words += ["batch_size=10", "samples=s", "out=a.jsonl"]

    def full(gallery, path):
        raise ValueError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "write_npz", full)
        assert call(*words)[0] == 2
    status, output = call(*words)
    assert status == 0 and "20 of them existed" in output, output
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1 and len(samples(tmp_path / "s")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "s"]


def test_features_of_another_extractor_are_worked_out_from_the_same_images(run, digits, call, stopped, tmp_path):
    """Those of the images that are there already, and of others, in batches of another size."""
    (tmp_path / "other").mkdir()
    words = ["evaluate", f"checkpoint={run}", *QUICK, "num_images=30", "metrics=[fid]", "neighbours=0", "out=a.jsonl"]
    stopped(20, *words, "batch_size=10", "samples=s")
    for path in (tmp_path / "s" / ".batches").glob("features_00000010_*"):
        path.unlink()
    status, output = call(*words, "batch_size=30", "samples=s")
    assert status == 0 and "20 of them existed" in output and "features: 30 images" in output, output
    assert call(*words[:-1], "batch_size=10", "out=b.jsonl")[0] == 0
    a, b = (rows(tmp_path / f"{name}.jsonl")["fid"] for name in "ab")
    assert a["value"] == pytest.approx(b["value"], rel=1e-3)


def test_a_likelihood_goes_on_in_other_batches(run, call, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    words = ["evaluate", "checkpoint=run", "trainer.accelerator=cpu", "metrics=[bits_per_dim]", "likelihood.by=ode"]
    words += ["likelihood.tolerance=0.1", "likelihood.num_images=7", "out=a.jsonl"]
    measure, left = Bits.measure, [2]

    def twice(bits, numbers):
        if not left[0]:
            raise ValueError("stopped here")
        left[0] -= 1
        return measure(bits, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(Bits, "measure", twice)
        assert call(*words, "likelihood.batch_size=2")[0] == 2
    status, output = call(*words, "likelihood.batch_size=3")
    assert status == 0 and "likelihood: batch sizes 2 and 3 were mixed" in output, output
    assert "4 of them existed" in output
    assert call(*words[:-1], "likelihood.batch_size=3", "out=b.jsonl")[0] == 0
    a, b = (rows(tmp_path / f"{name}.jsonl")["bits_per_dim"] for name in "ab")
    assert a["value"] == pytest.approx(b["value"], rel=0.02) and a["num_images"] == 7
    assert a["batch_sizes"] == "2 and 3" and a["batch_size"] == 3 and "batch_sizes" not in b


def test_the_room_of_a_likelihood_is_asked_for_with_and_without_a_folder_for_samples(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint={run}", *QUICK, "metrics=[fid,bits_per_dim]", "num_images=30", "out=a.jsonl"]
    rooms = {name: evaluation(composed("evaluate", [*words, *more])).rooms() for name, more in
             (("plain", []), ("kept", ["samples=s"]))}  # fmt: skip
    likelihood = 8 * (2 + 3 * 1000) * 1797  # float64 terms of every level
    (plain,), (samples, other) = rooms["plain"], rooms["kept"]
    assert plain.what == "30 images and the likelihood of 1,797 images" and plain.needs > likelihood
    kept = ("samples", "30 images", plain.needs - likelihood + 30 * 64)
    assert (samples.key, samples.what, samples.needs) == kept
    assert (other.key, other.what, other.needs) == ("out", "the likelihood of 1,797 images", likelihood)


def test_terms_of_another_likelihood_are_not_called_images_of_a_sampling(tmp_path, capsys):
    def pieces(about):
        return Pieces(tmp_path / "p", about, Ranks(), 4, 2, what=MEASURED)

    with pieces("a") as first:
        first.write(KIND, first.missing(KIND)[0], {"x": np.zeros(2)})
    with pieces("b") as second:
        assert len(second.missing(KIND)) == 2
    assert ": 2 images measured in another way are removed: it was made in another way." in capsys.readouterr().out


# ---- a run's own ----


def test_a_run_that_goes_on_with_another_sampler_says_what_it_begins_anew(digits, call, stopped, tmp_path):
    words = ["trainer=cpu", "trainer.max_steps=2", "data.batch_size=16", f"data.root={digits}", "run_dir=run"]
    words += ["callbacks.score.num_images=30", "callbacks.score.batch_size=10", "callbacks.grid.num_images=10"]
    words += ["sampler.num_steps=3", "callbacks.score.every_steps=0", "callbacks.grid.every_steps=0"]
    made, sample = [0], Sampling.images

    def limited(sampling, numbers):
        made[0] += 1
        if made[0] > 3:
            raise ValueError("stopped here")
        return sample(sampling, numbers)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sampling, "images", limited)
        assert call("train", *words)[0] == 1
    folder = tmp_path / "run" / "evaluations"
    assert {p.name for p in folder.iterdir()} == {"score_00000002_final"}
    changed = [word.replace("num_steps=3", "num_steps=4") for word in words]
    status, output = call("train", *changed)
    expected = "images of another sampling are removed: sampler.num_steps: was 3, is 4."
    assert status == 0 and f"score_00000002_final: 20 {expected}" in output, output
    assert not folder.exists() and not (tmp_path / "run" / ".lock").exists()


# ---- two at once, and what a hostile folder holds ----


def test_a_second_process_is_told_who_works_there(run, call, stopped, tmp_path):
    words = ["sample", f"checkpoint={run}", *QUICK, "num_images=20", "batch_size=10", "out=s"]
    stopped(10, *words)
    code = "import sys, time; from diffusion.files import locked\n"
    code += "with locked(sys.argv[1], 'x'): print(flush=True); time.sleep(60)"
    lock = tmp_path / "s" / ".batches.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        status, output = call(*words)
        assert status == 2 and f"out=s is in use by another process (process {holder.pid} on " in output, output
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert call(*words)[0] == 0 and not lock.exists()


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_its_target_left_alone(run, call, tmp_path, kind):
    lock, victim = tmp_path / "s" / ".batches.lock", tmp_path / "victim"
    lock.parent.mkdir()
    victim.write_text("precious")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim if kind == "link" else tmp_path / "new")
    status, output = call("sample", f"checkpoint={run}", *QUICK, "num_images=4", "out=s")
    assert status == 2 and f"out=s: {lock.relative_to(tmp_path)} is not a regular file" in output, output
    assert victim.read_text() == "precious" and not (tmp_path / "new").exists()
    assert [p.name for p in lock.parent.iterdir()] == [lock.name]
