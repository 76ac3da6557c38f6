"""Every source lists its images in an order of its own, can begin anywhere, and runs nothing that it reads."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion.data.sources.cifar import CLASSES
from diffusion.data.sources.opening import open_source

RNG = np.random.default_rng(3)


def coded(number, kind="PNG"):
    """An image that says which it is."""
    buffer = io.BytesIO()
    exact = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(buffer, kind, **exact)
    return buffer.getvalue()


def number_of(data):
    return np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0] if isinstance(data, bytes) else data[0, 0, 0]


def filled(path, members, kind):
    """A folder, zip or tar with these members."""
    if kind == "folder":
        for name, data in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def listed(source):
    return [(e.key, e.split, e.label, int(number_of(e.read()))) for e in source.entries()]


def starts_anywhere(source):
    """Walking on from an entry's place gives the rest of the walk."""
    whole = [(e.place, e.key) for e in source.entries()]
    for begin in (0, 1, len(whole) // 2, len(whole) - 1):
        assert [(e.place, e.key) for e in source.entries(whole[begin][0])] == whole[begin:]


# ---- files ----

TREE = {f"set/{'cat' if n % 3 else 'ant'}/{n:03d}.png": coded(n) for n in range(30)}
NOISE = {"set/readme.txt": b"x", "set/.hidden/a.png": b"", "__MACOSX/set/cat/._000.png": b"", "set/a.gif": b"GIF89a"}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_folder_a_zip_and_a_tar_of_the_same_files_are_the_same_source(kind, tmp_path):
    members = dict(reversed((TREE | NOISE).items())) if kind == "zip" else TREE | NOISE
    source = open_source(filled(tmp_path / f"x.{kind}", members, kind))
    assert source.classes == ("ant", "cat")
    assert source.ignored == ["set/.hidden/a.png (hidden)", "set/a.gif", "set/readme.txt"]
    found = listed(source)
    assert sorted(found) == sorted((name, "train", int(n % 3 > 0), n) for n, name in enumerate(TREE))
    other = open_source(filled(tmp_path / "y", TREE, "folder"))
    assert found == listed(other)
    starts_anywhere(source)
    switches = np.count_nonzero(np.diff([label for _, _, label, _ in found]))
    assert switches > 5  # the classes are mixed: sorted by name, they would switch once


def test_the_order_is_the_same_on_every_machine(tmp_path):
    members = {f"{n}.png": coded(n) for n in range(8)}

    def digest(name):
        return hashlib.blake2b(name.encode(), digest_size=8, person=b"order").digest()[::-1]

    source = open_source(filled(tmp_path / "x", members, "folder"))
    assert [e.key for e in source.entries()] == sorted(members, key=digest)


def test_folders_named_train_and_test_are_splits(tmp_path):
    members = {f"x/{s}/{c}/{n}.png": coded(n) for s in ("train", "test", "valid") for c in "ba" for n in range(2)}
    found = listed(open_source(filled(tmp_path / "x.zip", members, "zip")))
    assert {(k.split("/")[1], split) for k, split, _, _ in found} == {
        ("train", "train"), ("test", "test"), ("valid", "validation")
    }  # fmt: skip
    assert {(k.split("/")[2], label) for k, _, label, _ in found} == {("a", 0), ("b", 1)}
    one = {name.replace("x/train", "test"): data for name, data in members.items() if "train" in name}
    assert {split for _, split, _, _ in listed(open_source(filled(tmp_path / "y.zip", one, "zip")))} == {"train"}


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    source = open_source(filled(tmp_path / "x", {f"{n}/a.png": coded(n) for n in range(12)}, "folder"))
    assert source.classes == tuple(str(n) for n in range(12))
    assert all(label == number for _, _, label, number in listed(source))


FLAT = {f"{n}.png": coded(n) for n in range(6)}
TABLES = {
    "edm": ("dataset.json", json.dumps({"labels": [[name, n % 4] for n, name in enumerate(FLAT)]}), lambda n: n % 4),
    "json": ("l.json", json.dumps({name: f"c{n % 2}" for n, name in enumerate(FLAT)}), lambda n: n % 2),
    "csv": ("l.csv", "".join(f"{name},{n % 3}\n" for n, name in enumerate(FLAT)), lambda n: n % 3),
    "csv with a head": ("l.csv", "file,class\n" + "".join(f"{n},{'yx'[i % 2]}\n" for i, n in enumerate(FLAT)),
                        lambda n: 1 - n % 2),
}  # fmt: skip


@pytest.mark.parametrize("name, text, label_of", TABLES.values(), ids=TABLES)
def test_labels_come_from_a_table(name, text, label_of, tmp_path):
    if name == "dataset.json":
        source = open_source(filled(tmp_path / "x.zip", FLAT | {f"{name}": text.encode()}, "zip"))
    else:
        (tmp_path / name).write_text(text)
        source = open_source(filled(tmp_path / "x.zip", FLAT, "zip"), labels_from=str(tmp_path / name))
    assert all(label == label_of(number) for _, _, label, number in listed(source))
    assert len(source.classes) == max(map(label_of, range(6))) + 1


def test_labels_can_be_left_out_and_unlabelled_images_have_none(tmp_path):
    path = filled(tmp_path / "x", TREE, "folder")
    assert open_source(path, labels_from="none").classes == ()
    assert open_source(filled(tmp_path / "y", FLAT, "folder")).classes == ()


@pytest.mark.parametrize(
    "labels_from, text, complaint",
    [
        ("folders", None, "needs at least two folders"),
        ("l.csv", "0.png,1\n", "5 images have no label, such as '"),
        ("l.json", "{", "must be JSON or CSV with a name and a label"),
        ("l.json", json.dumps({name: -1 for name in FLAT}), "labels are from -1 to -1"),
        ("l.json", json.dumps({name: [1, 0] for name in FLAT}), "is neither an integer nor text"),
        ("nowhere.csv", None, "cannot be read: No such file"),
    ],
)
def test_labels_that_cannot_be_had_are_refused(labels_from, text, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / labels_from).write_text(text)
    filled(tmp_path / "x", FLAT, "folder")
    with pytest.raises(ValueError, match=f"labels_from={labels_from}.*({complaint})"):
        open_source("x", labels_from=labels_from)


@pytest.mark.parametrize(
    "name, make, complaint",
    [
        ("none", lambda p: None, "file or folder not found.*source=digits"),
        ("empty", lambda p: p.mkdir(), "no image .* in this folder; it is empty"),
        ("texts", lambda p: filled(p, {"a.txt": b"", "b.txt": b""}, "folder"), "it has 2 other files, .* '.\\.txt'"),
        ("lsun.zip", lambda p: filled(p, {"c/data.mdb": b""}, "zip"), "holds an LMDB.*Unpack it first"),
        ("a.txt", lambda p: p.write_text("x"), "is neither an LMDB"),
        ("a.tar.gz", lambda p: filled(p, FLAT, "tar.gz"), "a compressed tar of images must be unpacked first"),
        ("a.tar.xz", lambda p: p.write_bytes(lzma.compress(b"x")), "is compressed by xz. Unpack it first"),
        ("a.bz2", lambda p: p.write_bytes(bz2.compress(b"x")), "is compressed by bzip2. Unpack it first"),
        ("a.gz", lambda p: p.write_bytes(gzip.compress(b"x")), "is compressed by gzip. Unpack it first"),
        ("cut.zip", lambda p: p.write_bytes(filled(p, FLAT, "zip").read_bytes()[:-30]), "may be truncated"),
        ("cut.tar.gz", lambda p: p.write_bytes(filled(p, {"a": RNG.bytes(99_999)}, "tar.gz").read_bytes()[:-9999]),
         "damaged or truncated"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused_by_name(name, make, complaint, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"source=.*{name}.*{complaint}"):
        open_source(tmp_path / name)


# ---- CIFAR-10 ----

ROWS = 7
PIXELS = RNG.integers(0, 256, (6, ROWS, 3072), dtype=np.uint8)
LABELS = RNG.integers(0, 10, (6, ROWS))
BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


class Old(pickle._Pickler):
    """Writes strings as Python 2 did, which is what CIFAR-10's pickles hold."""

    def save_str(self, text):
        data = text.encode("latin1")
        self.write(b"T" + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    def save_bytes(self, data):
        self.save_str(data.decode("latin1"))

    dispatch = pickle._Pickler.dispatch | {str: save_str, bytes: save_bytes}


def pickled(content, old=True):
    buffer = io.BytesIO()
    (Old if old else pickle.Pickler)(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def cifar(form, old=True):
    names = zip(BATCHES, PIXELS, LABELS.tolist(), strict=True)
    if form == "bin":
        return {f"cifar-10-batches-bin/{n}.bin": np.hstack([np.uint8(y)[:, None], x]).tobytes() for n, x, y in names}
    key = (lambda k: k) if old else (lambda k: k.encode())
    return {f"cifar-10-batches-py/{n}": pickled({key("data"): x, key("labels"): y, key("filenames"): ["a.png"]}, old)
            for n, x, y in names}  # fmt: skip


@pytest.mark.parametrize("old", [True, False], ids=["python 2", "python 3"])
@pytest.mark.parametrize("kind", ["tar.gz", "folder", "inner folder", "tar"])
@pytest.mark.parametrize("form", ["py", "bin"])
def test_cifar10_is_read_from_both_archives_packed_and_unpacked(form, kind, old, tmp_path):
    path = filled(tmp_path / f"x.{kind}", cifar(form, old), kind.removeprefix("inner "))
    source = open_source(path / f"cifar-10-batches-{form}" if kind == "inner folder" else path)
    assert source.classes == CLASSES
    entries = list(source.entries())
    assert [e.split for e in entries] == ["train"] * 5 * ROWS + ["test"] * ROWS
    assert [e.label for e in entries] == LABELS.ravel().tolist()
    assert entries[ROWS + 2].key == "data_batch_2-00000002"
    for entry, row in zip(entries, PIXELS.reshape(-1, 3, 32, 32), strict=True):
        assert (entry.read() == row.transpose(1, 2, 0)).all()
    starts_anywhere(source)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_of_cifar10_calls_nothing(tmp_path):
    sprung = tmp_path / "sprung"
    objects = np.empty((ROWS, 3072), dtype=object)
    objects[0, 0] = Trap(sprung)
    good = {"data": PIXELS[0], "labels": LABELS[0].tolist()}
    bad = {
        "io.open": Trap(sprung),
        "open": {"data": Trap(sprung), "labels": [0]},
        "not allowed": {**good, "more": [objects]},
        "is not uint8": {**good, "data": PIXELS[0].astype(np.float32)},
        "not uint8": {**good, "labels": [0] * 3},
        "outside 0..9": {**good, "labels": [10] * ROWS},
        "no table": [1, 2],
        "it uses the encoding 'rot13'": Rot(),
    }
    for complaint, content in bad.items():
        members = cifar("py") | {"cifar-10-batches-py/data_batch_3": pickled(content, False)}
        path = filled(tmp_path / "x.tar.gz", members, "tar.gz")
        with pytest.raises(ValueError, match=f"data_batch_3 is not a batch of CIFAR-10.*({complaint}|has no data)"):
            open_source(path)
    much = {"more than 1,000,000 opcodes": b"]" * 2_000_000, "more than 33,554,432 bytes": bytes(1 << 26)}
    for complaint, batch in much.items():
        filled(tmp_path / "x.tar.gz", cifar("py") | {"cifar-10-batches-py/data_batch_3": batch}, "tar.gz")
        with pytest.raises(ValueError, match=f"data_batch_3 is not a batch of CIFAR-10: .*{complaint}"):
            open_source(tmp_path / "x.tar.gz")
    huge = b"\x80\x02]r" + (0xFFFFFFFF).to_bytes(4, "little") + b"."  # a place in the memo that would take 64 GB
    filled(tmp_path / "x.tar.gz", cifar("py") | {"cifar-10-batches-py/data_batch_3": huge}, "tar.gz")
    with pytest.raises(ValueError, match="has no table"):
        open_source(tmp_path / "x.tar.gz")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung))).close()
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize("name", [b"c_codecs\nencode\n", b"cnumpy\nndarray\n"], ids=["function", "class"])
def test_a_pickle_of_cifar10_changes_nothing_but_what_it_holds(name, tmp_path):
    """Its BUILD opcode, with a state in two parts, sets any attribute of the object at the top of the stack."""
    hostile = name + b"N}V__defaults__\nVrot13\n\x85s\x86b."
    with pytest.raises(ValueError, match="data_batch_3 is not a batch of CIFAR-10: it changes a (function|type)"):
        open_source(filled(tmp_path / "x", cifar("py") | {"cifar-10-batches-py/data_batch_3": hostile}, "folder"))


class Rot:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("x", "rot13")


def test_an_archive_that_lacks_a_batch_is_refused(tmp_path):
    members = cifar("bin")
    members.pop("cifar-10-batches-bin/data_batch_4.bin")
    with pytest.raises(ValueError, match=r"data_batch_4\.bin is missing"):
        open_source(filled(tmp_path / "x.tar.gz", members, "tar.gz"))
    members = cifar("bin") | {"cifar-10-batches-bin/data_batch_4.bin": bytes(3000)}
    with pytest.raises(ValueError, match=r"data_batch_4\.bin is not a batch .*3,000 bytes are not rows"):
        open_source(filled(tmp_path / "x.tar.gz", members, "tar.gz"))


# ---- arrays ----


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_of_samples_is_a_source(save, channels, tmp_path):
    images = RNG.integers(0, 256, (9, 8, 8, channels), dtype=np.uint8)
    save(tmp_path / "x.npz", images, np.arange(9) % 4)
    source = open_source(tmp_path / "x.npz")
    assert source.classes == ("0", "1", "2", "3")
    entries = list(source.entries())
    assert [e.label for e in entries] == [n % 4 for n in range(9)]
    assert all((e.read() == image).all() for e, image in zip(entries, images, strict=True))
    starts_anywhere(source)
    save(tmp_path / "x.npz", images)
    assert open_source(tmp_path / "x.npz").classes == ()


@pytest.mark.parametrize(
    "arrays, complaint",
    [
        ({"arr_0": np.zeros((3, 8, 8, 3))}, r"float64 \(3, 8, 8, 3\), expected uint8"),
        ({"arr_0": np.zeros((3, 3, 8, 8), np.uint8)}, r"\(3, 3, 8, 8\), expected uint8 \(N, H, W, C\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"\(0, 8, 8, 3\), expected"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, "arr_1 is .* expected 2 integers"),
        ({"arr_0": np.array([{}, 1], object)}, "arr_0 cannot be read: .*(objects|pickle)"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "arr_0 is needed"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_other_arrays_are_refused(save, arrays, complaint, tmp_path):
    save(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=complaint):
        open_source(tmp_path / "x.npz")
