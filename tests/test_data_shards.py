"""Shards on disk: written whole and always the same, read back, and refused when damaged."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffusion.data.digit_sets import write_digits
from diffusion.data.digits import DigitsDataModule
from diffusion.data.shards.changes import BadSample, DataChanged
from diffusion.data.shards.index import INDEX_NAME, MissingData, read_index
from diffusion.data.shards.samples import Samples, decode_image, decode_label
from diffusion.data.shards.writer import ShardWriter, encode_png
from diffusion.files import sha256_of

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 3, 6, 6), dtype=np.uint8)


def write(root, images=PIXELS, classes=5, **limits):
    with ShardWriter(root, "noise", image_size=6, channels=3, classes=classes, **{"max_samples": 7} | limits) as writer:
        for number, image in enumerate(images):
            writer.write(image, number % classes if classes else None, split="train" if number < 16 else "test")
    return root


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def encoded(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


# ---- writing and reading ----


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_what_is_written_is_read_back(tmp_path, cache):
    index = read_index(write(tmp_path))
    assert (index.name, index.image_size, index.channels, index.classes) == ("noise", 6, 3, 5)
    assert index.splits == ("train", "test")
    assert [shard.samples for shard in index.of_split("train")] == [7, 7, 2]
    assert (index.count("train"), index.count("test")) == (16, 4)
    for split, first in (("train", 0), ("test", 16)):
        samples = Samples(index, split, cache)
        for number in [*range(len(samples)), *range(len(samples))]:
            image, label = samples[number]
            assert (image == PIXELS[first + number]).all() and label == (first + number) % 5
        with pytest.raises(IndexError):
            samples[len(samples)]


def test_webdataset_alone_reads_the_shards(tmp_path):
    root = write(tmp_path)
    urls = [str(root / shard.path) for shard in read_index(root).of_split("train")]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert len(read) == 16
    for number, (image, label) in enumerate(read):
        assert (image == PIXELS[number].transpose(1, 2, 0)).all() and label == number % 5


def test_the_index_states_the_files_and_the_offsets_are_those_of_the_tar(tmp_path):
    index = read_index(write(tmp_path))
    for shard in index.shards:
        path = index.path(shard)
        assert (path.stat().st_size, sha256_of(path)) == (shard.bytes, shard.sha256)
        with tarfile.open(path) as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
        expected = [members[f"{k}.png"] + members[f"{k}.cls"] for k in sorted({name.split(".")[0] for name in members})]
        assert index.offsets(shard).tolist() == [list(row) for row in expected]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b"))


def test_a_full_shard_is_closed_by_its_bytes_too(tmp_path):
    index = read_index(write(tmp_path, classes=0, max_samples=1000, max_bytes=4096))
    assert all(4096 <= shard.bytes < 4096 + 10_240 + 2048 for shard in index.of_split("train"))
    assert len(index.of_split("train")) > 2 and index.count("train") == 16


def test_images_keep_their_encoding_and_an_unlabelled_set_has_no_labels(tmp_path):
    rows = PIXELS[0].transpose(1, 2, 0)
    formats = {"jpg": encoded(rows, "JPEG"), "webp": encoded(rows, "WEBP", lossless=True), "npy": npy(PIXELS[0])}
    with ShardWriter(tmp_path, "mixed", image_size=6, channels=3, classes=0) as writer:
        for extension, data in formats.items():
            writer.write(data, extension=extension)
    samples = Samples(read_index(tmp_path))
    images = [samples[number][0] for number in range(3)]
    assert (images[0] == np.asarray(Image.open(io.BytesIO(formats["jpg"]))).transpose(2, 0, 1)).all()
    assert (images[1] == PIXELS[0]).all() and (images[2] == PIXELS[0]).all()
    assert [samples[number][1] for number in range(3)] == [None] * 3


@pytest.mark.parametrize(
    "sample, complaint",
    [
        (dict(image=PIXELS[0, :, :5], label=1), r"uint8 \(3, 5, 6\), expected uint8 \(3, 6, 6\)"),
        (dict(image=PIXELS[0].astype(float), label=1), r"float64"),
        (dict(image=PIXELS[0], label=5), r"label=5, expected an integer from 0 to 4"),
        (dict(image=PIXELS[0]), r"label=None, expected an integer from 0 to 4"),
        (dict(image=b"x", label=1, extension="pickle"), r"extension 'pickle'"),
    ],
)
def test_a_sample_that_does_not_belong_is_refused_and_nothing_is_left(tmp_path, sample, complaint):
    with pytest.raises(ValueError, match=complaint):
        with ShardWriter(tmp_path, "noise", image_size=6, channels=3, classes=5, max_samples=3) as writer:
            for number in range(8):  # two whole shards and a half
                writer.write(PIXELS[number], 0)
            writer.write(**sample)
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_samples_is_refused_and_a_set_that_fails_at_the_last_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no sample was written"):
        with ShardWriter(tmp_path, "noise", image_size=6, channels=3, classes=0):
            pass

    def full(index):
        raise OSError("no space left")

    monkeypatch.setattr("diffusion.data.shards.writer.write_index", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the index refuses ----


def test_missing_data_name_the_key_the_folder_and_the_command(tmp_path):
    with pytest.raises(MissingData, match=rf"data\.root={tmp_path}/none: data set not found, .*with: make me"):
        read_index(tmp_path / "none", make="make me")
    with pytest.raises(MissingData, match=r"has no index\.json"):
        read_index(tmp_path)
    index = read_index(write(tmp_path))
    index.path(index.shards[1]).unlink()
    with pytest.raises(MissingData, match=r"train-00001\.tar.* is missing"):
        read_index(tmp_path)
    with pytest.raises(ValueError, match=r"data\.split=val .* Give one of train, test"):
        index.of_split("val")


@pytest.mark.parametrize("part", ["train-00002.tar", "train-00002.tar.offsets"])
def test_a_truncated_file_is_named(tmp_path, part):
    file = write(tmp_path) / part
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"shard file {part} has \d+ bytes, but .* truncated"):
        read_index(tmp_path)


SHARD = {"path": "x.tar", "split": "a", "samples": 1, "bytes": 1, "sha256": "0" * 64, "offsets_sha256": "0" * 64}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"version": 1}, "format version 1, expected 2"),
        ({"image_size": "6"}, "damaged.*image_size"),
        ({"shards": []}, "damaged.*no shards"),
        ({"shards": [SHARD | {"path": "../x.tar"}]}, r"damaged.*\.\./x"),
        ({"shards": [SHARD | {"sha256": "0" * 63}]}, "damaged.*sha256 of x.tar"),
        ({"shards": [SHARD | {"samples": 0}]}, "damaged.*samples of x.tar"),
        ({"shards": [{"path": "x.tar"}]}, "damaged"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, change, complaint):
    file = write(tmp_path) / INDEX_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=complaint):
        read_index(tmp_path)
    for text in ("{", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ValueError, match="not JSON"):
            read_index(tmp_path)


@pytest.mark.parametrize("name, complaint", [("a\0b", "damaged.*path"), ("y" * 5000, r"cannot be read \(")])
def test_a_shard_of_an_impossible_name_is_refused(tmp_path, name, complaint):
    file = write(tmp_path) / INDEX_NAME
    content = json.loads(file.read_text())
    content["shards"][1]["path"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"data\.root=.*{complaint}"):
        read_index(tmp_path)


# ---- damaged and hostile content ----


def overwrite(index, sample, data):
    """Put other bytes in the place of an image of the first shard, and keep its size."""
    offset, size = (int(x) for x in index.offsets(index.shards[0])[sample][:2])
    path = index.path(index.shards[0])
    content = path.read_bytes()
    path.write_bytes(content[:offset] + data[:size].ljust(size, b"\0") + content[offset + size :])


def test_damage_after_writing_is_told_with_shard_and_sample(tmp_path):
    index = read_index(write(tmp_path))
    overwrite(index, 3, b"\x89PNG\r\n\x1a\n and then nonsense")
    samples = Samples(read_index(tmp_path))
    assert (samples[2][0] == PIXELS[2]).all()
    complaint = r"shard train-00000\.tar has changed: sample 3 \('000000003\.png'\) does not match the.*prepare"
    with pytest.raises(DataChanged, match=complaint):
        samples[3]


def test_a_shard_truncated_while_it_is_read_is_told(tmp_path):
    index = read_index(write(tmp_path))
    samples = Samples(index)
    samples[0]
    with open(index.path(index.shards[0]), "r+b") as file:
        file.truncate(2048)
    with pytest.raises(
        DataChanged, match=r"train-00000\.tar has changed: it has 2048 bytes, but index\.json states \d+"
    ):
        samples[6]


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_is_ever_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    trap = np.empty((3, 6, 6), dtype=object)
    trap.fill(Trap(sprung))
    images = [npy(trap), pickle.dumps(Trap(sprung)), PIXELS.tobytes()]
    with ShardWriter(tmp_path / "set", "traps", image_size=6, channels=3, classes=0) as writer:
        for data in images:
            writer.write(data, extension="npy")
    samples = Samples(read_index(tmp_path / "set"))
    for number in range(len(images)):
        with pytest.raises(BadSample, match="has not changed"):
            samples[number]
    with pytest.raises(ValueError):
        decode_label(pickle.dumps(Trap(sprung)), 10)
    assert not sprung.exists()
    pickle.loads(images[1]).close()
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    "data",
    [
        encode_png(PIXELS[0, :, :5, :5]),
        npy(PIXELS[0].astype(np.float32)),
        npy(PIXELS[0, 0]),
        encoded(PIXELS[0, 0], "GIF"),
    ],
    ids=["smaller", "floats", "channels", "gif"],
)
def test_images_that_are_not_the_data_sets_are_refused(data):
    with pytest.raises((ValueError, OSError)):
        decode_image(data, channels=3, image_size=6)


def test_a_label_is_an_integer_or_json():
    assert decode_label(b"7", 10) == 7 and decode_label(b'{"label": 3, "caption": "a"}', 10) == 3
    for data in (b"10", b"-1", b"1.5", b"true", b"{}", b"", b"cat"):
        with pytest.raises(ValueError):
            decode_label(data, 10)


def test_an_unknown_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.cache=disk must be one of auto, memory, none"):
        Samples(read_index(write(tmp_path)), cache="disk")


# ---- the digits ----


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    data, digits = DigitsDataModule(tmp_path / "digits", batch_size=64), load_digits()
    assert (data.num_images, data.image_size, data.channels, data.num_classes, data.lanes) == (1797, 8, 1, 10, 8)
    assert len(data.index.shards) == 8
    for number in range(1797):
        image, label = data.samples[number]
        assert image.shape == (1, 8, 8) and label == digits.target[number]
        assert np.abs(image[0] / 255 * 16 - digits.images[number]).max() < 16 / 255 / 2 + 1e-9


def test_digits_are_written_once_and_again_when_a_shard_is_gone(tmp_path):
    root = tmp_path / "digits"
    write_digits(root)
    first = contents(root)
    written = (root / INDEX_NAME).stat().st_mtime_ns
    DigitsDataModule(root, batch_size=64).prepare_data()
    assert (root / INDEX_NAME).stat().st_mtime_ns == written
    (root / "train-00003.tar").unlink()
    DigitsDataModule(root, batch_size=64).prepare_data()
    assert contents(root) == first and [file.name for file in tmp_path.iterdir()] == ["digits"]
