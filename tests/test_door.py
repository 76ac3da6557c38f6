"""Nothing runs, is fetched or is written because a file says so: every command and task, given every trick.

The commands and tasks are read from conf/ and from the commands: a later one without an entry here fails, and so does a
new setting that names a file. Each case looks for a file that a command would have made, for requests to a server, for
anything written outside the folders that the user has named, and for a traceback.
"""

import ast
import contextlib
import copy
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_module, inside
from omegaconf import OmegaConf
from test_fuzz import contents

from diffusion.build.extractors import prepare_digits
from diffusion.config.compose import composed
from diffusion.config.composer import conf_dir
from diffusion.config.words import PATH_KEYS

SMALL = "callbacks=none trainer=cpu data.batch_size=16 model.blocks_per_level=1 schedule.num_timesteps=6".split()
SMALL += ["sampler.num_steps=2", "save.every_steps=1", "log_every=1"]
QUICK = ["num_images=10", "sampler.num_steps=2", "batch_size=10"]
ERRORS = ["errors.num_images=4", "errors.times=2", "sampler.num_steps=2"]
EQUIVALENCE = ["equivalence.num_images=2", "equivalence.num_steps=2"]

# What each command and task takes, as (kind of input, words); {evil} is the input, `out` the folder the user names.
CASES = {
    ("train", None): [
        ("run", ["run_dir={evil}", "trainer.max_steps=3", "data.root={digits}", *SMALL]),
        ("set", ["run_dir=out", "trainer.max_steps=2", "data.root={evil}", *SMALL]),
    ],
    ("sample", None): [
        ("checkpoint", ["checkpoint={evil}", "out=out", *QUICK]),
        ("run", ["checkpoint={evil}", "out=out", *QUICK]),
    ],
    ("evaluate", "score"): [
        ("checkpoint", ["checkpoint={evil}", "out=out/r.jsonl", "metrics=[fid]", *QUICK]),
        ("checkpoint", ["checkpoint={evil}", "out=out/r.jsonl", "metrics=[bits_per_dim]", "likelihood.num_images=2"]),
        ("run", ["checkpoint={evil}", "metrics=[fid]", *QUICK]),
        ("set", ["checkpoint={sound}", "data.root={evil}", "out=out/r.jsonl", "metrics=[fid]", *QUICK]),
        ("set", ["checkpoint={sound}", "reference={evil}", "out=out/r.jsonl", "metrics=[fid]", *QUICK]),
        ("set", ["images={evil}", "reference={digits}", "extractor=digits", "out=out/r.jsonl", "metrics=[fid]"]),
        ("npz", ["images={evil}", "reference={digits}", "extractor=digits", "out=out/r.jsonl", "metrics=[fid]"]),
        ("npz", ["images={digits}", "reference={evil}", "extractor=digits", "out=out/r.jsonl", "metrics=[fid]"]),
        ("weights", ["images={digits}", "reference={digits}", "extractor=digits", "extractor.weights={evil}",
                     "out=out/r.jsonl", "metrics=[fid]"]),
    ],
    ("evaluate", "sweep"): [
        ("checkpoint", ["checkpoint={evil}", "out=out", "sweep.num_steps=[2]", "sweep.eta=[0.0]", "sweep.large=false",
                        "num_images=10", "batch_size=10"]),
    ],
    ("lab", "errors"): [
        ("checkpoint", ["checkpoint={evil}", "out=out", *ERRORS]),
        ("run", ["checkpoint={evil}", *ERRORS]),
        ("set", ["checkpoint={sound}", "data.root={evil}", "out=out", *ERRORS]),
    ],
    ("lab", "equivalence"): [
        ("checkpoint", ["checkpoint={evil}", "out=out", *EQUIVALENCE]),
        ("set", ["checkpoint={sound}", "data.root={evil}", "out=out", *EQUIVALENCE]),
    ],
    ("lab", "forward"): [],
    ("lab", "reverse"): [],
    ("lab", "modes"): [],
    ("prepare", "make"): [
        ("source", ["source={evil}", "out=out", "image_size=8"]),
        ("npz", ["source={evil}", "out=out", "image_size=8"]),
    ],
    ("prepare", "verify"): [("set", ["out={evil}"])],
    ("report", "make"): [("run", ["run_dir={evil}"]), ("run", ["runs={evil}", "out=out"])],
    ("report", "compare"): [("run", ["run_dir={evil}", "other={sound}"]), ("run", ["run_dir={sound}", "other={evil}"])],
    ("benchmark", "gpu_check"): [],
    ("benchmark", "overhead"): [],
    ("benchmark", "digests"): [],
    ("benchmark", "loader"): [],  # loader.root is given to the same reader as data.root; a benchmark takes minutes
}  # fmt: skip
OUTPUTS = {"out", "run_dir", "samples", "data.remote.folder"}  # where the user wants results
ELSEWHERE = {"loader.root", "loader.cifar_root", "loader.peers_python"}  # named by who measures, of the benchmark


# ---- tricks ----


class Command:
    """Unpickling it runs a command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def setting(key, value):
    """A trick: a checkpoint whose configuration has this value."""

    def edit(content, place):
        group, names = content["config"], key.split(".")
        for name in names[:-1]:
            group = group.setdefault(name, {})
        made = value(place) if callable(value) else value
        group[names[-1]] = made

    return edit


def content_of(key, value):
    def edit(content, place):
        content[key] = value(content) if callable(value) else value

    return edit


def circular(content):
    config = content["config"]
    config["again"] = config
    return config


def laughs(content):
    lists = ["ha"] * 10
    for _ in range(12):
        lists = [lists] * 10
    return content["config"] | {"ha": lists}


def without(content, key):
    return {k: v for k, v in content[key].items() if k != next(iter(content[key]))}


def several(*edits):
    def edit(content, place):
        for one in edits:
            one(content, place)

    return edit


def touch(place):
    return f"touch '{place / 'canary'}'"


def fresh(place):
    return str(place / "fresh")


MIXTURE = setting("data._target_", "diffusion.data.mixture.MixtureDataModule")
CHECKPOINTS = {
    "a pipe as root": setting("data.root", lambda place: f"pipe:{touch(place)}; cat {{}}"),
    "a server as root": setting("data.root", lambda place: f"http://127.0.0.1:{place.port}/set"),
    "a bucket as root": setting("data.root", "s3://bucket/set"),
    "digits in a fresh folder": setting("data.root", fresh),
    "an interpolation as root": setting("data.root", "${oc.env:HOME}/set"),
    "no root": setting("data.root", None),
    "a number as root": setting("data.root", 7),
    "a command as data": several(setting("data._target_", "os.system"), setting("data.command", touch)),
    "a command as network": several(setting("model._target_", "os.system"), setting("model.command", touch)),
    "a command as schedule": several(setting("schedule._target_", "os.system"), setting("schedule.command", touch)),
    "a class in a list": setting("model.multipliers", lambda p: [1, {"_target_": "os.system", "command": touch(p)}]),
    "a class as a number": setting("schedule.num_timesteps", lambda p: {"_target_": "os.system", "command": touch(p)}),
    "arguments by place": setting("schedule._args_", [5, 0.1]),
    "an interpolation as a number": setting("model.width", "${oc.env:WIDTH,32}"),
    "weights of the extractor in a fresh folder": setting("extractor.weights", lambda p: f"{fresh(p)}/x.safetensors"),
    "a command as extractor": several(
        setting("extractor.name", "custom"),
        setting("extractor.target", "os.system"),
        setting("extractor.weights", touch),
    ),
    "its own cache folder": setting("data.remote", lambda place: {"folder": fresh(place), "gigabytes": 1}),
    "commands in groups that are not used": several(
        *(setting(f"{g}._target_", "os.system") for g in ("sampler", "guidance", "optimizer", "logger", "callbacks"))
    ),
    "a command as advice": several(setting("data.prepare", touch), setting("data.root", fresh)),
    "texts as published scores": setting("paper", {"fid": "3.17", "is": {"_target_": "os.system"}}),
    "a name that climbs": several(setting("name", "../../victim/x"), setting("run_dir", "../../victim")),
    "a name for a terminal": setting("name", "\x1b[2J<script>alert(1)</script>\r\nerror: none"),
    "a split that climbs": setting("data.split", "../../etc"),
    "another digest": setting("data.digest", "0" * 64),
    "a number as digest": setting("data.digest", 3),
    "a million million steps": setting("schedule.num_timesteps", 10**12),
    "a wide network": setting("model.width", 10**9),
    "a deep network": setting("model.blocks_per_level", 10**9),
    "a network of many levels": setting("model.multipliers", [1] * 9000),
    "another width": setting("model.width", 64),
    "another prediction": setting("objective.prediction", "os.system"),
    "points without end": several(MIXTURE, setting("data.toy", "modes"), setting("data.num_points", 10**12)),
    "points of no set": several(MIXTURE, setting("data.toy", "os.system"), setting("data.num_points", 5)),
    "a configuration that is a list": content_of("config", ["a"]),
    "no configuration": content_of("config", None),
    "a configuration that holds itself": content_of("config", circular),
    "a billion laughs": content_of("config", laughs),
    "a step that climbs": content_of("global_step", "../../victim/x"),
    "a negative step": content_of("global_step", -5),
    "weights that are a list": content_of("state_dict", [1, 2]),
    "weights that are text": content_of("state_dict", {"network.a": "b"}),
    "a weight missing": content_of("state_dict", lambda c: without(c, "state_dict")),
    "an average missing": content_of("ema", lambda c: without(c, "ema")),
    "averages of another shape": content_of("ema", lambda c: {k: torch.zeros(2) for k in c["ema"]}),
    "a pickled command": lambda content, place: content.update(trap=Command(place / "canary")),
    "a billion laughs as step": content_of("global_step", lambda content: [laughs(content)]),
    "a number without end": setting("objective.label_dropout", 10**400),
    "published scores without end": setting("paper", {"kid": float("inf")}),
    "points of a network of images": several(MIXTURE, setting("data.toy", "modes"), setting("data.num_points", 5)),
    "a root without end": setting("data.root", "x" * 5000),
    "states of nothing": several(
        content_of("optimizer_states", "x"), content_of("loops", 3), content_of("callbacks", [1]),
        content_of("lr_schedulers", None),
    ),
}  # fmt: skip
HARMLESS = {  # what is not looked at by a command that samples
    "a pipe as root", "a server as root", "a bucket as root", "digits in a fresh folder", "an interpolation as root",
    "no root", "a command as data", "weights of the extractor in a fresh folder", "a command as extractor",
    "its own cache folder", "commands in groups that are not used", "a command as advice", "a name that climbs",
    "a name for a terminal", "a split that climbs", "another digest", "arguments by place", "states of nothing",
    "points without end", "points of no set", "points of a network of images", "a root without end",
}  # fmt: skip


def evil_checkpoint(place, name, at=None):
    """A file with the trick in it."""
    content = copy.deepcopy(place.content)
    CHECKPOINTS[name](content, place)
    path = at or place / "evil.ckpt"
    torch.save(content, path)
    path.with_suffix(".sha256").unlink(missing_ok=True)
    return path


def linked(name, goal=None):
    """A run folder in which this is a link out of it."""

    def edit(run, place):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(goal or place / "victim")

    return edit


def file(name, text):
    def edit(run, place):
        path = run / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text(place).encode() if callable(text) else text)

    return edit


def pipe(name):
    def edit(run, place):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return edit


def newest(trick):
    """The newest checkpoint has a trick in it, and the digest that belongs to it."""

    def edit(run, place):
        path = evil_checkpoint(place, trick, run / "checkpoints" / "step_00000002.ckpt")
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")

    return edit


BOMB = b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(12)
)
MERGES = b"a0: &a0 {x: 1}\n" + b"".join(
    b"a%d: &a%d {<<: [%s]}\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def program(run, place):
    """A picture for which Pillow would run `gs`, and one of that name."""
    folder = place / "home" / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\n{touch(place)}\n")
    (folder / "gs").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    for name in (
        "samples/step_00000002.png",
        "samples/film_step_00000002.png",
        "likelihood/progressive_step_00000002.png",
    ):
        file(name, EPS)(run, place)


RUNS = {
    "merges of YAML": file("config.yaml", MERGES),
    "a picture that is a program": program,
    "a pipe as picture": several(
        lambda run, place: (run / "samples").mkdir(exist_ok=True), pipe("samples/step_00000009.png")
    ),
    "a pipe as digest": pipe("checkpoints/step_00000002.sha256"),
    "a pipe as note": pipe("changed_data.json"),
    "a note of no time": file("changed_data.json", b'{"since": 1' + b"0" * 400 + b"}"),
    "a pipe as bound": several(
        lambda run, place: (run / "likelihood").mkdir(exist_ok=True), pipe("likelihood/bound_step_1.csv")
    ),
    "a page of the laboratory that is a list": file("lab/page.json", b"[]"),
    "a checkpoint with a short name": file("checkpoints/step_5000.ckpt", b"x"),
    "a command in config.yaml": file("config.yaml", lambda p: f"x: !!python/object/apply:os.system ['{touch(p)}']\n"),
    "a bomb of YAML": file("config.yaml", BOMB),
    "a configuration of nothing": file("config.yaml", b"[]\n"),
    "a pipe as configuration": pipe("config.yaml"),
    "checkpoints elsewhere": linked("checkpoints"),
    "evaluations elsewhere": linked("evaluations"),
    "likelihood elsewhere": linked("likelihood"),
    "samples elsewhere": linked("samples"),
    "the laboratory elsewhere": linked("lab"),
    "a task of the laboratory elsewhere": linked("lab/errors"),
    "a lock elsewhere": lambda run, place: linked(".lock", place / "victim" / "file")(run, place),
    "a lock of results elsewhere": lambda run, place: linked(".results.lock", place / "victim" / "new")(run, place),
    "a pipe as lock": pipe(".lock"),
    "a pipe as lock of results": pipe(".results.lock"),
    "results elsewhere": lambda run, place: linked("results.jsonl", place / "victim" / "file")(run, place),
    "metrics elsewhere": lambda run, place: linked("metrics.csv", place / "victim" / "file")(run, place),
    "a report elsewhere": lambda run, place: linked("report.html", place / "victim" / "file")(run, place),
    "results of another kind": file("results.jsonl", b'123\nnull\n[[1]]\n{"value": NaN}\n{"name": {"a": 1}}\n\xff\n'),
    "metrics of another kind": file("metrics.csv", b"step,a\n1,2,3,4\n\xff\xfe\n2,\n"),
    "a stray checkpoint": lambda run, place: shutil.copy(
        run / "checkpoints" / "step_00000002.ckpt", run / "checkpoints" / "step_99999999.ckpt"
    ),
    **{f"newest checkpoint: {name}": newest(name) for name in CHECKPOINTS},
}
ALSO_WITHOUT_CHECKPOINTS = [name for name in RUNS if not name.startswith("newest")]


def index(change):
    """A data set whose index has been changed."""

    def make(place):
        root = place / "evil_set"
        shutil.copytree(place.digits, root)
        content = json.loads((root / "index.json").read_text())
        change(content, root, place)
        (root / "index.json").write_text(json.dumps(content))
        return root

    return make


def shard(**values):
    return lambda content, root, place: content["shards"][0].update(
        {k: v(place) if callable(v) else v for k, v in values.items()}
    )


def linked_shard(content, root, place):
    name = content["shards"][0]["path"]
    (root / name).unlink()
    (root / name).symlink_to(place / "victim" / "file")


def piped_shard(content, root, place):
    name = content["shards"][0]["path"]
    (root / name).unlink()
    os.mkfifo(root / name)


SETS = {
    "a shard that climbs": index(shard(path="../../victim/file")),
    "a shard with a path of its own": index(shard(path=lambda place: str(place / "victim" / "file"))),
    "a shard that is a command": index(shard(path=lambda place: f"pipe:{touch(place)}")),
    "a shard that is a link": index(linked_shard),
    "a shard that is a pipe": index(piped_shard),
    "a shard with a name for a shell": index(shard(path=lambda place: f"$({touch(place)})")),
    "a version of its own": index(lambda content, *_: content.update(version={"a": 1})),
    "a class in the index": index(lambda content, *_: content.update(name={"_target_": "os.system"})),
    "images without end": index(lambda content, *_: content.update(image_size=10**9)),
    "samples without end": index(shard(samples=10**15)),
}


def objects(place):
    found = np.empty(4, object)
    found[:] = Command(place / "canary")
    return found


def npz(**members):
    def make(place):
        path = place / "evil.npz"
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name.replace("__", "."), member(place))
        return path

    return make


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


NPZ = {
    "objects as images": npz(arr_0__npy=lambda place: npy(objects(place))),
    "objects as labels": npz(
        arr_0__npy=lambda place: npy(np.zeros((12, 8, 8, 1), np.uint8)), arr_1__npy=lambda place: npy(objects(place))
    ),
    "a bare pickle": npz(arr_0__npy=lambda place: pickle.dumps(Command(place / "canary"))),
    "an array without end": npz(
        arr_0__npy=lambda place: npy(np.zeros((1, 8, 8, 1), np.uint8)).replace(b"(1, 8, 8, 1)", b"(9**9,8,8,1)")
    ),
}


def archive_of(*members):
    def make(place):
        path = place / "evil.tar"
        with tarfile.open(path, "w") as archive:
            for member in members:
                archive.addfile(*member(place))
        return path

    return make


def member(name, data=b"x"):
    def make(place):
        info = tarfile.TarInfo(name(place) if callable(name) else name)
        info.size = len(data)
        return info, io.BytesIO(data)

    return make


def link(name, goal):
    def make(place):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, goal(place)
        return (info,)

    return make


def folder_of(edit):
    def make(place):
        path = place / "evil_images"
        path.mkdir()
        edit(path, place)
        return path

    return make


SOURCES = {
    "names that climb": archive_of(member("../../victim/slip.png"), member(lambda place: str(place / "slip.png"))),
    "links out of it": archive_of(link("a.png", lambda place: str(place / "victim" / "file"))),
    "a name for a shell": archive_of(member(lambda place: f"$({touch(place)}).png")),
    "labels that are a pickle": folder_of(
        lambda path, place: (path / "dataset.json").write_bytes(pickle.dumps(Command(place / "canary")))
    ),
    "an LMDB of garbage": folder_of(lambda path, place: (path / "data.mdb").write_bytes(b"\0" * 9000)),
}
WEIGHTS = {
    "a pickled command": lambda place: evil_checkpoint(place, "a pickled command", place / "weights.safetensors"),
    "a bare pickle": lambda place: written(place / "weights.safetensors", pickle.dumps(Command(place / "canary"))),
}


def written(path, data):
    path.write_bytes(data)
    return path


def evil_run(trick):
    def make(place):
        run = place / "evil_run"
        shutil.copytree(place.sound, run, symlinks=True)
        RUNS[trick](run, place)
        return run

    return make


TRICKS = {
    "checkpoint": {name: (lambda place, name=name: evil_checkpoint(place, name)) for name in CHECKPOINTS},
    "run": {name: evil_run(name) for name in RUNS},
    "set": SETS, "npz": NPZ, "source": SOURCES, "weights": WEIGHTS,
}  # fmt: skip


def combinations():
    for (command, task), takes in CASES.items():
        for number, (kind, _) in enumerate(takes):
            for trick in TRICKS[kind]:
                if kind == "run" and command == "report" and trick.startswith("newest"):
                    continue  # it reads no checkpoint but where config.yaml is damaged
                quick = trick in ("a pipe as root", "a lock elsewhere")
                name = f"{command}-{task}-{number}-{trick}".replace(" ", "_")
                yield pytest.param(command, task, number, trick, id=name, marks=[] if quick else pytest.mark.slow)


# ---- one case ----


class Place(type(Path())):
    """A folder with all that a case needs. port: of a server that counts requests. content: of a sound checkpoint."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run of two steps on digits, a checkpoint of each, and its data set with a classifier."""
    folder = tmp_path_factory.mktemp("sound")

    prepare_digits(folder / "digits")
    words = [f"data.root={folder / 'digits'}", "run_dir=run", "trainer.max_steps=2", "fingerprint_every=1", *SMALL]
    assert inside("train", words, folder) == 0
    return folder


@pytest.fixture(scope="module")
def server():
    """(its port, the requests that have come)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_address[1], seen
        serving.shutdown()


@pytest.fixture
def place(tmp_path, sound, server, monkeypatch):
    folder = Place(tmp_path)
    for name in ("work", "victim", "home"):
        (folder / name).mkdir()
    (folder / "victim" / "file").write_text("precious\n")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which a trick may change
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder.port, folder.digits, folder.sound = server[0], sound / "digits", sound / "run"
    folder.content = torch.load(folder.sound / "checkpoints" / "last.ckpt", weights_only=True)
    return folder


@pytest.mark.parametrize("command, task, number, trick", combinations())
def test_nothing_that_a_file_asks_for_is_done(command, task, number, trick, place, server, capfd):
    kind, words = CASES[command, task][number]
    del server[1][:]
    evil = TRICKS[kind][trick](place)
    named = {"evil": evil, "digits": place.digits, "sound": place.sound}
    words = [word.format(**named) for word in words] + ([] if task is None else [f"task={task}"])
    allowed = [str(place / "work" / "out"), str(place / "home" / ".cache" / "diffusion")]
    allowed += [str(evil)] if kind == "run" and "out=out" not in words and "--" not in words else []
    before = contents(place) | contents(place.sound) | contents(place.digits)
    capfd.readouterr()
    status = inside(command, words, place / "work")
    out, err = capfd.readouterr()
    case = f"{command} {' '.join(words)}: {status}\n{out}\n{err}"
    assert not (place / "canary").exists() and not server[1], case
    after = contents(place) | contents(place.sound) | contents(place.digits)
    own = lambda path: any(path == a or path.startswith(f"{a}/") or a.startswith(f"{path}/") for a in allowed)  # noqa: E731
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path) and not own(path)}
    assert not changed, f"{changed}\n{case}"
    assert "Traceback" not in err and "weights_only" not in err, case
    assert status in (0, 2) or (command, task, status) == ("prepare", "verify", 1) or task == "compare", case
    if status == 2:
        assert len(re.findall("^error: ", err, re.M)) == 1, case
        assert len(err.splitlines()) < 15 and max(map(len, err.splitlines())) < 2000, case
    if kind == "checkpoint" and trick not in HARMLESS:
        assert status == 2, case
    assert "\x1b[2J" not in out + err, case


def sound_input(kind, place):
    """What a case takes in the place of a trick, without one."""
    if kind == "run":
        return shutil.copytree(place.sound, place / "run", symlinks=True)
    if kind == "npz":
        np.savez(place / "sound.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8))
        return place / "sound.npz"
    if kind == "source":
        shutil.copytree(Path(__file__).resolve().parents[1] / "docs" / "images", place / "images")
        return place / "images"
    known = {"checkpoint": place.sound / "checkpoints" / "last.ckpt", "set": place.digits}
    return known.get(kind, place.digits / "classifier.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, task, number", [(*key, number) for key, takes in CASES.items() for number in range(len(takes))]
)
def test_each_case_works_without_a_trick(command, task, number, place, capfd):
    """Else a case would be refused for its words, whatever the trick."""
    kind, words = CASES[command, task][number]
    named = {"evil": sound_input(kind, place), "digits": place.digits, "sound": place.sound}
    words = [word.format(**named) for word in words] + ([] if task is None else [f"task={task}"])
    status = inside(command, words, place / "work")
    out, err = capfd.readouterr()
    unscored = command == "report" and "runs=" in words[0]  # there are no scores to put in a table
    assert status == (2 if unscored else 0), f"{command} {' '.join(words)}\n{out}\n{err}"
    assert not unscored or "no results found" in err


def test_there_are_at_least_300_cases():
    assert len(list(combinations())) >= 300


def test_every_command_and_task_has_its_cases():
    commands = sorted(path.stem for path in conf_dir().glob("*.yaml") if path.stem != "base")
    known = {command for command, _ in CASES}
    assert known == set(commands)
    for command in commands:
        tasks = {task for name, task in CASES if name == command}
        found = getattr(command_module(command), "TASKS", None)
        if command == "prepare":
            found = ("make", "verify")
        assert tasks == ({None} if found is None else set(found)), command


@pytest.mark.parametrize("command", sorted({command for command, _ in CASES}))
def test_every_setting_that_names_a_file_is_given_tricks(command):
    cfg = composed(command, ["+experiment=digits"] if command == "train" else [])
    text = OmegaConf.to_container(cfg)

    def keys(group, prefix=""):
        for name, value in group.items():
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{name}.")
            elif value is None or isinstance(value, str):
                yield f"{prefix}{name}"

    like = re.compile(
        r"(^|[._])(checkpoint|images?|mask|source|reference|weights|root|folder|file|path|dir|runs|other)$"
    )
    given = {
        word.partition("=")[0] for name, _ in CASES for _, words in CASES[name, _] if name == command for word in words
    }
    for key in keys(text):
        if key in PATH_KEYS or like.search(key):
            counted = re.search(r"num_images", key)
            assert counted or key in given | OUTPUTS | ELSEWHERE or key == "extractor.weights", key


# ---- one door ----


PACKAGE = Path(__file__).resolve().parents[1] / "diffusion"


def calls(path):
    """(function, line) of each call in a file, by the last two names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_checkpoints_are_read_and_built_from_in_one_place():
    """Who reads checkpoints, who builds by name, and who loads pickles is a short list."""
    expected = {
        "instantiate": {"build/parts.py"},
        "get_object": {"build/parts.py", "build/extractors.py"},
        "torch.load": {"training/checkpoint.py"},
        "importlib.import_module": {
            "build/trusted.py",
            "benchmark/loader_peers.py",
            "benchmark/loader_sides.py",
            "benchmark/__main__.py",
            "lab/__main__.py",
            "entry.py",
        },
        "load": {"build/door.py", "run.py"},
    }
    found = {name: set() for name in expected}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, _ in calls(path):
            if name in found:
                found[name].add(path.relative_to(PACKAGE).as_posix())
    assert found == expected


def test_untrusted_settings_are_of_a_type_that_nothing_is_built_from():
    from hydra.utils import instantiate

    from diffusion.build import parts as build
    from diffusion.runs.recorded import Recorded

    given = {"data": {"_target_": "os.getpid", "root": "${oc.env:HOME}"}, "seed": 1}
    config = Recorded(given, "here")
    assert config.at("data.root") == "${oc.env:HOME}" and config == given
    for use in (
        instantiate, OmegaConf.create, lambda c: OmegaConf.merge(OmegaConf.create({}), c),
        lambda c: OmegaConf.create({"a": c}), lambda c: build.make(c, "data"), lambda c: instantiate(c["data"]),
    ):  # fmt: skip
        with contextlib.suppress(SystemExit), pytest.raises(Exception):  # noqa: B017
            use(config)
    for content, mention in (
        (["a"], "holds list"), ({"data": {"root": 3}}, "data.root=3"), ({1: 2}, "a key that is not text"),
        ({"a": {1, 2}}, "type set"), ({"name": "x" * 30_000}, "characters"), ({"paper": {"fid": "3"}}, "paper.fid"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(mention)):
            Recorded(content, "here")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x05\x96" + (50 << 30).to_bytes(8, "little") + b"x.",  # bytes that a file only states
        b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s.",  # a key of nested tuples
        b"\x80\x02" + b"".join(b"cposix\nf%d\n0" % n for n in range(200_000)) + b"N.",  # names without end
        b"\x80\x04\x8f.", b"\x80\x02]r" + (2**32 - 1).to_bytes(4, "little") + b".", b"(" * (1 << 20) + b".",
    ],
)  # fmt: skip
def test_reading_a_head_takes_little_of_anything(data, tmp_path):
    import resource

    from diffusion.runs.checkpoint_head import read_head

    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError):
        assert read_head(path).unsafe
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
