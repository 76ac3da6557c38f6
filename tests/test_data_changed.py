"""Shards that change while they are in use: named, whatever happened to them, and never trained on."""

import hashlib
import io
import json
import mmap
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from changing import CHANGES, HARMLESS, delete, overwrite, overwrite_a_sample, swap, without_digests
from numbered import BATCH, CLASSES, COUNT, number_of, pixels, plan_of, take

from diffusion.data.shards.changes import BadSample, DataChanged
from diffusion.data.shards.index import DIGESTS, INDEX_NAME, digests_of, read_index, sample_digest
from diffusion.data.shards.layout import Layout
from diffusion.data.shards.readers import LocalShards
from diffusion.data.shards.samples import Samples
from diffusion.data.shards.stream import StreamLoader
from diffusion.data.shards.writer import ShardWriter
from diffusion.files import cache_folder

CHANGED, OTHER = "train-00004.tar", "train-00007.tar"
SMALL = 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own, and glances that are not waited for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("diffusion.data.shards.readers.LOOKED", 0.02)


@pytest.fixture(params=["with digests", "without digests"])
def made(request, root, tmp_path):
    """A numbered set of either kind."""
    shutil.copytree(root, tmp_path / "set")
    return tmp_path / "set" if request.param == "with digests" else without_digests(tmp_path / "set")


def met_until_changed(loader, first, seconds=30.0):
    """Take batches, which must be the right ones, until DataChanged; the error."""
    deadline, step = time.monotonic() + seconds, first
    with pytest.raises(DataChanged) as caught:
        while time.monotonic() < deadline:
            batch = next(loader)
            expected = plan_of(loader.samples, SMALL).locate(np.arange(step * SMALL, (step + 1) * SMALL))[1]
            assert (number_of(batch["image"]).numpy() == expected).all()
            assert (batch["label"].numpy() == expected % CLASSES).all()
            step += 1
    return caught.value


class Loading:
    """Batches of samples."""

    def __init__(self, samples, workers=0):
        self.samples = samples
        self._batches = iter(StreamLoader(samples, plan_of(samples, SMALL), Layout(SMALL), num_workers=workers))

    def __next__(self):
        return next(self._batches)


# ---- the matrix ----


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_in_mid_epoch_is_noticed_and_named(made, change, cache, workers):
    loader = Loading(Samples(read_index(made), cache=cache), workers)
    for _ in range(60):  # an epoch, and half of the next
        next(loader)
    change(made / CHANGED, made / OTHER)
    error = met_until_changed(loader, 60)
    assert f"data.root={made}: shard train-0000" in str(error) and "Restore that file" in str(error)
    assert CHANGED in str(error) or (change is swap and OTHER in str(error))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("opened", [True, False])
def test_a_look_before_a_save_finds_a_change_of_a_shard_in_use_and_what_is_gone_of_all(made, change, opened):
    samples = Samples(read_index(made), cache="memory")
    if opened:
        samples[4 * 93], samples[7 * 93]
    samples.look()
    change(made / CHANGED, made / OTHER)
    if opened or change.__name__ in ("cut", "delete"):
        with pytest.raises(DataChanged, match=f"{CHANGED}|{OTHER}"):
            samples.look()
    else:  # it is noticed when it is opened or read
        samples.look()
        with pytest.raises(DataChanged, match=CHANGED):
            for number in range(4 * 93, 5 * 93):
                samples[number]


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_was_touched_or_copied_back_has_not_changed(made, change, workers):
    loader = Loading(Samples(read_index(made)), workers)
    for step in range(150):
        expected = plan_of(loader.samples, SMALL).locate(np.arange(step * SMALL, (step + 1) * SMALL))[1]
        assert (number_of(next(loader)["image"]).numpy() == expected).all()
        if step % 30 == 10:
            HARMLESS[change](made / CHANGED)
            loader.samples.look()


@pytest.mark.parametrize("suffix", [".offsets", ".xxh3"])
@pytest.mark.parametrize("how", ["other bytes", "gone"])
def test_offsets_and_digests_that_changed_are_named(root, tmp_path, suffix, how):
    made = shutil.copytree(root, tmp_path / "set")
    index, file = read_index(made), made / (CHANGED + suffix)
    if how == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[40] ^= 1
        file.write_bytes(data)
    for on_bad_sample in ("error", "skip"):
        with pytest.raises(DataChanged, match=rf"shard {CHANGED}{suffix} has changed: .*(sha256|missing)"):
            Samples(index, on_bad_sample=on_bad_sample).batch(np.array([4 * 93]))


# ---- samples that are skipped ----


def test_where_bad_samples_are_skipped_a_changed_one_is_and_a_changed_shard_is_not(root, tmp_path, capfd):
    made = shutil.copytree(root, tmp_path / "set")
    samples = Samples(read_index(made), on_bad_sample="skip")
    samples.batch(np.arange(COUNT))
    overwrite_a_sample(made / CHANGED, None)
    images, labels, stand_ins = samples.batch(np.arange(COUNT))
    assert np.flatnonzero(stand_ins).tolist() == [4 * 93 + 17] and labels[4 * 93 + 17] == (4 * 93 + 18) % CLASSES
    assert (images[4 * 93 + 17].numpy() == pixels(4 * 93 + 18)).all()
    said = capfd.readouterr().err
    assert f"skipped: data.root={made}: shard {CHANGED} has changed: sample 17 ('000000389.png') does not match" in said
    assert "same command" not in said
    samples.look()  # such a set may have damaged samples
    for change in (swap, delete):
        change(made / CHANGED, made / OTHER)
        time.sleep(0.03)  # LOOKED, as it is here
        with pytest.raises(DataChanged, match=f"{CHANGED}|{OTHER}"):
            samples.batch(np.arange(COUNT))


def test_a_set_without_digests_cannot_tell_which_samples_changed(root, tmp_path):
    made = without_digests(shutil.copytree(root, tmp_path / "set"))
    samples = Samples(read_index(made), on_bad_sample="skip")
    overwrite_a_sample(made / CHANGED, None)
    with pytest.raises(DataChanged, match=rf"{CHANGED} has changed: it does not match the sha256"):
        samples.batch(np.arange(COUNT))


# ---- sets without digests: what is read once, and what is remembered ----


class Reading(LocalShards):
    """Shards that note in a file which of them are read whole, whatever process does it."""

    def __init__(self, index, notes):
        super().__init__(index)
        self.notes = notes

    def _other_sha256(self, shard, descriptor):
        with open(self.notes, "a") as file:
            file.write(f"{shard.path}\n")
        return super()._other_sha256(shard, descriptor)


def read_whole(made, notes, workers=0):
    """Take batches; the shards that were read whole for it."""
    notes.write_text("")
    index = read_index(made)
    samples = Samples(index, shards=Reading(index, notes))
    take(StreamLoader(samples, plan_of(samples), Layout(BATCH), num_workers=workers), 3)
    return sorted(notes.read_text().split())


def settled(monkeypatch, seconds):
    """How long ago a file must have been written to be remembered as sound."""
    monkeypatch.setattr("diffusion.data.shards.changes.SETTLED", seconds)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_is_read_whole_once_for_all_processes_and_starts(root, tmp_path, monkeypatch, workers):
    made = without_digests(shutil.copytree(root, tmp_path / "set"))
    names, notes = sorted(shard.path for shard in read_index(made).shards), tmp_path / "notes"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of no other test
    settled(monkeypatch, 1000.0)  # what was written a moment ago is not remembered for the next start
    assert read_whole(made, notes, workers) == names
    assert not (cache_folder() / "verified").exists()
    settled(monkeypatch, 0.1)
    time.sleep(0.2)
    assert read_whole(made, notes, workers) == names
    assert len(list((cache_folder() / "verified").iterdir())) == len(names)
    assert read_whole(made, notes, workers) == []
    settled(monkeypatch, 0.0)  # else a slow machine would check the new file a second time
    HARMLESS["copied back"](made / CHANGED)
    assert read_whole(made, notes, workers) == [CHANGED]


def test_a_set_with_digests_is_not_read_whole(root, tmp_path):
    assert read_whole(root, tmp_path / "notes") == []


def test_a_cache_folder_that_cannot_be_written_is_no_error(root, tmp_path, monkeypatch):
    made = without_digests(shutil.copytree(root, tmp_path / "set"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settled(monkeypatch, 0.0)
    assert len(read_whole(made, tmp_path / "notes")) == 11


def test_what_changes_without_a_sign_is_found_at_the_second_check_and_dated_to_the_first(root, tmp_path, monkeypatch):
    """Through a mapped page that is dirty already, a file changes and none of its times does."""
    made = without_digests(shutil.copytree(root, tmp_path / "set"))
    at = read_index(made).offsets(read_index(made).shards[4])[17][0]
    with open(made / CHANGED, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        settled(monkeypatch, 3.0)
        content[int(at) + 30] = content[int(at) + 30]
        samples, before = Samples(read_index(made)), time.time()
        samples[4 * 93]
        after, seen = time.time(), os.stat(made / CHANGED)
        content[int(at) + 30] ^= 255
        assert os.stat(made / CHANGED).st_ctime_ns == seen.st_ctime_ns
        samples.look()
        time.sleep(3.1)
        with pytest.raises(DataChanged, match=CHANGED) as caught:
            samples.look()
    assert before <= caught.value.since <= after


# ---- the format ----


def npy(value):
    data = io.BytesIO()
    np.save(data, np.full((1, 2, 2), value, np.uint8))
    return data.getvalue()


def write_arrays(root):
    with ShardWriter(root, "arrays", image_size=2, channels=1, classes=3, max_samples=4) as writer:
        for number in range(10):
            writer.write(npy(number), number % 3, extension="npy")
    return root


def test_a_set_is_recognised_by_the_same_digest_as_before(tmp_path):
    """The expected value was computed by the program as it was before sets had digests."""
    index = read_index(write_arrays(tmp_path))
    assert index.digest == "5545b0fce357cdfb234fcf4ca7221614beeef3868c1720fa6fa54efce3694301"
    assert all(shard.digests_sha256 for shard in index.shards)
    older = read_index(without_digests(tmp_path))
    assert older.digest == index.digest and not any(shard.digests_sha256 for shard in older.shards)


def test_what_is_kept_of_images_is_not_found_for_a_set_with_other_digests(tmp_path):
    index = read_index(write_arrays(tmp_path))
    first = index.shards[0]
    other = replace(index, shards=(replace(first, digests_sha256="0" * 64), *index.shards[1:]))
    assert other.digest == index.digest and other.content != index.content
    older = read_index(without_digests(tmp_path))
    assert older.content == older.digest


def test_the_digests_are_those_of_the_samples_and_apart_from_what_older_programs_read(tmp_path):
    index = read_index(write_arrays(tmp_path))
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    assert content["version"] == 2
    assert {*content["shards"][0]} == {"path", "split", "samples", "bytes", "sha256", "offsets_sha256"}
    met = []
    for shard in index.shards:
        data = (tmp_path / f"{shard.path}.xxh3").read_bytes()
        assert content[DIGESTS][shard.path] == hashlib.sha256(data).hexdigest()
        met += np.frombuffer(data, "<u8").tolist()
        assert digests_of(data).tolist() == met[-shard.samples :]
    assert met == [sample_digest(npy(number), b"%d" % (number % 3)) for number in range(10)]
    assert sample_digest(b"", b"") == 0x2D06800538D394C2  # of xxh3_64, seed 0, as its specification has it


@pytest.mark.parametrize("digests", [[], {"train-00000.tar": 5}, {"train-00000.tar": "0" * 63}])
def test_an_index_with_other_things_for_digests_is_refused(tmp_path, digests):
    file = write_arrays(tmp_path) / INDEX_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {DIGESTS: digests}))
    with pytest.raises(ValueError, match="index.json is damaged"):
        read_index(tmp_path)


def test_an_error_out_of_a_loader_process_is_the_same(made):
    loader = Loading(Samples(read_index(made)), workers=2)
    next(loader)
    overwrite(made / CHANGED, made / OTHER)
    error = met_until_changed(loader, 1)
    assert isinstance(error, BadSample) and error.whole and error.since is None and error.exit_status == 2
