"""prepare as a user runs it: the same bytes whatever happens on the way, everything counted, nothing half made."""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import inside
from omegaconf import OmegaConf
from PIL import Image
from test_prepare_sources import TREE, cifar, coded, filled

from diffusion.build.prepare import described
from diffusion.config.check import check, check_data
from diffusion.config.compose import composed
from diffusion.config.composer import groups
from diffusion.data.shards.index import read_index
from diffusion.data.shards.samples import Samples

RNG = np.random.default_rng(11)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def image(width, height, kind="PNG", **options):
    small = Image.fromarray(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def lsun(path, count=64, least=24):
    """An LMDB in LSUN's layout: WebP of odd sizes under 40 hexadecimal digits."""
    import hashlib

    import lmdb

    with lmdb.open(str(path), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for number in range(count):
            size = [int(n) for n in RNG.integers(least, 2 * least, 2)]
            transaction.put(hashlib.sha1(b"%d" % number).hexdigest().encode(), image(*size, "WEBP", quality=80))
    return path


def next_command(output):
    """The configuration of the train command that was printed."""
    (line,) = re.findall(r"^Train on it: python -m diffusion\.train(.*)$", output, re.M)
    words = shlex.split(line)  # the command itself adds the experiment digits where there is none
    return composed("train", words if any("experiment=" in word for word in words) else ["+experiment=digits", *words])


# ---- the sets of the papers, by the very commands that conf/data gives ----

DOWNLOADS = {
    "lsun_church": (lambda p: lsun(p, 5, 256), 5, 256),
    "lsun_bedroom": (lambda p: lsun(p, 3, 256), 3, 256),
    "lsun_cat": (lambda p: lsun(p, 3, 256), 3, 256),
    "celebahq": (lambda p: filled(p, {f"{n}.jpg": image(256, 256, "JPEG") for n in range(3)}, "folder"), 3, 256),
    "celeba_64": (lambda p: filled(p, {f"img/{n}.jpg": image(178, 218, "JPEG") for n in range(3)}, "zip"), 3, 64),
    "cifar10": (lambda p: filled(p, cifar("py"), "tar.gz"), 35, 32),
    "digits": (lambda p: None, 1797, 8),
    "digits_held_out": (lambda p: None, 1431, 8),
}


@pytest.mark.parametrize("dataset", DOWNLOADS)
def test_the_command_of_each_data_set_makes_it_and_names_the_next_one(dataset, call, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    make, count, size = DOWNLOADS[dataset]
    words = shlex.split(str(described(dataset).prepare).removeprefix("python -m diffusion.prepare "))
    make(Path(dict(word.split("=") for word in words)["source"]))
    if dataset == "digits":  # with a classifier that is there already, as its training takes long
        shutil.copytree(request.getfixturevalue("digits"), Path("data") / "digits")
    status, output = call("prepare", *words)
    assert status == 0, output
    index = read_index(Path("data") / dataset)
    assert (index.name, index.image_size, index.count("train")) == (dataset, size, count)
    cfg = next_command(output)
    assert cfg.name == dataset and Path(cfg.data.root) == Path("data") / dataset
    check(cfg)
    check_data(cfg)
    assert call("prepare", "task=verify", f"dataset={dataset}")[0] == 0


def test_every_data_set_with_images_of_its_own_is_among_them():
    assert set(DOWNLOADS) == set(groups()["data"]) - {"images", "shards", "mixture"}  # whose points are drawn


def test_cifar10_keeps_its_test_images_apart(call, tmp_path):
    filled(tmp_path / "c.tar.gz", cifar("bin"), "tar.gz")
    status, output = call("prepare", "source=c.tar.gz", "dataset=cifar10", "out=c")
    assert status == 0 and "data.root=c" in output and "airplane" in output
    index = read_index(tmp_path / "c")
    assert (index.count("train"), index.count("test"), index.classes) == (35, 7, 10)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_set_of_ones_own(kind, call, tmp_path):
    filled(tmp_path / f"my set.{kind}", TREE, kind)
    status, output = call("prepare", f"source=my set.{kind}")
    assert status == 0 and "2 classes (ant, cat)" in output, output
    index = read_index(tmp_path / "data" / "my_set")
    assert (index.image_size, index.count("train"), index.classes) == (8, 30, 2)
    samples = Samples(index)
    for number in range(30):
        pixels, label = samples[number]
        assert label == int(pixels[0, 0, 0] % 3 > 0)
    assert sorted(samples[n][0][0, 0, 0] for n in range(30)) == list(range(30))
    assert "ant       10  #####" in output and "cat       20  ##########" in output, output
    sheet = Image.open(tmp_path / "data" / "my_set" / "contact_sheet.png")
    assert sheet.size == (8 * 66, 4 * 80)
    cfg = next_command(output)
    assert (cfg.name, cfg.data.name, cfg.data.num_classes, cfg.data.image_size) == ("my_set", "my_set", 2, 8)
    check(cfg)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        check_data(cfg)
    finally:
        os.chdir(here)


def test_arrays_and_another_place(call, tmp_path):
    images = RNG.integers(0, 256, (20, 16, 16, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    status, output = call("prepare", "source=a.npz", "channels=1", "out=else where/a", "format=webp")
    assert status == 0, output
    samples = Samples(read_index(tmp_path / "else where" / "a"))
    assert all((samples[n][0][0] == images[n, ..., 0]).all() for n in range(20))
    assert next_command(output).data.root == "else where/a"


# ---- the same bytes ----


@pytest.fixture(name="church")
def made_church(tmp_path):
    """(the words that make a set of 40 images in 14 shards of two splits, the bytes of it)."""
    filled(tmp_path / "c.zip", {f"{n:03d}.png": image(*RNG.integers(30, 60, 2)) for n in range(40)}, "zip")
    words = ["source=c.zip", "image_size=32", "shard_samples=3", "validation=0.2"]
    assert inside("prepare", [*words, "out=whole", "processes=1"], tmp_path) == 0
    return words, contents(tmp_path / "whole")


def test_processes_do_not_change_a_byte(church, call, tmp_path):
    words, whole = church
    assert call("prepare", *words, "out=three", "processes=3")[0] == 0
    assert contents(tmp_path / "three") == whole
    assert len([name for name in whole if name.endswith(".tar")]) == 14


def test_a_finished_set_is_left_alone_and_one_made_otherwise_is_refused(church, call, tmp_path):
    words, whole = church
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}
    status, output = call("prepare", *words, "out=whole")
    assert status == 0 and "whole is there already" in output and "40 images" in output
    for other, key in [
        ("image_size=16", "image_size: was 32, is 16"), ("resize=box", 'resize: was "lanczos", is "box"'),
        ("validation=0.1", "validation: was 0.2, is 0.1"), ("format=webp", "format"), ("labels_from=none", None),
    ]:  # fmt: skip
        status, output = call("prepare", *words, "out=whole", other)
        assert status == (2 if key else 0) and (key or "") in output, output
    filled(tmp_path / "d.zip", {"1.png": image(40, 40)}, "zip")
    status, output = call("prepare", "source=d.zip", *words[1:], "validation=0", "out=whole")
    assert status == 2 and "source: was" in output and "another out" in output
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").iterdir()}


def test_a_set_that_has_lost_a_file_is_made_whole_again(church, call, tmp_path):
    words, whole = church
    (tmp_path / "whole" / "train-00003.tar").unlink()
    assert call("prepare", *words, "out=whole")[0] == 0
    assert contents(tmp_path / "whole") == whole


@pytest.mark.parametrize("validation", [0.25, 9, 39])
def test_validation_is_chosen_by_the_keys_alone(validation, tmp_path):
    members = {f"{n}.png": coded(n) for n in range(40)}

    def split_of(members, out):
        filled(tmp_path / out, members, "zip")
        assert inside("prepare", [f"source={out}", f"out={out}.set", f"validation={validation}"], tmp_path) == 0
        index = read_index(tmp_path / f"{out}.set")
        return {s: {int(Samples(index, s)[n][0][0, 0, 0]) for n in range(index.count(s))} for s in index.splits}

    split = split_of(members, "a.zip")
    assert split["train"] | split["validation"] == set(range(40)) and not split["train"] & split["validation"]
    if validation >= 1:
        assert len(split["validation"]) == validation
    else:
        assert 2 <= len(split["validation"]) <= 20
        fewer = split_of({k: v for k, v in members.items() if int(k[:-4]) % 2}, "b.zip")
        assert fewer["validation"] == {n for n in split["validation"] if n % 2}  # no image changes sides


# ---- what is bad is counted ----

BAD = {
    "bad/a.png": b"nothing", "bad/b.png": b"", "bad/c.jpg": image(40, 40, "JPEG")[:400],
    "bad/d.jpg": Image.new("CMYK", (40, 40)), "bad/../../e.png": image(40, 40)[:99],
}  # fmt: skip


def with_bad(path):
    buffer = io.BytesIO()
    BAD["bad/d.jpg"].save(buffer, "JPEG")
    return filled(path, {f"{n}.png": image(40, 40) for n in range(20)} | BAD | {"bad/d.jpg": buffer.getvalue()}, "zip")


def test_bad_images_are_an_error_and_leave_nothing_or_are_skipped_and_listed(call, tmp_path):
    with_bad(tmp_path / "x.zip")
    words = ["source=x.zip", "image_size=32", "labels_from=none"]
    status, output = call("prepare", *words)
    assert status == 2 and "cannot be used" in output and "on_bad_sample=skip" in output and "Traceback" not in output
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]
    status, output = call("prepare", *words, "on_bad_sample=skip", "max_bad_share=0.2")
    assert status == 0 and "skipped  5, listed in data/x/skipped.csv" in output, output
    rows = (tmp_path / "data" / "x" / "skipped.csv").read_text().splitlines()
    assert len(rows) == 6 and {row.split(",")[0] for row in rows[1:]} == set(BAD)
    assert "colours of mode CMYK: convert it to RGB" in "".join(rows) and "it is empty" in "".join(rows)
    assert read_index(tmp_path / "data" / "x").count("train") == 20


def test_what_was_finished_before_an_error_is_used_when_the_bad_ones_are_skipped(call, tmp_path):
    with_bad(tmp_path / "x.zip")
    words = ["source=x.zip", "image_size=32", "labels_from=none", "shard_samples=1", "processes=1"]
    assert call("prepare", *words)[0] == 2
    words.append("max_bad_share=1")
    kept = len(list((tmp_path / "data" / "x").glob("*.tar")))
    assert not (tmp_path / "data" / "x" / "index.json").exists()
    assert call("prepare", *words, "on_bad_sample=skip")[0] == 0
    assert call("prepare", *words, "on_bad_sample=skip", "out=fresh")[0] == 0
    assert contents(tmp_path / "fresh") == contents(tmp_path / "data" / "x")
    assert len(list((tmp_path / "fresh").glob("*.tar"))) == 20 >= kept


def test_a_source_of_bad_images_alone_makes_no_set(call, tmp_path):
    filled(tmp_path / "x.zip", {name: b"x" for name in ("a.png", "b.png")}, "zip")
    for share, complaint in ((1, "no image can be used"), (0.9, "2 of 2 images cannot be used")):
        words = ["source=x.zip", "image_size=8", "on_bad_sample=skip", f"max_bad_share={share}"]
        status, output = call("prepare", *words)
        assert status == 2 and complaint in output
        assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_more_bad_images_than_allowed_are_an_error_and_what_is_finished_is_used_when_more_are_allowed(call, tmp_path):
    bad = {f"bad{n}.png": b"nothing" for n in range(5)}
    filled(tmp_path / "x.zip", {f"{n}.png": coded(n) for n in range(15)} | bad, "zip")
    words = ["source=x.zip", "image_size=8", "on_bad_sample=skip", "shard_samples=2", "processes=1"]
    complaint = r"\d of 20 images cannot be used, more than max_bad_share=\S+ allows. The first is 'bad\d.png': it is"
    for share in ("max_bad_share=0.24", "max_bad_share=0", None):
        status, output = call("prepare", *words, *([share] if share else []))
        assert status == 2 and re.search(complaint, output), output
        assert not (tmp_path / "data" / "x" / "index.json").exists()
    status, output = call("prepare", *words, "max_bad_share=0.25")
    assert status == 0 and "skipped  5" in output
    assert call("prepare", *words, "max_bad_share=1", "out=fresh")[0] == 0
    assert contents(tmp_path / "fresh") == contents(tmp_path / "data" / "x")
    status, output = call("prepare", *words, "max_bad_share=1.5")
    assert status == 2 and "max_bad_share=1.5 is outside [0, 1]" in output


def test_names_that_a_terminal_would_obey_are_shown_and_drawn_harmlessly(call, tmp_path):
    names = ["\x1b[2Jclear", "\udcff\udcfe", "a\nb", "1" * 200, "plain"]
    members = {f"{name}/{n}.png": coded(n) for n, name in enumerate(names)}
    filled(tmp_path / "x", members | {"\x1b]0;t\x07": b""}, "folder")
    status, output = call("prepare", "source=x")
    assert status == 0 and "5 classes" in output, output
    assert "\x1b" not in output and r"\x1b[2Jclear" in output and r"\udcff\udcfe" in output and r"a\nb" in output
    assert read_index(tmp_path / "data" / "x").classes == 5


@pytest.mark.parametrize("settings", ["[" * 100_000, "7", '{"settings": [1]}', '{"settings": {}}', "\xff"])
def test_a_folder_whose_record_is_none_is_refused(settings, call, tmp_path):
    filled(tmp_path / "x.zip", {"a.png": coded(1)}, "zip")
    filled(tmp_path / "out", {"prepare.json": settings.encode("latin1"), "index.json": b"{}"}, "folder")
    before = contents(tmp_path)
    status, output = call("prepare", "source=x.zip", "out=out")
    assert status == 2 and "out=out holds" in output and contents(tmp_path) == before, output


# ---- wrong words ----

WRONG = {
    "no source": ([], "source is needed"),
    "unknown data set": (
        ["source=x", "dataset=lsun_churhc"],
        "Unknown data set: dataset=lsun_churhc. Did you mean lsun_church",
    ),
    "no data set": (["source=x", "dataset=shards"], "dataset=shards"),
    "unknown crop": (["source=x", "crop=center"], "crop=center must be one of centre, celeba, adm, ddim, none"),
    "unknown filter": (["source=x", "resize=nearest"], "resize=nearest must be one of lanczos"),
    "format": (["source=x", "format=gif"], "format=gif must be one of png, webp, jpeg"),
    "jpeg without quality": (["source=x", "format=jpeg"], "format=jpeg .* quality=95"),
    "png with quality": (["source=x", "quality=90"], "quality=90, but format=png"),
    "validation": (["source=x", "validation=1.5"], "validation=1.5 is neither a share"),
    "all is validation": (["source=x", "validation=30"], "validation=30 must be below .* only 30"),
    "size": (["source=x", "image_size=big"], "image_size=big is not an integer"),
    "processes": (["source=x", "processes=0"], "processes=0 must be"),
    "mixed sizes": (["source=mixed"], "image_size is needed: the images of source=mixed are 8x8, 9x8"),
    "unreadable": (["source=bad"], "none of the first images can be read"),
    "classes of another set": (["source=x", "dataset=cifar10"], r"cifar10 has 10 classes, source=x has 2 \(ant"),
    "empty folder": (["source=empty"], "source=empty: no image .* it is empty"),
    "no LMDB": (["source=no_lmdb", "dataset=lsun_church"], "source=no_lmdb is not an LMDB"),
    "other files": (["source=x", "out=thesis"], "out=thesis holds other files .such as thesis.tex"),
    "a file": (["source=x", "out=thesis/thesis.tex"], "out=thesis/thesis.tex is a file"),
    "nothing to verify": (["task=verify", "out=empty"], "has no index.json"),
    "verify what": (["task=verify"], "task=verify needs out=FOLDER"),
    "digits as another set": (["source=digits", "dataset=cifar10"], "dataset=cifar10 and source=digits"),
    "colour": (["source=x", "channels=1"], "give channels=3"),
    "no classes": (["source=x", "dataset=cifar10", "labels_from=none"], "cifar10 has 10 classes.* no labels"),
}


@pytest.mark.parametrize("words, complaint", WRONG.values(), ids=WRONG)
def test_wrong_words_are_refused_and_nothing_is_written(words, complaint, call, tmp_path):
    filled(tmp_path / "x", TREE, "folder")
    filled(tmp_path / "mixed", {"a.png": image(8, 8), "b.png": image(9, 8)}, "folder")
    filled(tmp_path / "bad", {"a.png": b"x"}, "folder")
    filled(tmp_path / "no_lmdb", {"data.mdb": b"x" * 9999}, "folder")
    filled(tmp_path / "thesis", {"thesis.tex": b"42", "prepare.json": b"{}"}, "folder")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    status, output = call("prepare", *words)
    assert status == 2 and re.search(complaint, output), output
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert contents(tmp_path) == before and not (tmp_path / "data").exists()


def test_two_at_once_do_not_write_into_one_folder(church, call, tmp_path):
    words, _ = church
    lock = tmp_path / "busy" / ".prepare" / "lock"
    lock.parent.mkdir(parents=True)
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX)"
    code += "; print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        status, output = call("prepare", *words, "out=busy")
        assert status == 2 and "out=busy is in use by another process" in output
    finally:
        holder.kill()
        holder.wait()
    assert call("prepare", *words, "out=busy")[0] == 0


def test_a_rule_of_conf_is_one_that_prepare_knows():
    from typing import get_args

    from diffusion.data.prepare.image import Crop, Resize

    for name in set(groups()["data"]) - {"mixture"}:
        rule = OmegaConf.to_container(described(name).rule)
        assert set(rule) == {"crop", "resize"} and rule["crop"] in get_args(Crop) and rule["resize"] in get_args(Resize)


# ---- from the download to the samples, with the network of the paper ----


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["lsun_church", "celebahq"])
def test_from_the_download_to_samples_by_the_commands_that_are_printed(dataset, command, tmp_path):
    words = shlex.split(str(described(dataset).prepare).removeprefix("python -m diffusion.prepare "))
    source = tmp_path / dict(word.split("=") for word in words)["source"]
    if dataset == "lsun_church":
        lsun(source, 64, 256)
    else:
        filled(source, {f"{n:05d}.jpg": image(256, 256, "JPEG") for n in range(64)}, "folder")
    printed = command("prepare", *words, check=0).stdout
    train = shlex.split(re.search(r"^Train on it: python -m diffusion\.train(.*)$", printed, re.M)[1])
    small = ["data.batch_size=2", "trainer.max_steps=2", "callbacks=none"]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    command("train", *train, *small, check=0, **threads)
    run = f"runs/{dataset}"
    quick = ["num_images=1", "sampler=ddim", "sampler.num_steps=2"]
    command("sample", f"checkpoint={run}", "out=samples", *quick, check=0, **threads)
    assert (tmp_path / run / "report.html").stat().st_size > 1000
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (1, 256, 256, 3)
