"""Command lines by the hundred: each works, or is refused in one message that names what is wrong, and leaves nothing.

A case is a command line that works and is quick, with up to three words of chance: values of the wrong kind, out of
range, misspelt, empty, huge, of another group, deletions, additions, interpolations, sweeps. It runs in a folder with a
small data set and two small runs, in a process of its own, forked from one that has imported torch.

    PYTHONPATH=. python tests/fuzz_commands.py 300 7      300 cases from seed 7, and what became of them
    PYTHONPATH=. python tests/fuzz_commands.py 300 7 41   the case number 41 alone, with all that it prints
"""

import importlib
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from conftest import command_module
from omegaconf import OmegaConf
from PIL import Image

from diffusion.config.compose import composed
from diffusion.config.composer import groups
from diffusion.runs.folder import flatten

SECONDS, BYTES, LINES = 120, 1 << 32, 10  # that a case may take, allocate, and say when it refuses
COMMANDS = ("train", "sample", "evaluate", "lab", "prepare", "report", "benchmark")
TINY = ["trainer=cpu", "trainer.threads=1", "data.batch_size=4", "trainer.max_steps=1", "model.multipliers=[1]"]
TINY += ["model.attention_resolutions=[]", "model.blocks_per_level=1", "schedule.num_timesteps=20"]
TINY += ["schedule.beta_end=0.6", "log_every=1"]
SCORED = ["sampler.num_steps=2", "callbacks.grid.num_images=4", "callbacks.score.num_images=10"]
POINTS = ["+experiment=gmm", "trainer=cpu", "data.num_points=512", "data.batch_size=8", "trainer.max_steps=1"]
POINTS += ["model.width=32", "model.blocks=1", "schedule.num_timesteps=20", "schedule.beta_end=0.6"]
BASES = {  # by command: lines that work
    "train": (
        [*TINY, *SCORED, "run_dir=runs/new"],
        [*TINY, *SCORED, "run_dir=runs/digits"],
        [*TINY, "callbacks=none", "sampler.num_steps=2", "run_dir=runs/new"],
        [*POINTS, "run_dir=runs/new"],
    ),
    "sample": (["checkpoint=runs/digits", "out=new", "num_images=2", "sampler.num_steps=2"],),
    "evaluate": (
        ["checkpoint=runs/digits", "num_images=12", "sampler.num_steps=2", "metrics=[fid]"],
        ["checkpoint=runs/digits", "metrics=[bits_per_dim]", "likelihood.num_images=2", "out=new.jsonl"],
        ["images=pictures", "reference=data/digits", "extractor=digits", "metrics=[fid,is]", "out=new.jsonl"],
        ["checkpoint=runs/digits", "task=sweep", "num_images=12", "sweep.num_steps=[1,2]", "sweep.eta=[0]"],
    ),
    "lab": (
        ["task=forward", "forward.frames=2", "forward.num_points=20"],
        ["task=reverse", "reverse.frames=2", "reverse.num_points=20", "reverse.num_steps=10", "samplers=[ddim]"],
        ["task=modes", "modes.num_points=400", "modes.num_steps=20", "samplers=[ddim,ancestral]"],
        ["task=equivalence", "equivalence.num_images=4", "equivalence.num_steps=4"],
        ["task=errors", "errors.num_steps=[2,4]", "sampler.num_steps=5", "schedule.num_timesteps=20"],
        ["task=errors", "checkpoint=runs/gmm", "errors.num_steps=[2,4]", "sampler.num_steps=5", "errors.num_points=20",
         "errors.times=3", "samplers=[ddim]"],
    ),
    "prepare": (
        ["source=pictures", "out=new", "processes=1"],
        ["source=pictures", "out=new", "image_size=8", "channels=1", "processes=1"],
        ["task=verify", "out=data/digits", "processes=1"],
        ["source=digits", "out=new"],
    ),
    "report": (
        ["runs=runs", "out=new"],
        ["run_dir=runs/digits"],
        ["task=compare", "run_dir=runs/digits", "other=runs/gmm"],
    ),
    "benchmark": (["task=gpu_check"],),
}  # fmt: skip
STATUSES = {"report": (0, 1), "prepare": (0, 1), "benchmark": (0, 3)}  # beside 2: differences, damage, no GPU
SIZES = re.compile(  # settings whose larger values are allowed, and take as much longer
    r"(num_images|num_points|num_steps|max_steps|frames|times|visits|steps|rounds|probes|images|width|blocks|num_timesteps"
    r"|blocks_per_level|num_workers|processes|devices|num_nodes|eta|validation|batch_size|neighbours|grid_images|attempts"
    r"|fitted_on|stds|mean|samplers|multipliers|accumulate|threads|shard_samples|image_size|large|png|fingerprint_every"
    r"|every_steps|per_class|max_pixels|tolerance|timeout|format|metrics)$"
)
LONG = ("task=loader", "task=overhead", "likelihood.by=ode", "extractor=inception", "accelerator=gpu")
ODD = (
    "", "null", "[]", "[a,b]", "{a: 1}", "-1", "0", "1.5", "nan", "inf", "1e400", "99999999999999999999", "true", "abc",
    "é≠日", "it's", "'a b'", '"', "[1,", "${seed}", "${nokey}", "${oc.env:HOME}", "${oc.env:NO_SUCH_THING}", "${",
    "no/such/path", "file.txt", "pictures", "runs/digits", "a=b", "a,b", "\\", "../..", " ", "x" * 300, "???",
)  # fmt: skip
MODEST = ("", "null", "[]", "[a,b]", "{a: 1}", "-1", "nan", "inf", "abc", "é≠日", "${nokey}", "1.5", "'", "0")


# ---- one command line ----


def keys_of(command):
    """The settings of a command and their defaults, of train those of its default experiment."""
    if command not in _keys:
        first = ["+experiment=digits"] if command == "train" else []
        task = {"lab": ["task=modes"], "benchmark": ["task=loader"], "sample": ["checkpoint=x", "out=x"]}
        cfg = composed(command, [*first, *task.get(command, [])])
        plain = OmegaConf.to_container(cfg)
        _keys[command] = {k: v for k, v in flatten(plain).items() if "_target_" not in k and "_partial_" not in k}
    return _keys[command]


_keys = {}


def pick(rng, things):
    things = list(things)
    return things[rng.integers(len(things))]


def chance_word(rng, command):
    """A word that a user might type, mostly wrong."""
    keys = keys_of(command)
    key = pick(rng, [key for key in keys if key != "debug"])  # whose traceback is asked for
    value = pick(rng, MODEST if SIZES.search(key) else ODD)
    kind = rng.integers(12)
    if kind < 4:
        return f"{key}={value}"
    if kind < 6:  # near what holds
        default, sized = keys[key], SIZES.search(key)
        if isinstance(default, bool):
            return f"{key}={str(not default).lower()}"
        if isinstance(default, int | float) and not sized:
            return f"{key}={pick(rng, (default, default + 1, default * 2, default / 2))}"
        if isinstance(default, list) and default and not sized:
            return f"{key}=[{','.join(map(str, [*default, default[0]][rng.integers(2) :]))}]"
        return f"{key}={'null' if default is None else default}" if not sized else f"{key}=1"
    if kind == 6:  # misspelt
        at = rng.integers(len(key))
        return f"{key[:at]}{key[at + 1 :]}={value}"
    if kind == 7:
        return f"~{key}"
    if kind == 8:
        added = (key, f"{key}.new", "new", f"{key.rpartition('.')[0]}.new".lstrip("."))
        return f"{pick(rng, ('+', '++'))}{pick(rng, added)}={value}"
    if kind < 11:
        group = pick(rng, groups())
        option = pick(rng, (*groups()[group], "nothing", "", "null"))
        return f"{'+' if group == 'experiment' else ''}{group}={option}"
    return pick(rng, ("word", "=", "=x", "-x", "--nothing", "key with blank=1", ".=1", "~", "+"))


def line(rng):
    """(command, words, those of chance)."""
    command = COMMANDS[rng.integers(len(COMMANDS))]
    base = list(pick(rng, BASES[command]))
    words = [chance_word(rng, command) for _ in range(pick(rng, (0, 1, 1, 1, 1, 2, 3)))]
    words = [word for word in words if not any(part in word for part in LONG)]
    special = rng.integers(20)
    if special == 0:
        words.append("--help")
    elif special == 1:
        words += ["--cfg", "job"]
    elif special < 4 and command in ("train", "sample", "evaluate"):
        words += ["-m", f"seed={pick(rng, ('0,1', '1,x', '0,-1', '0,0'))}"]
    return command, [*base, *words], words


# ---- one case ----


def contents(place):
    """Kind, content or target of everything below a folder."""
    found = {}
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        what = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else b""
        found[str(path.relative_to(place))] = (stat.S_IFMT(mode), what)
    return found


def run(command, words, folder, seconds=SECONDS):
    """(exit status, stdout, stderr, whether a process is left) of a command in a process of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os._exit(child_status(command, words, folder, out, err))
        deadline, status = time.monotonic() + seconds, None
        while status is None and time.monotonic() < deadline:
            pid, code = os.waitpid(child, os.WNOHANG)
            status = None if pid == 0 else os.waitstatus_to_exitcode(code)
            time.sleep(0.02)
        left = processes_of(child) if status is not None else []
        if status is None or left:
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
            status = "hangs"
        out.seek(0), err.seek(0)
        return status, out.read().decode(errors="replace"), err.read().decode(errors="replace"), bool(left)


def child_status(command, words, folder, out, err):
    """The command's exit status, in the process that is to end with it."""
    os.setpgid(0, 0)
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache")}
    sys.argv = [f"diffusion.{command}", *words]
    status = 0
    try:
        command_module(command).main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    return status


def processes_of(group):
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(path.parent.name)
    return found


def told(words, message):
    """Whether a message names a setting or a value that was typed."""
    for word in words:
        key, _, value = word.lstrip("+~-").partition("=")
        parts = [key, key.rpartition(".")[2], value, value.strip("'\"[]"), word]
        if any(part and part in message for part in parts):
            return True
    return not words


def verdict(case, folder, before):
    """The outcome of a case; AssertionError where something is wrong."""
    text = f"{case.command} {' '.join(map(repr, case.words))}\n-> {case.status}\n{case.out[-1500:]}\n{case.err[-2500:]}"
    assert not case.left, f"a process is left: {text}"
    assert "Traceback" not in case.out + case.err, text
    assert case.status in (2, *STATUSES.get(case.command, (0,))), text
    if case.status != 2:
        return "worked"
    errors = [line for line in case.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, f"{len(errors)} messages: {text}"
    message = case.err[case.err.index("error:") :]
    assert len(message.splitlines()) <= LINES, f"long: {text}"
    assert told(case.words, message), f"names nothing: {text}"
    after = contents(folder)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    if "-m" in case.words and case.command != "train":  # Hydra's own file, and what the first of several has made
        changed -= {"runs/multirun.yaml", *(k for k in changed if "#1 :" in case.out)}
    assert not changed, f"left behind: {sorted(changed)} {text}"
    return "refused"


def fuzzed(number, seed, made, place, loud=False):
    """(outcome, seconds) of one case."""
    rng = np.random.default_rng([seed, number])
    command, words, _ = line(rng)
    folder = place / f"case_{number}"
    shutil.copytree(made, folder, symlinks=True)
    before, began = contents(folder), time.monotonic()
    try:
        case = SimpleNamespace(command=command, words=words)
        case.status, case.out, case.err, case.left = run(command, words, folder)
        if loud:
            print(command, *map(repr, words), f"\n-> {case.status}\n{case.out}\n{case.err}")
        return verdict(case, folder, before), time.monotonic() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- all of them ----


def make(folder):
    """The folder that each case gets a copy of: a data set, two runs, pictures, a file. Made by processes that end, so
    that this one has no threads when it forks."""
    folder.mkdir(parents=True)
    import_all()
    for words in (
        [*TINY, *SCORED, "fingerprint_every=1", "run_dir=runs/digits"],
        [*POINTS, "fingerprint_every=1", "run_dir=runs/gmm"],
    ):
        status, out, err, _ = run("train", words, folder, 600)
        assert status == 0, out + err
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "pictures" / f"{number}.png")
    (folder / "file.txt").write_text("text\n")
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return folder


def import_all():
    for name in COMMANDS:
        command_module(name)
    for name in (
        "run",
        "scoring.evaluation",
        *(f"lab.tasks.{task}" for task in ("errors", "modes", "plane", "equivalence")),
    ):
        importlib.import_module(f"diffusion.{name}")


def fuzz(numbers, seed, place, loud=False):
    """Run the cases; (how often each outcome was met, the descriptions of those that went wrong, seconds of each)."""
    made = make(place / "made")
    outcomes, wrong, seconds = Counter(), [], {}
    for number in numbers:
        try:
            outcome, seconds[number] = fuzzed(number, seed, made, place, loud)
        except AssertionError as error:
            outcome = "wrong"
            wrong.append(f"[{number}] {error}")
            print(wrong[-1], "\n", flush=True)
        outcomes[outcome] += 1
    return outcomes, wrong, seconds


if __name__ == "__main__":
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [int(word) for word in sys.argv[3:]] or range(int(sys.argv[1]))
        outcomes, wrong, seconds = fuzz(chosen, int(sys.argv[2]), Path(folder), loud=bool(sys.argv[3:]))
    longest = {number: round(seconds[number], 1) for number in sorted(seconds, key=seconds.get)[-3:]}
    print(f"{dict(outcomes)} in {time.monotonic() - began:.0f} s; longest, by number: {longest}")
    sys.exit(bool(wrong))
