"""A run that is logged to W&B, stopped by a signal and resumed: what its files hold, and that training is the same."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, inside

from diffusion.runs.folder import RunFolder
from diffusion.runs.recorded import Recorded

STEPS, SAVED, EVERY = 60, 6, 4
pytestmark = pytest.mark.slow

TRAINING = [
    f"trainer.max_steps={STEPS}", f"save.every_steps={SAVED}", f"log_every={EVERY}", "data.batch_size=16",
    "trainer.threads=1",
]  # fmt: skip
LOOKING = [
    "sampler.num_steps=2", "callbacks.grid.every_steps=6", "callbacks.grid.num_images=10",
    "callbacks.score.num_images=20", "metrics=[fid]", "+paper={fid: 3.17}",
]  # fmt: skip


def records(path: Path):
    """The records of a .wandb file: blocks of 32 KiB, in them pieces with a header of CRC, length and kind."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # too little for a header: padding
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == crc
        position += 7 + length
        whole = piece if kind in (1, 2) else whole + piece  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def history(record) -> dict:
    """One row, as it was logged."""
    row: dict = {}
    for item in record.history.item:
        *outer, name = item.nested_key or [item.key]
        place = row
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return row


class Files:
    """What the .wandb files of a run folder hold, in the order of their processes."""

    def __init__(self, folder: Path) -> None:
        import wandb

        wandb.teardown()  # as at the end of a process: its own has then written all
        self.paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        self.records = [list(records(p)) for p in self.paths]

    def all(self, kind: str) -> list:
        return [r for found in self.records for r in found if r.WhichOneof("record_type") == kind]

    def rows(self) -> list[dict]:
        return [history(r) for r in self.all("history")]


def train(words, cwd, **environment) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SLURM_"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(cwd), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion.train", *words],
        cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen, status: int) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def logged(digits, tmp_path_factory):
    """(folder, what its two processes printed): stopped by SIGTERM after a checkpoint, then resumed to its end."""
    cwd = tmp_path_factory.mktemp("wandb")
    words = [*TRAINING, *LOOKING, f"data.root={digits}", "run_dir=logged run", "logger=wandb", "logger.tags=[a,b]"]
    folder = cwd / "logged run"
    process, end = train(words, cwd), time.monotonic() + 120
    while not (folder / "checkpoints" / f"step_{SAVED:08d}.ckpt").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    first = ended(process, 128 + signal.SIGTERM)
    return folder, first, ended(train(words, cwd), 0)


def test_it_says_where_the_run_is_and_how_to_upload_it(logged):
    folder, *outputs = logged
    for output in outputs:
        assert output.count("W&B") == 1
        assert "W&B: offline in logged run/wandb. To upload it: wandb sync 'logged run/wandb'/offline-run-*" in output


def test_both_processes_belong_to_one_run(logged):
    folder = logged[0]
    files = Files(folder)
    assert len(files.paths) == 2
    run_id = (folder / "wandb" / "run_id").read_text().strip()
    runs = files.all("run")
    assert {r.run.run_id for r in runs} == {run_id}
    for record in (next(r for r in found if r.HasField("run")) for found in files.records):
        run = record.run
        assert run.resume and run.project == "diffusion" and list(run.tags) == ["a", "b"]
        assert run.display_name == "logged run"
        config = {u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"}
        assert config == yaml.safe_load((folder / "config.yaml").read_text())


def test_its_rows_are_those_of_metrics_csv_each_step_once(logged):
    folder = logged[0]
    rows = Files(folder).rows()
    steps = [r["step"] for r in rows]
    assert steps == sorted(set(steps)) and steps == [r["_step"] for r in rows]
    numbers = ("train/", "eval/")
    ours = {r["step"]: {k: v for k, v in r.items() if k.startswith(numbers)} for r in rows}
    with open(folder / "metrics.csv", newline="") as f:
        theirs = {int(r["step"]): {k: float(v) for k, v in r.items() if k != "step" and v} for r in csv.DictReader(f)}
    assert set(theirs) == set(range(EVERY, STEPS + 1, EVERY))
    for step, row in theirs.items():
        assert ours[step] == pytest.approx(row, rel=1e-6)
    assert not any(row for step, row in ours.items() if step not in theirs)


def test_its_step_is_the_axis_of_everything(logged):
    for found in Files(logged[0]).records:
        metrics = [r.metric for r in found if r.HasField("metric")]
        assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)


def test_the_grids_are_there_as_they_were_saved(logged):
    folder = logged[0]
    rows = [r for r in Files(folder).rows() if "samples" in r]
    saved = {int(p.stem.removeprefix("step_")): p.read_bytes() for p in folder.glob("samples/step_*.png")}
    assert [r["step"] for r in rows] == sorted(saved)
    assert STEPS in saved and len(saved) >= 3
    for row in rows:
        copies = [p.parent / "files" / row["samples"]["path"] for p in Files(folder).paths]
        assert saved[row["step"]] in [p.read_bytes() for p in copies if p.is_file()]


def test_the_score_stands_beside_the_papers_value(logged):
    folder = logged[0]
    value = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])["value"]
    summary: dict = {}
    for record in Files(folder).all("summary"):
        summary |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in record.summary.update}
    assert summary["eval/fid"] == value and summary["paper/fid"] == 3.17


def test_a_stop_ends_its_file_with_the_status(logged):
    first, second = Files(logged[0]).records
    assert [r.exit.exit_code for r in first if r.HasField("exit")] == [128 + signal.SIGTERM]
    assert any(r.HasField("preempting") for r in first)
    assert [r.exit.exit_code for r in second if r.HasField("exit")] == [0]


def test_training_is_the_same_to_the_bit_without_it(logged, digits, tmp_path):
    words = [*TRAINING, "callbacks=none", f"data.root={digits}", "run_dir=plain"]
    assert inside("train", words, tmp_path) == 0
    last = Path("checkpoints", "last.ckpt")
    ours, theirs = (torch.load(run / last, weights_only=True) for run in (logged[0], tmp_path / "plain"))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for kind in ("state_dict", "ema"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(v, theirs[kind][k]) for k, v in ours[kind].items())
    assert not (tmp_path / "plain" / "wandb").exists()


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No W&B settings, no key, an empty home."""
    for key in [k for k in os.environ if k.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = dict(os.environ)
    yield monkeypatch
    import wandb

    wandb.teardown()
    for key in set(os.environ) - set(before):
        del os.environ[key]


def made(folder: Path, **settings):
    from diffusion.runs.folder import RunFolder
    from diffusion.training.logger import Wandb

    return Wandb(RunFolder(folder), **{"project": "p", **settings})


@pytest.mark.parametrize(
    "settings, environment, message",
    [
        ({"mode": "online"}, {}, "logger.mode=online needs a key.*logger.mode=offline"),
        ({}, {"WANDB_MODE": "online"}, "WANDB_MODE=online needs a key"),
        ({}, {"WANDB_MODE": "shared"}, "WANDB_MODE=shared must be one of online"),
        ({}, {"WANDB_API_KEY": "short"}, "logger.mode=auto: WANDB_API_KEY invalid"),
        ({"project": "a/b"}, {}, "logger.project=a/b"),
        ({"entity": ["a"]}, {}, "logger.entity=.* is not text"),
    ],
    ids=["no key", "no key, by environment", "unknown mode", "malformed key", "malformed project", "malformed entity"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(settings, environment, message, clean, tmp_path):
    for key, value in environment.items():
        clean.setenv(key, value)
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mode, environment, expected",
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_API_KEY": "k" * 40}, "offline"),
    ],
)
def test_the_mode_follows_the_key_and_the_environment(mode, environment, expected, clean, tmp_path):
    for key, value in environment.items():
        clean.setenv(key, value)
    assert made(tmp_path / "run", mode=mode).mode == expected


class Refusing(BaseHTTPRequestHandler):
    """A server that knows nobody."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "who are you"}]}')

    do_GET = do_POST

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def refusing():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_refuses_leaves_an_offline_run(refusing, clean, tmp_path):
    clean.setenv("WANDB_BASE_URL", refusing)
    clean.setenv("WANDB_API_KEY", "k" * 40)
    logger, said = made(tmp_path), []
    assert logger.mode == "online"
    logger.start(said.append, Recorded({"name": "x"}, "here"))
    for step in (10, 20):
        logger.log_metrics({"train/loss": 1 / step}, step)
    logger.close(0)
    assert "W&B cannot be reached or refuses" in said[0] and "who are you" in said[0]
    assert "offline" in said[1] and len(said) == 2
    assert [(r["step"], r["train/loss"]) for r in Files(tmp_path).rows()] == [(10, 0.1), (20, 0.05)]


def test_a_failure_of_its_process_is_said_once_and_raises_nothing(clean, tmp_path):
    logger, said = made(tmp_path), []
    logger.start(said.append, Recorded({"name": "x"}, "here"))
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(p) for c in children for p in c.read_text().split()]
    core = next(p for p in pids if Path(f"/proc/{p}/comm").read_text().strip() == "wandb-core")
    os.kill(core, signal.SIGKILL)
    end = time.monotonic() + 60
    step = 0
    while len(said) == 1 and time.monotonic() < end:
        step += 1
        logger.log_metrics({"train/loss": 1.0}, step)
        time.sleep(0.01)
    logger.log_metrics({"train/loss": 1.0}, step + 1)
    logger.log_scores([{"name": "fid", "value": 1.0}], step + 1)
    logger.close(1)
    assert len(said) == 2 and "W&B has failed. The run continues" in said[1]


def test_what_is_left_null_is_taken_from_the_environment(clean, tmp_path):
    clean.setenv("WANDB_ENTITY", "us")
    clean.setenv("WANDB_RUN_GROUP", "ours")
    logger = made(tmp_path)
    logger.start(str, Recorded({"name": "x"}, "here"))
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.close(0)
    run = Files(tmp_path).all("run")[0].run
    assert (run.entity, run.run_group, run.project) == ("us", "ours", "p")


@pytest.mark.slow
def test_after_two_stops_and_a_kill_it_is_one_run_and_little_is_there_twice(digits, tmp_path):
    """Stopped after a save, stopped once more, killed, gone on with: four files of one run. What was stopped is nowhere
    twice; after the kill at most the steps since the last save are, with the same values."""
    words = [*TRAINING, *LOOKING, f"data.root={digits}", "run_dir=run", "logger=wandb"]
    words += ["save.every_steps=5", "log_every=1", "callbacks.grid.every_steps=50", "trainer.max_steps=250"]
    folder, ends = tmp_path / "run", [(5, signal.SIGTERM), (60, signal.SIGTERM), (120, signal.SIGKILL)]
    for step, number in ends:
        process, end = train(words, tmp_path), time.monotonic() + 120
        while not any(saved >= step for saved in RunFolder(folder).steps()):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(1)  # W&B's own process writes what it has once a second
        process.send_signal(number)
        ended(process, -9 if number == signal.SIGKILL else 128 + number)
    ended(train(words, tmp_path), 0)
    files = Files(folder)
    assert len(files.paths) == 4
    assert {r.run.run_id for r in files.all("run")} == {(folder / "wandb" / "run_id").read_text().strip()}
    for found in files.records:
        run = next(r.run for r in found if r.HasField("run"))
        config = {u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"}
        assert config == yaml.safe_load((folder / "config.yaml").read_text())
    rows = [[history(r) for r in found if r.HasField("history")] for found in files.records]
    losses = [{r["step"]: r["train/loss"] for r in part if "train/loss" in r} for part in rows]
    graceful = [step for part in losses[:3] for step in part]
    assert len(graceful) == len(set(graceful))
    lost = set(range(1, 251)) - {step for part in losses for step in part}  # of the kill's last second, if any
    assert lost <= set(range(max(losses[2]) + 1, min(losses[3])))
    twice = losses[2].keys() & losses[3].keys()
    assert len(twice) <= 5 and all(losses[2][step] == losses[3][step] for step in twice)
    pictures = {r["step"] for part in rows for r in part if "samples" in r}
    assert pictures == {int(p.stem.removeprefix("step_")) for p in folder.glob("samples/step_*.png")}
