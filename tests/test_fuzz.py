"""Damaged and hostile data by the hundred: refused by name or used, each image accounted for, and nothing else happens.

Each case runs in a process of its own, which has little memory and little time. Whatever comes in, it ends with status
0 or 2; no file outside `out` changes; no trap is sprung; and a set that was made decodes and adds up: images in =
images out + those listed as skipped + those listed as ignored.

    PYTHONPATH=. python tests/test_fuzz.py 5000 7      5,000 cases from seed 7, and what became of them
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import fuzzing
import numpy as np
import pytest
from fuzz_sources import SOURCES
from fuzzing import SIZE, broken
from omegaconf import OmegaConf

from diffusion import prepare
from diffusion.config.compose import composed
from diffusion.data.prepare.verify import verify_set
from diffusion.data.shards.index import read_index
from diffusion.data.shards.samples import BadSample, Samples

SECONDS, BYTES = 30, 1 << 29  # that a case may take, and that it may allocate beyond what it starts with


# ---- one case ----


def contents(place):
    """Kind, content or target of everything below a folder."""
    found = {}
    for path in sorted(place.rglob("*")):
        mode = path.lstat().st_mode
        what = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else b""
        found[str(path)] = (stat.S_IFMT(mode), what)
    return found


def limited(work, *arguments, seconds=SECONDS):
    """(exit status, what it printed) of `work(*arguments)` in a process that has little time and little memory."""
    with tempfile.TemporaryFile() as printed:

        def run():
            os.setpgid(0, 0)
            for stream in (1, 2):
                os.dup2(printed.fileno(), stream)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", errors="backslashreplace", closefd=False)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
            try:
                status = work(*arguments)
            except BaseException:
                traceback.print_exc()
                status = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)

        child = multiprocessing.get_context("fork").Process(target=run)
        child.start()
        child.join(seconds)
        if child.exitcode is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
            status = "hangs"
        else:
            status = child.exitcode
        printed.seek(0)
        return status, printed.read().decode(errors="backslashreplace")


@functools.cache
def defaults():
    """The configuration of prepare: composed once, for Hydra takes longer than all that follows."""
    return composed("prepare", [])


def settings(rng):
    """Settings of prepare, drawn."""
    return {
        "image_size": SIZE, "max_pixels": 1_000_000, "shard_samples": 5, "processes": int(rng.integers(1, 3)),
        "on_bad_sample": ("error", "skip", "skip", "skip")[rng.integers(4)], "max_bad_share": 1.0,
        "crop": ("centre", "adm", "ddim", "none", None, None)[rng.integers(6)],
        "background": (None, "white")[rng.integers(2)], "format": ("png", "webp")[rng.integers(2)],
    }  # fmt: skip


def prepared(values, work):
    """The command after its configuration is composed; a set that was made is verified."""
    os.chdir(work)
    main = prepare.main.__wrapped__
    try:
        main(OmegaConf.merge(defaults(), values))
    except SystemExit as ended:
        return ended.code
    _, wrong = verify_set(Path("out"), 1)
    assert not wrong, wrong
    return 0


def decoded(out):
    """The number of samples of a set, each of which decodes."""
    index, count = read_index(out), 0
    for split in index.splits:
        samples = Samples(index, split)
        for number in range(len(samples)):
            image, label = samples[number]
            assert image.shape == (index.channels, index.image_size, index.image_size) and image.dtype == np.uint8
            assert label is None or 0 <= label < index.classes
        count += len(samples)
    return count


def fuzzed_source(kind, number, seed, place):
    """(outcome, description) of one case; AssertionError where something is wrong."""
    rng = np.random.default_rng([seed, number, *kind.encode()])
    work, trap = place / "a" / "b" / "work", place / "sprung"
    work.mkdir(parents=True)
    (place / "secret.png").write_bytes(fuzzing.picture(rng, kind="PNG"))
    how, known = SOURCES[kind](rng, work, trap)
    (name,) = (path.name for path in work.iterdir())
    values, before = settings(rng) | {"source": name, "out": "out"}, contents(place)
    status, printed = limited(prepared, values, work)
    case = f"{kind} {number} of seed {seed}, {how}, {values}: {status}\n{printed[-3000:]}"
    after = {path: what for path, what in contents(place).items() if not path.startswith(str(work / "out"))}
    assert after == before, f"files outside out changed: {case}"
    assert status in (0, 2), case
    if status == 2:
        (line,) = re.findall(r"^error: (.*)$", printed, re.M)
        assert name in line or "labels_from=" in line, case
        assert "Traceback" not in printed, case
        assert not (work / "out" / "index.json").exists(), case
        return "refused", case
    summary = json.loads((work / "out" / "prepare.json").read_bytes())["summary"]
    with open(work / "out" / "skipped.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert "emory" not in str(rows), case
    count, images = limited(decoded, work / "out"), sum(summary["images"].values())
    assert count[0] == images, f"{count} {case}"
    assert len(rows) == summary["skipped"] and (values["on_bad_sample"] == "skip" or not rows), case
    found = images + len(rows) + summary["ignored"]
    assert found >= known, f"{known - found} images are lost: {case}"
    return ("skipped" if rows else "used"), case


# ---- finished sets ----


@functools.cache
def sound_set():
    """The files of a set of 17 images of two classes, in five shards of two splits, by their names. Made in this
    process, which then has all that prepare imports, and so have those of the cases."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        rng = np.random.default_rng(2)
        images = (fuzzing.picture(rng, kind=("PNG", "JPEG", "WEBP")[n % 3]) for n in range(17))
        Path("x.zip").write_bytes(fuzzing.zip_of((f"{n % 2}/{n}.png", image) for n, image in enumerate(images)))
        values = {"source": "x.zip", "out": "out", "shard_samples": 4, "validation": 3, "processes": 1}
        assert prepared(values, Path(place)) == 0
        return {path.name: path.read_bytes() for path in Path("out").iterdir()}


def damaged_set(rng, root, trap):
    """(what was done, whether verifying must find it) to a copy of the set in `root`."""
    files = dict(sound_set())
    tars = sorted(name for name in files if name.endswith(".tar"))
    tar, other = (str(name) for name in rng.choice(tars, 2, replace=False))
    kind, sealed = rng.integers(8), False
    if kind < 2:
        files["index.json"], how = fuzzing.index_changed(rng, files["index.json"])
    elif kind == 2:
        files[f"{tar}.offsets"], how = broken(rng, files[f"{tar}.offsets"])
    elif kind == 3:
        files[tar], files[other], how = files[other], files[tar], "swapped tars"
    elif kind == 4:
        del files[(tar, f"{tar}.offsets", "index.json")[rng.integers(3)]]
        how = "a file is gone"
    else:
        name = (tar, tar, f"{tar}.offsets")[rng.integers(3)]
        breaking = (broken, with_other_bytes)[rng.integers(2)]
        files[name], how = breaking(rng, files[name]) if name == tar else broken(rng, files[name])
        if sealed := bool(rng.integers(2)):
            content = json.loads(files["index.json"])
            (shard,) = (shard for shard in content["shards"] if shard["path"] == tar)
            shard |= {"bytes": len(files[tar]), "sha256": hashlib.sha256(files[tar]).hexdigest()}
            shard |= {"offsets_sha256": hashlib.sha256(files[f"{tar}.offsets"]).hexdigest()}
            files["index.json"] = json.dumps(content).encode()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return how, not sealed and not same(files, sound_set())


def same(files, others):
    """Whether two sets are the same, whatever the blanks in their index."""
    try:
        return {**files, "index.json": json.loads(files["index.json"])} == {
            **others, "index.json": json.loads(others["index.json"])
        }  # fmt: skip
    except (KeyError, ValueError, RecursionError):
        return False


def with_other_bytes(rng, tar):
    """The tar with something else in the place of one of its members."""
    start = rng.choice(fuzzing.tar_heads(tar))
    size = int(tar[start + 124 : start + 135], 8)
    odd = (b"[" * 1000, b"99", b"1e400", b"{}", pickle.dumps({}), fuzzing.bomb(rng), fuzzing.odd(rng))
    data = odd[rng.integers(len(odd))][:size].ljust(size)
    return tar[: start + 512] + data + tar[start + 512 + size :], "another member"


def read_through(root):
    """0: all of the set can be read and verifying finds nothing. 1: something is found. 2: there is no set."""
    try:
        index = read_index(root)
    except ValueError as error:
        assert "data.root=" in str(error), error
        return 2
    found = 0
    for split in index.splits:
        samples = Samples(index, split)
        for number in range(len(samples)):
            try:
                image, label = samples[number]
            except BadSample as error:
                assert any(shard.path in str(error) for shard in samples.shards), error
                found = 1
            else:
                assert image.shape == (3, SIZE, SIZE) and image.dtype == np.uint8 and label in range(index.classes)
    try:
        _, wrong = verify_set(root, 1)
    except ValueError:
        return 2
    assert wrong or not found, "what cannot be decoded is not found by verifying"
    return int(bool(wrong))


def fuzzed_set(number, seed, place):
    """As `fuzzed_source`, of a finished set."""
    rng = np.random.default_rng([seed, number])
    root, trap = place / "a" / "set", place / "sprung"
    root.mkdir(parents=True)
    how, to_find = damaged_set(rng, root, trap)
    before = contents(place)
    status, printed = limited(read_through, root)
    case = f"set {number} of seed {seed}, {how}: {status}\n{printed[-3000:]}"
    assert contents(place) == before, case
    assert status in (0, 1, 2), case
    assert status or not to_find, f"the damage is not found: {case}"
    return ("sound", "found", "refused")[status], case


# ---- all of them ----

KINDS = (*SOURCES, "set", "set")


def fuzz(cases, seed, place, kinds=KINDS):
    """Run the cases; (how often each outcome was met, the descriptions of those that went wrong)."""
    outcomes, wrong = Counter(), []
    sound_set()
    for number in range(cases):
        kind = kinds[number % len(kinds)]
        with tempfile.TemporaryDirectory(dir=place) as inner:
            run = fuzzed_set if kind == "set" else functools.partial(fuzzed_source, kind)
            try:
                outcome, _ = run(number, seed, Path(inner))
            except AssertionError as error:
                outcome = "wrong"
                wrong.append(str(error))
        outcomes[outcome] += 1
    return outcomes, wrong


@pytest.mark.parametrize("cases, seed", [(60, 1), pytest.param(500, 2, marks=pytest.mark.slow)])
def test_whatever_comes_in_is_used_or_refused_and_counted(cases, seed, tmp_path):
    outcomes, wrong = fuzz(cases, seed, tmp_path)
    assert not wrong, "\n\n".join(wrong[:5])
    assert {"used", "skipped", "refused", "found"} <= set(outcomes), outcomes
    assert outcomes.total() == cases


def test_the_limits_and_the_traps_of_a_case_work(tmp_path):
    assert limited(time.sleep, 60, seconds=0.2)[0] == "hangs"
    status, printed = limited(bytearray, 2 * BYTES)
    assert status == 99 and "MemoryError" in printed
    assert limited(signal.raise_signal, signal.SIGKILL)[0] == -signal.SIGKILL
    pickle.loads(pickle.dumps(fuzzing.Trap(tmp_path / "sprung"))).close()
    assert (tmp_path / "sprung").exists()


if __name__ == "__main__":
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        outcomes, wrong = fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(place), sys.argv[3:] or KINDS)
    print("\n\n".join(wrong))
    print(f"{dict(outcomes)} in {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))
