"""task=verify finds whatever has happened to a finished set since it was made."""

import json
import re
import tarfile

import numpy as np
import pytest
from conftest import inside
from test_prepare_sources import TREE, filled

from diffusion.files import sha256_of


@pytest.fixture
def small(tmp_path):
    filled(tmp_path / "x.zip", TREE, "zip")
    assert inside("prepare", ["source=x.zip", "shard_samples=10"], tmp_path) == 0
    return tmp_path / "data" / "x"


def test_verify_finds_a_flipped_byte_anywhere(small, call):
    assert call("prepare", "task=verify", "out=data/x")[0] == 0
    for path in (small / "train-00001.tar", small / "train-00001.tar.offsets"):
        whole = path.read_bytes()
        for place in (3, len(whole) // 3, len(whole) - 5):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
            status, output = call("prepare", "task=verify", "out=data/x", "processes=2")
            assert status == 1 and path.name in output and "train-00000" not in output, output
        path.write_bytes(whole)
    assert call("prepare", "task=verify", "out=data/x")[0] == 0


def test_verify_decodes_every_sample(small, call):
    """A shard and its digest replaced together: only decoding shows it."""
    tar = small / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    tar.write_bytes(data)
    index = json.loads((small / "index.json").read_text())
    index["shards"][0]["sha256"] = sha256_of(tar)
    (small / "index.json").write_text(json.dumps(index))
    status, output = call("prepare", "task=verify", "out=data/x")
    assert status == 1 and re.search(r"train-00000\.tar: sample '000000000-.*cannot be decoded", output), output
    tar.write_bytes(data[:-512])
    status, output = call("prepare", "task=verify", "out=data/x")
    assert status == 2 and "truncated" in output


def sealed(root, name):
    """State the digests of a shard's files as they are now: only its content is left to show that it changed."""
    index = json.loads((root / "index.json").read_text())
    (shard,) = (shard for shard in index["shards"] if shard["path"] == name)
    shard |= {"sha256": sha256_of(root / name), "offsets_sha256": sha256_of(root / f"{name}.offsets")}
    (root / "index.json").write_text(json.dumps(index))


def test_verify_holds_the_offsets_against_the_tar(small, call):
    path = small / "train-00001.tar.offsets"
    rows = np.frombuffer(path.read_bytes(), "<u8").copy()
    rows[0] += 512
    path.write_bytes(rows.tobytes())
    sealed(small, "train-00001.tar")
    status, output = call("prepare", "task=verify", "out=data/x")
    assert status == 1 and "train-00001.tar.offsets: its offsets are not those of the samples in the tar" in output


@pytest.mark.parametrize("size", [-512, 2**33 - 1, 2**62], ids=["back", "8 GB", "huge"])
def test_verify_reads_a_tar_whose_header_lies(size, small, call):
    path = small / "train-00002.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[3].offset
    binary = (b"\xff" * 4 if size < 0 else b"\x80\0\0\0") + size.to_bytes(8, "big", signed=True)
    data[start + 124 : start + 136] = b"%011o\0" % size if 0 < size < 8**11 else binary
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    sealed(small, "train-00002.tar")
    status, output = call("prepare", "task=verify", "out=data/x")
    assert status == 1 and re.search(r"train-00002\.tar: from byte [\d,]+ on it is not a valid tar", output), output


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"name": "y"}, "it has name=y, but prepare.json has name=x"),
        ({"classes": 3}, "it has classes=3, but prepare.json has classes=2"),
        ({"shards": 1}, r"it has images={'train': 10}, but prepare.json has images={'train': 30}"),
    ],
)
def test_verify_holds_the_index_against_what_prepare_wrote_beside_it(change, complaint, small, call):
    index = json.loads((small / "index.json").read_text())
    index |= change if "shards" not in change else {"shards": index["shards"][: change["shards"]]}
    (small / "index.json").write_text(json.dumps(index))
    status, output = call("prepare", "task=verify", "out=data/x")
    assert status == 1 and re.search(complaint, output), output
    (small / "prepare.json").write_text("[" * 100_000)
    status, output = call("prepare", "task=verify", "out=data/x")
    assert status == 1 and "prepare.json: it is damaged" in output
