"""A file of a run folder that is damaged, edited by hand or gone: named if it matters, and what is sound is used.

The whole matrix, every kind of damage on every file for every command, is `FULL_SIZE=1 pytest -m slow
tests/test_damage.py`; the suite takes every kind and every file, each with one of the commands.
"""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from conftest import inside

from diffusion.runs.folder import RunFolder, differences

WORDS = "trainer=cpu data.batch_size=16 model.blocks_per_level=1 schedule.num_timesteps=6 sampler.num_steps=2".split()
WORDS += ["save.every_steps=1", "log_every=1", "metrics=[fid]", "callbacks.score.num_images=10", "seed=3"]
WORDS += ["callbacks.grid.num_images=10", "fingerprint_every=1", "run_dir=run"]
STOPPED, STEPS = 3, 4
NEWEST, BEFORE = f"step_{STOPPED:08d}", f"step_{STOPPED - 1:08d}"


# ---- damage ----


def halved(data):
    return data[: len(data) // 2]


def cut(data):
    return data[:-3]


def flipped(data):
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]


def zeroed(data):
    start = len(data) // 3
    return data[:start] + bytes(min(64, len(data) - start)) + data[start + 64 :]


def appended(data):
    return data + b"{'a': [1, 2\n\x00\xff\n"


KINDS = {
    "empty": lambda data: b"", "halved": halved, "cut": cut, "flipped": flipped, "zeroed": zeroed,
    "appended": appended, "binary": lambda data: bytes(range(256)) * 8, "another's": lambda data: b'[1, {"a": null}]\n',
    "one long line": lambda data: b"9" * 300_000,
}  # fmt: skip
PLACES = ("gone", "folder", "link", "pipe")
FILES = (
    "config.yaml", f"checkpoints/{NEWEST}.ckpt", f"checkpoints/{NEWEST}.sha256", "checkpoints/last.ckpt",
    "metrics.csv", "results.jsonl", "report.html", f"samples/{NEWEST}.png", f"samples/film_{NEWEST}.png",
    "fingerprints/rank_0000.csv",
)  # fmt: skip
COMMANDS = {
    "train": ["+experiment=digits", *WORDS, f"trainer.max_steps={STEPS}"],
    "report": ["run_dir=run"],
    "evaluate": ["checkpoint=run", "metrics=[fid]", "num_images=10", "batch_size=10", "sampler.num_steps=2"],
    "sample": ["checkpoint=run", "out=out", "num_images=10", "batch_size=10", "sampler.num_steps=2"],
}
WHERE_A_FILE_BELONGS = ("report.html", "metrics.csv", "results.jsonl")  # a folder of that name is in the way


def harm(path, kind):
    if kind in KINDS:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(KINDS[kind](data))
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)


def cases():
    kinds = [*KINDS, *PLACES]
    for f, file in enumerate(FILES):
        for k, kind in enumerate(kinds):
            for c, command in enumerate(COMMANDS):
                if os.environ.get("FULL_SIZE") or (f + k) % len(COMMANDS) == c:
                    yield pytest.param(file, kind, command, id=f"{file}-{kind}-{command}".replace(" ", "_"))


# ---- what is to be expected ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the data and `run`, of three steps; and `whole`, the same of four."""
    folder = tmp_path_factory.mktemp("damage")
    words = ["+experiment=digits", *WORDS, "fingerprint_every=1"]
    assert inside("train", [*words, f"trainer.max_steps={STEPS}", "run_dir=whole"], folder) == 0
    assert inside("train", [*words, f"trainer.max_steps={STOPPED}"], folder) == 0
    return folder


@pytest.fixture
def place(runs, tmp_path):
    (tmp_path / "data").symlink_to(runs / "data")
    shutil.copytree(runs / "run", tmp_path / "run", symlinks=True)
    return tmp_path


def weights(run):
    content = torch.load(run / "checkpoints" / f"step_{STEPS:08d}.ckpt", weights_only=True)
    return {**content["state_dict"], **{f"ema {k}": v for k, v in content["ema"].items()}}


def same_weights(run, other):
    ours, theirs = weights(run), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
@pytest.mark.parametrize("file, kind, command", cases())
def test_damage_is_no_traceback_and_what_is_sound_is_used(file, kind, command, place, runs, capfd):
    run, path = place / "run", place / "run" / file
    before = path.read_bytes() if path.is_file() else b""
    harm(path, kind)
    harmed = path.read_bytes() if path.is_file() else b""
    capfd.readouterr()
    status = inside(command, COMMANDS[command], place)
    out, err = capfd.readouterr()
    case = f"{status}\n{out}\n{err}"
    assert "Traceback" not in err and not re.search(r"^error: *$", err, re.M), case
    if status == 2 and kind == "folder":  # something stands where a file belongs
        assert path.name in err, case
        return
    if status == 2 and command == "report" and file == "config.yaml":
        assert "config.yaml" in err, case
        return
    assert status == 0, case
    checkpoint = file.startswith(f"checkpoints/{NEWEST}") and before != harmed
    if command == "train":
        assert same_weights(run, runs / "whole"), case
        rows = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()]
        assert str(STEPS) in rows, case
    if checkpoint and file.endswith(".ckpt") and command in ("train", "evaluate", "sample"):
        source = BEFORE if command != "train" else f"step {STOPPED - 1}"
        assert source in out and (kind == "gone" or f"{NEWEST}.ckpt is not used" in out), case
    if command == "evaluate":
        rows = [json.loads(line) for line in (run / "results.jsonl").read_bytes().splitlines() if sound(line)]
        assert any(row.get("by") == "evaluate" or row.get("num_images") == 10 for row in rows), case
    if file == "results.jsonl" and kind in KINDS and command in ("train", "evaluate"):  # nothing is lost
        assert all(line in (run / "results.jsonl").read_bytes() for line in harmed.split(b"\n") if line.strip()), case
    if file in ("metrics.csv", "config.yaml") and kind == "binary" and command == "train":
        assert (run / f"{file}.damaged").read_bytes() == harmed, case


def sound(line):
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


# ---- single rows ----


def sealed(path):
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")


def changed(run, **values):
    """The newest checkpoint with other content, and the digest that belongs to it."""
    path = run / "checkpoints" / f"{NEWEST}.ckpt"
    content = torch.load(path, weights_only=True)
    for key, value in values.items():
        content[key] = value(content[key])
    torch.save(content, path)
    sealed(path)


def test_the_checkpoint_of_another_run_is_not_used(place, runs, capfd):
    """Of the same shape: what was trained otherwise is known by its settings."""
    run = place / "run"
    changed(run, config=lambda config: config | {"optimizer": config["optimizer"] | {"lr": 1.0}})
    assert inside("train", COMMANDS["train"], place) == 0
    out = capfd.readouterr().out
    assert f"{NEWEST}.ckpt is not used: it belongs to another run (optimizer.lr: was 1.0, is 0.002)" in out
    assert "continuing from step 2" in out and same_weights(run, runs / "whole")


def test_a_checkpoint_with_another_network_is_not_used(place, runs, capfd):
    run = place / "run"
    changed(run, state_dict=lambda state: state | {"network.head.bias": torch.zeros(7)})
    assert inside("train", COMMANDS["train"], place) == 0
    out = capfd.readouterr().out
    assert "it holds another network: network.head.bias has shape (7,), expected (1,)" in out
    assert same_weights(run, runs / "whole")


def test_a_stray_checkpoint_is_no_end_of_the_run(place, runs, capfd):
    run = place / "run"
    for suffix in (".ckpt", ".sha256"):
        shutil.copy(run / "checkpoints" / f"{NEWEST}{suffix}", run / "checkpoints" / f"step_99999999{suffix}")
    assert inside("sample", COMMANDS["sample"], place) == 0
    assert "step_99999999.ckpt is not used: it holds step 3, not step 99999999." in capfd.readouterr().out
    assert inside("train", COMMANDS["train"], place) == 0
    out = capfd.readouterr().out
    assert "99999999 steps" not in out and "continuing from step 3" in out and same_weights(run, runs / "whole")
    assert inside("train", COMMANDS["train"], place) == 0
    assert f"Already complete ({STEPS} steps)" in capfd.readouterr().out


def test_a_damaged_digest_is_not_the_checkpoints_damage(place, runs, capfd):
    for text in (b"", b"\xff\xfe\x00", b"no digest\n"):
        (place / "run" / "checkpoints" / f"{NEWEST}.sha256").write_bytes(text)
        assert inside("sample", [*COMMANDS["sample"], "overwrite=true"], place) == 0
        assert f"{NEWEST}.ckpt (step 3" in capfd.readouterr().out
    (place / "run" / "checkpoints" / f"{NEWEST}.sha256").write_text("0" * 64)
    assert inside("sample", [*COMMANDS["sample"], "overwrite=true"], place) == 0
    assert f"{BEFORE}.ckpt (step 2" in capfd.readouterr().out


@pytest.mark.parametrize("text", [b"a: [1\n", b"\xff\xfe", b"", b"- 1\n", b"data: {image_size: wide}\n"])
def test_a_damaged_config_is_read_from_the_newest_checkpoint(text, place, runs, capfd):
    run = place / "run"
    (run / "config.yaml").write_bytes(text)
    assert inside("train", COMMANDS["train"], place) == 0
    err = capfd.readouterr().err
    assert f"The settings are read from run/checkpoints/{NEWEST}.ckpt." in err and "config.yaml" in err
    assert same_weights(run, runs / "whole") and (run / "config.yaml.damaged").read_bytes() == text
    other = [word.replace("seed=3", "seed=4") for word in COMMANDS["train"]]
    (run / "config.yaml").write_bytes(text)
    assert inside("train", other, place) == 2
    assert "seed: was 3, is 4" in capfd.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_damaged_config_is_named_by_the_first_rank_alone(rank, place, capfd, monkeypatch):
    (place / "run" / "config.yaml").write_bytes(b"")
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert RunFolder(place / "run").config() is not None
    assert ("The settings are read from" in capfd.readouterr().err) == (rank == "0")


def test_lines_that_are_no_results_are_named_once_left_and_not_used(place, capfd):
    run = place / "run"
    odd = [
        "123", "null", '[[{"a": 1}]]', '{"name": "fid", "metric": "FID", "value": NaN}', '{"name": "a", "metric": "x"}',
        '{"name": ["fid"], "metric": "FID", "value": 1}', '{"name": "fid", "metric": "FID", "value": 1, "step": "x"}',
        '{"name": "fid", "metric": "FID", "value": 1, "versions": [1]}',
    ]  # fmt: skip
    path = run / "results.jsonl"
    path.write_text("\n".join(odd) + "\n" + path.read_text())
    assert inside("report", ["runs=.", "out=tables"], place) == 0
    out, err = capfd.readouterr()
    assert (
        "run/results.jsonl: 8 lines, the first of them line 1, are not valid results and are ignored." in err
        and out.count("digits-FID") == 1
    )
    assert inside("train", COMMANDS["train"], place) == 0
    capfd.readouterr()
    assert path.read_text().splitlines()[:8] == odd and '"step": 4' in path.read_text()


def test_a_metrics_csv_with_damaged_lines_is_kept_and_the_sound_rows_are_used(place, capfd):
    run = place / "run"
    path = run / "metrics.csv"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], b"\xff\xfe,1,2", lines[2] + b",1,2,3", *lines[3:]]) + b"\n")
    harmed = path.read_bytes()
    assert inside("report", ["run_dir=run"], place) == 0
    assert "2 damaged lines of metrics.csv" in (run / "report.html").read_text()
    assert inside("train", COMMANDS["train"], place) == 0
    assert "metrics.csv has damaged lines" in capfd.readouterr().err
    assert (run / "metrics.csv.damaged").read_bytes() == harmed
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "1", "3", "4"]


def test_nothing_is_set_aside_because_another_configuration_is_given(place, capfd):
    """Also where config.yaml was edited to fit it."""
    run = place / "run"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 3", "seed: 4"))
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} | {
        name: (run / name).read_bytes() for name in ("metrics.csv", "results.jsonl")
    }
    other = [word.replace("seed=3", "seed=4") for word in COMMANDS["train"]]
    assert inside("train", other, place) == 2
    assert "no checkpoint has this configuration" in capfd.readouterr().err
    for name, content in before.items():
        path = run / "checkpoints" / name if "step" in name or "ckpt" in name else run / name
        assert path.read_bytes() == content


@pytest.mark.parametrize("lines", [20, 60, 100])
def test_a_config_that_is_cut_at_the_end_of_a_line_is_damaged(lines, place, runs, capfd):
    path = place / "run" / "config.yaml"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    assert inside("sample", COMMANDS["sample"], place) == 0
    assert inside("train", COMMANDS["train"], place) == 0
    assert "is missing, which the newest checkpoint has)" in capfd.readouterr().err
    assert same_weights(place / "run", runs / "whole")


def test_what_was_damaged_twice_is_kept_twice(place, capfd):
    path = place / "run" / "metrics.csv"
    for number in (1, 2):
        path.write_bytes(path.read_bytes() + b"\xff\n" * number)
        words = [word.replace(f"max_steps={STEPS}", f"max_steps={STOPPED + number}") for word in COMMANDS["train"]]
        assert inside("train", words, place) == 0
        assert "metrics.csv has damaged lines" in capfd.readouterr().err
    assert (place / "run" / "metrics.csv.damaged").is_file() and (place / "run" / "metrics.csv.damaged.2").is_file()


def test_runs_of_former_versions_that_asked_for_attention_nowhere_go_on():
    old = {"model": {"image_size": 48, "multipliers": [1, 2, 2], "attention_resolutions": [16], "fourier_scale": 8.0}}
    old["model"]["time_embedding"] = "positional"
    new = {"model": old["model"] | {"attention_resolutions": [], "fourier_scale": 16.0}}
    assert differences(old, new) == []
    new["model"] = new["model"] | {"attention_resolutions": [24]}
    assert differences(old, new) == ["model.attention_resolutions: was [], is [24]"]
