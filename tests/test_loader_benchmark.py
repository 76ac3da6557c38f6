"""The benchmark of the loader: what is counted is what was done, all sides hand out the same, and the bars judge."""

import io
import json
import math
import multiprocessing
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffusion.benchmark import loader as benchmark
from diffusion.benchmark import loader_peers as peers
from diffusion.benchmark import loader_sides
from diffusion.benchmark.loader import BARS, Comparison, Side, compare
from diffusion.benchmark.loader_images import photo, write_photos
from diffusion.data.shards.samples import decode_image
from diffusion.data.shards.writer import ShardWriter

TINY = ["loader.rounds=1", "loader.batches=4", "loader.batch_size=4", "loader.cifar_images=256"]
TINY += ["loader.images=24", "loader.image_size=16"]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


# ---- the task ----


def of_file(status, output, path):
    """The figures file of a run, held against its exit status and what it printed."""
    found = json.loads(path.read_text())
    assert status == (0 if found["holds"] else 1)
    assert found["holds"] == all(row["holds"] for row in found["rows"])
    assert output.count("FAILED") == sum(not row["holds"] for row in found["rows"])
    for row in found["rows"]:
        line = next(line for line in output.splitlines() if f"{row['figure']}, {row['unit']}; {row['peer']} " in line)
        assert f"{row['ratio']:.2f}" in line and row["bar"] in line
        assert row["ratios"][0] <= row["ratio"] <= row["ratios"][1]
    return found


@pytest.mark.slow
def test_the_whole_task_on_made_images(call, tmp_path):
    status, output = call("benchmark", "task=loader", "out=figures.json", *TINY, "loader.rounds=4")
    found = of_file(status, output, tmp_path / "figures.json")
    assert [(row["figure"], row["peer"]) for row in found["rows"]] == [
        ("photos, CPU time per image", "torch's DataLoader, bytes in memory"),
        ("photos", "torch's DataLoader, bytes in memory"),
        ("photos", "webdataset"),
        ("small, cached, no workers", "rows of a tensor"),
    ]
    assert found["left_out"] == ["mosaicml"] and "bash launch/loader_peers.sh" in output
    assert {side: len(rounds) for side, rounds in found["photos"].items()} == dict.fromkeys(loader_sides.SIDES, 4)
    assert all(len(about["workers"]) == 2 for about in found["sides"].values())
    assert all(0 < w["pss"] <= w["rss"] for about in found["sides"].values() for w in about["workers"])
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"] and not multiprocessing.active_children()


def test_on_a_set_of_ones_own_with_labels_and_without_workers(digits, call, tmp_path):
    own = [f"loader.root={digits}", f"loader.cifar_root={digits}", "loader.num_workers=0"]
    status, output = call("benchmark", "task=loader", "out=figures.json", *TINY[:-1], *own)
    found = of_file(status, output, tmp_path / "figures.json")
    assert len(found["rows"]) == 4 and "of 8x8 in 1 shard, " in output and "as no workers are used" in output


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.is_file(), reason="needs the environment that launch/loader_peers.sh makes")
def test_mosaicml_streaming_has_its_row(call, tmp_path):
    status, output = call("benchmark", "task=loader", "out=f.json", f"loader.peers_python={PEERS_PYTHON}", *TINY)
    found = of_file(status, output, tmp_path / "f.json")
    assert len(found["rows"]) == 5 and found["left_out"] == []
    assert found["rows"][3]["peer"] == "MosaicML streaming" and len(found["photos"]["mosaicml"]) == 1


@pytest.mark.parametrize(
    "words, mentions",
    [
        (
            ["loader.peers_python=" + sys.executable],
            ["not have MosaicML streaming", "bash launch/loader_peers.sh"],
        ),
        (["loader.peers_python=/no/such/python"], ["loader.peers_python=/no/such/python", "No such file"]),
        (["loader.root=nowhere"], ["loader.root=nowhere", "does not exist"]),
        (["loader.cifar_root=nowhere"], ["loader.cifar_root=nowhere", "does not exist"]),
        (["loader.rounds=0"], ["loader.rounds=0", "at least 1"]),
        (["loader.cifar_images=100"], ["loader.cifar_images=100", "at least 128"]),
    ],
)
def test_wrong_words_are_refused(words, mentions, call, tmp_path):
    status, output = call("benchmark", "task=loader", *words)
    assert status == 2 and output.count("error:") == 1 and all(m in output for m in mentions)
    assert "data.root" not in output.partition("Make it with")[0] and not any(tmp_path.iterdir())


# ---- the bars ----


def test_a_figure_is_the_median_of_the_ratios_of_each_alternation():
    """Ours and theirs slow down together in the second alternation: 1.1, 1.0, 1.3, where the medians' ratio is 1."""
    measured = {
        "ours": [{"images_per_second": r} for r in (110, 50, 130)],
        "webdataset": [{"images_per_second": r} for r in (100, 50, 100)],
    }
    found = compare(BARS[2], measured)
    assert (found.ours, found.theirs) == (110, 100)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.1, 1.0, 1.3))


@pytest.mark.parametrize(
    "bar, ratio, holds",
    [(0, 1.08, True), (0, 1.09, False), (1, 0.9, True), (1, 0.89, False), (2, 1.0, True), (2, 0.99, False),
     (3, 1.0, True), (3, 0.99, False), (4, 0.5, True), (4, 0.49, False), (0, math.nan, False), (1, math.nan, False)],
)  # fmt: skip
def test_bars_judge(bar, ratio, holds):
    found = Comparison(BARS[bar], ratio, 1.0, ratio, ratio, ratio)
    assert found.holds == holds and ("FAILED" in found.line()) != holds and found.row()["holds"] == holds


@pytest.mark.parametrize(
    "rate, status, said", [(100.0, 0, "All limits are met."), (10.0, 1, "Not all limits are met.")]
)
def test_exit_status(rate, status, said, call, monkeypatch):
    def played(side_rates):
        return {side: [{"images_per_second": r, "cpu_ms": 1.0}] for side, r in side_rates.items()}

    about = {"ours": {"workers": []}}
    photos = played({"ours": rate, "memory": 100.0, "webdataset": 50.0})
    monkeypatch.setattr(benchmark, "run_photos", lambda *_: (photos, about))
    monkeypatch.setattr(benchmark, "run_small", lambda *_: played({"ours": 60.0, "tensor": 100.0}))
    found, output = call("benchmark", "task=loader")
    assert (found, said in output) == (status, True)
    assert output.count("FAILED") == 2 * status


def test_turns_make_an_alternation_and_sides_take_turns():
    assert [benchmark.turns(n) for n in (1, 8, 20)] == [[1], [8], [8, 8, 4]]
    assert [benchmark.in_turn(["a", "b", "c"], n) for n in (0, 1, 2)] == [list("abc"), list("cba"), list("abc")]


# ---- what is counted ----

BURN = """
import sys, time
while time.process_time() < 0.4:
    pass
print(time.process_time(), flush=True)
sys.stdin.read()
"""


def test_cpu_time_of_another_process_is_what_it_says_itself():
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        own = float(process.stdout.readline())  # and now it waits
        found = peers.cpu_seconds(process.pid)
        process.stdin.close()
    assert own <= found < own + 0.1
    with pytest.raises(OSError, match=str(process.pid)):
        peers.cpu_seconds(process.pid)


class Costly(Dataset):
    """Images of a known cost: each takes 10 ms of the CPU of the process that makes it, and is counted."""

    def __init__(self, made):
        self.made = made

    def __len__(self):
        return 1 << 20

    def __getitem__(self, number):
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        with self.made.get_lock():
            self.made.value += 1
        return {"image": torch.zeros(1, dtype=torch.uint8)}


@pytest.mark.parametrize("num_workers, prefetch", [(0, 0), (2, 2), (1, 4)])
def test_as_many_are_decoded_between_two_rests_as_are_counted(num_workers, prefetch):
    made = multiprocessing.Value("q", 0)
    workers = {"num_workers": num_workers, "multiprocessing_context": "fork", "prefetch_factor": prefetch}
    loader = DataLoader(Costly(made), batch_size=2, **(workers if num_workers else {}))
    ahead = num_workers * prefetch
    watch = peers.Stopwatch(loader, ahead)
    for batches in (1, 5):
        before = made.value
        counted = watch.measure(batches)
        assert counted["decoded"] == made.value - before == 2 * (ahead + batches)
        assert counted["images"] == 2 * batches
        assert 0.01 <= counted["cpu_seconds"] / counted["decoded"] < 0.02
    assert len(watch.memory()) == num_workers


# ---- the sides ----


def encoded(image, kind):
    file = io.BytesIO()
    if kind == "NPY":
        np.save(file, np.asarray(image).transpose(2, 0, 1) if image.mode == "RGB" else np.asarray(image)[None])
    else:
        image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "NPY"])
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_the_other_environment_decodes_the_same(kind, mode, channels):
    data = encoded(Image.open(io.BytesIO(photo(0, 32))).convert(mode), kind)
    np.testing.assert_array_equal(peers.decode(data, channels, 32), decode_image(data, channels, 32))


def test_peers_are_given_the_bytes_that_were_stored(tmp_path):
    images = [photo(i, 16) for i in range(5)]
    with ShardWriter(tmp_path, "set", 16, 3, 7, max_samples=2) as writer:
        for i, image in enumerate(images):
            writer.write(image, (3 * i) % 7, extension="jpg")
    tars = sorted(tmp_path.glob("*.tar"))
    assert len(tars) == 3
    assert list(peers.stored(tars)) == [(image, (3 * i) % 7) for i, image in enumerate(images)]
    assert peers.label_of({"json": b'{"label": 4}'}) == 4 and peers.label_of({}) == 0


@pytest.mark.parametrize("name", loader_sides.SIDES)
def test_every_side_hands_out_the_images_of_the_set(name, tmp_path):
    write_photos(tmp_path, 24, 16)
    settings = {"root": str(tmp_path), "tars": [str(p) for p in sorted(tmp_path.glob("*.tar"))], "images": 24}
    settings |= {"channels": 3, "image_size": 16, "batch_size": 6, "num_workers": 0, "seed": 0, "total": 240}
    known = {decode_image(photo(i, 16), 3, 16).tobytes() for i in range(24)}
    batches = iter(loader_sides.SIDES[name](settings))
    found = [image.numpy().tobytes() for _ in range(4) for image in next(batches)["image"]]
    assert len(known) == 24 and set(found) <= known
    if name != "webdataset":  # which draws shards with replacement
        assert set(found) == known


def test_as_many_whole_shards_as_hold_the_images(tmp_path):
    write_photos(tmp_path, 24, 16)  # shards of three
    assert [len(loader_sides.subset(tmp_path, n).shards) for n in (1, 3, 4, 24, 1000)] == [1, 1, 2, 8, 8]


def test_a_side_that_fails_says_why(tmp_path):
    with Side([sys.executable, "-c", "import sys; sys.exit('no such thing')"], tmp_path / "log") as side:
        with pytest.raises(RuntimeError, match="exit 1\nno such thing"):
            side.ask()
    settings = {"side": "ours", "root": str(tmp_path / "nowhere"), "images": 1}
    command = [sys.executable, "-m", "diffusion.benchmark.loader_sides", json.dumps(settings)]
    with pytest.raises(RuntimeError, match="nowhere: data set not found, the folder does not exist"):
        with Side(command, tmp_path / "log") as side:
            side.ask()
    assert side.process.poll() is not None


# ---- the images and the environment ----


def test_photos_weigh_what_photos_do():
    sizes = [len(photo(i, 256)) for i in range(16)]
    assert 20_000 < min(sizes) and max(sizes) < 40_000
    assert photo(3, 64) == photo(3, 64) != photo(4, 64)


def test_both_environments_have_the_same_decoder_and_the_same_torch():
    def pinned(name):
        return dict(re.findall(r"^(torch|pillow)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))

    assert len(pinned("requirements.lock")) == 2
    assert pinned("requirements.lock") == pinned("requirements-peers.lock")
