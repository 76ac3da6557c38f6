"""Folders and archives that are damaged or mean harm: nothing is lost in silence, and nothing happens but reading."""

import gzip
import io
import os
import re
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from test_prepare_sources import FLAT, RNG, coded, filled, listed

from diffusion.data.sources.opening import open_source
from diffusion.data.sources.source import BadEntry, safe_key, shown

SLIPS = ["../../slip.png", "/tmp/slip.png", "a/../../../slip.png", "a\\..\\..\\slip.png", "ü b;$(x)'.png"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out_of_an_archive_lead_nowhere(kind, tmp_path):
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    source = open_source(filled(inner / f"x.{kind}", {name: coded(n) for n, name in enumerate(SLIPS)}, kind))
    found = listed(source)
    assert sorted(n for *_, n in found) == list(range(len(SLIPS)))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c", f"x.{kind}"]
    for key, *_ in found:
        assert safe_key(key).replace("_", "").replace("-", "").isalnum() and len(safe_key(key)) <= 60
    assert len({safe_key("x" * 300 + str(n)) for n in range(3)}) == 3


def tar_of(members, end=True):
    """A tar of names and bytes, or of names and (type, target)."""
    buffer = io.BytesIO()
    archive = tarfile.open(fileobj=buffer, mode="w")
    for name, data in members:
        info = tarfile.TarInfo(name)
        if isinstance(data, tuple):
            info.type, info.linkname = data
        else:
            info.size = len(data)
        archive.addfile(info, None if isinstance(data, tuple) else io.BytesIO(data))
    whole = archive.offset
    archive.close()
    return buffer.getvalue() if end else buffer.getvalue()[:whole]


def resealed(data, start, at, field):
    """The tar with a field of the header at `start` changed, and its checksum made right."""
    data = bytearray(data)
    data[start + at : start + at + len(field)] = field
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def test_what_is_no_file_of_its_own_in_an_archive_is_said_to_be_left_out(tmp_path):
    kinds = {"s.png": tarfile.SYMTYPE, "l.png": tarfile.LNKTYPE, "d.png": tarfile.CHRTYPE, "p.png": tarfile.FIFOTYPE}
    members = [(name, (kind, "/etc/passwd")) for name, kind in kinds.items()]
    members += [("a.png", coded(1)), ("b.png", coded(2)), ("a.png", coded(3)), ("c/.h.png", coded(4))]
    (tmp_path / "x.tar").write_bytes(tar_of([*members, ("folder", (tarfile.DIRTYPE, ""))]))
    source = open_source(tmp_path / "x.tar")
    assert {key: n for key, *_, n in listed(source)} == {"a.png": 3, "b.png": 2}
    assert source.ignored == [
        "a.png (there is a later one)", "c/.h.png (hidden)", "d.png (a device)", "l.png (a link)", "p.png (a device)",
        "s.png (a link)",
    ]  # fmt: skip
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name in ("a.png", "b.png", "a.png", "__MACOSX/a.png", "._b.png"):
            archive.writestr(name, coded(5))
        archive.writestr(zipfile.ZipInfo("c.png/"), coded(6))
    source = open_source(tmp_path / "x.zip")
    assert sorted(key for key, *_ in listed(source)) == ["a.png", "b.png"]
    assert source.ignored == ["a.png (there is a later one)", "c.png/ (a folder by its name, a file by its size)"]


def test_what_is_no_file_in_a_folder_is_bad_or_left_out_and_nothing_waits_for_it(tmp_path):
    folder = filled(tmp_path / "x", {"a/0.png": coded(0)}, "folder") / "a"
    os.mkfifo(folder / "pipe.png")
    for name, target in (("zero", "/dev/zero"), ("itself", "itself.png"), ("gone", "nowhere"), ("up", "..")):
        (folder / f"{name}.png").symlink_to(target)
    (folder / "good.png").symlink_to("0.png")
    source, bad = open_source(tmp_path / "x"), {}
    for entry in source.entries():
        try:
            assert entry.read() == coded(0)
        except BadEntry as error:
            bad[entry.key.split("/")[1]] = str(error)
    assert bad == {
        "pipe.png": "it is not a regular file", "zero.png": "it is not a regular file",
        "itself.png": "it cannot be read: Too many levels of symbolic links",
        "gone.png": "it cannot be read: No such file or directory",
    }  # fmt: skip
    assert source.ignored == ["a/up.png (a link to a folder)"]
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        open_source(folder / "pipe.png")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    filled(tmp_path / "x", {"a/0.png": coded(0), "b/1.png": coded(1)}, "folder")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may list everything
    with pytest.raises(ValueError, match=r"source=.*/x: '.*/x/b' cannot be listed: Permission denied"):
        open_source(tmp_path / "x")


# ---- tars: no silent end ----

MEMBERS = [(f"{n}.png", coded(n)) for n in range(5)]
TAR = tar_of(MEMBERS)
HEAD = 1024 if len(coded(0)) <= 512 else 2048  # bytes of a member and its header


def longname(size):
    """A header that states a long name of so many bytes, before a sound tar."""
    head = tar_of([("././@LongLink", b"")], end=False)
    return resealed(resealed(head, 0, 156, b"L"), 0, 124, b"%011o\0" % size) + TAR


BAD_TARS = {
    "a flipped bit in a header": TAR[: 2 * HEAD + 3] + b"\0" + TAR[2 * HEAD + 4 :],
    "a block of zeros in place of a header": TAR[: 2 * HEAD] + bytes(512) + TAR[2 * HEAD + 512 :],
    "cut off after a member": tar_of(MEMBERS, end=False),
    "cut off in a member": TAR[: 2 * HEAD + 530],
    "two tars": tar_of(MEMBERS[:2]) + tar_of(MEMBERS[2:]),
    "a size that leads back": resealed(TAR, 2 * HEAD, 124, b"\xff" * 4 + struct.pack(">q", -2 * HEAD - 512)),
    "a size beyond the end": resealed(TAR, 2 * HEAD, 124, b"%011o\0" % (2**33 - 1)),
    "a size of 62 bits": resealed(TAR, 2 * HEAD, 124, b"\x80\0\0\0" + struct.pack(">q", 2**62)),
    "a long name of 8 GB": longname(2**33 - 1),
    "pax headers without end": resealed(tar_of([("x", b"")], end=False), 0, 156, b"x") * 3000 + TAR,
}


@pytest.mark.parametrize("data", BAD_TARS.values(), ids=BAD_TARS)
def test_a_tar_that_does_not_go_on_to_its_end_is_refused(data, tmp_path):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"source=.*x\.tar is damaged or truncated: .*byte [\d,]+ .*Download it again"):
        open_source(tmp_path / "x.tar")


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    inner = filled(tmp_path / "x.zip", {"9.png": coded(9)}, "zip").read_bytes()
    (tmp_path / "x.tar").write_bytes(tar_of([*MEMBERS, ("weights.pth", inner)]))
    assert zipfile.is_zipfile(tmp_path / "x.tar")
    assert sorted(n for *_, n in listed(open_source(tmp_path / "x.tar"))) == list(range(5))


def test_a_gzip_that_unpacks_to_much_more_than_any_archive_of_cifar_is_left_early(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.data.sources.cifar.ARCHIVE_BYTES", 1 << 20)
    head = resealed(tar_of([("x", b"")], end=False), 0, 124, b"%011o\0" % (1 << 30))
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        file.write(head + bytes(1 << 21))  # and not the gigabyte that it states: beyond 2 MB it would be found cut off
    with pytest.raises(ValueError, match="a compressed tar of images must be unpacked first"):
        open_source(tmp_path / "x.tar.gz")


# ---- zips: no more than they state, and all that they state ----


def with_field(data, at, width, value, mark=b"PK\1\2"):
    """The zip with a number in its first directory entry, or another record, changed."""
    start = data.index(mark) + at
    return data[:start] + value.to_bytes(width, "little") + data[start + width :]


def test_a_zip_bomb_is_not_unpacked_beyond_its_stated_size(tmp_path):
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = zeros.compress(bytes(1 << 28)) + zeros.flush()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", packed)
    data = (tmp_path / "x.zip").read_bytes()
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):  # stored -> deflated, of 1,000 bytes
        data = with_field(with_field(data, at, 2, 8, mark), at + 14, 4, 1000, mark)
    (tmp_path / "x.zip").write_bytes(data)
    (entry,) = open_source(tmp_path / "x.zip").entries()
    tracemalloc.start()
    with pytest.raises(BadEntry, match="Bad CRC"):
        entry.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22, f"{peak:,} bytes for a member of 1,000"


@pytest.mark.parametrize("method, name", [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")])
def test_methods_that_unpack_without_bound_are_refused_by_name(method, name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("a.png", coded(1))
    (entry,) = open_source(tmp_path / "x.zip").entries()
    with pytest.raises(BadEntry, match=f"compressed by {name}: create the zip with deflate"):
        entry.read()


@pytest.mark.parametrize(
    "at, width, value, complaint",
    [(8, 2, 1, "it is encrypted"), (24, 4, 999_999, "999,999 bytes: the zip is damaged|is damaged"),
     (42, 4, 7, "its data in the zip are damaged"), (16, 4, 7, "Bad CRC"), (10, 2, 99, "compressed by method 99")],
)  # fmt: skip
def test_a_member_that_is_not_as_stated_is_bad(at, width, value, complaint, tmp_path):
    data = filled(tmp_path / "x.zip", {"a.png": coded(1), "b.png": coded(2)}, "zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(with_field(data, at, width, value))
    bad = {}
    for entry in open_source(tmp_path / "x.zip").entries():
        try:
            assert entry.read() == coded(2)
        except BadEntry as error:
            bad[entry.key] = str(error)
    assert list(bad) == ["a.png"]
    assert re.search(complaint, bad["a.png"])


def test_a_directory_that_swallows_members_is_refused(tmp_path):
    data = filled(tmp_path / "x.zip", {f"{n}.png": coded(n) for n in range(9)}, "zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(with_field(data, 28, 2, 5 + 2 * 51))  # a name as long as two entries
    with pytest.raises(ValueError, match=r"x\.zip is damaged or truncated: it has 7 members, but states 9"):
        open_source(tmp_path / "x.zip")


@pytest.mark.parametrize("table", [b"[" * 100_000, b'[["0.png", ' + b"9" * 5000 + b"]]"], ids=["nested", "long"])
def test_a_table_of_labels_that_overwhelms_json_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match=r"labels_from=dataset\.json must be JSON or CSV"):
        open_source(filled(tmp_path / "x.zip", FLAT | {"dataset.json": table}, "zip"))


def test_a_table_of_labels_that_cannot_be_read_is_named(tmp_path):
    path = filled(tmp_path / "x.zip", FLAT | {"dataset.json": b'{"labels": null}' * 9}, "zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"dataset.json") + 15] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"source=.*x\.zip: 'dataset\.json' cannot be used: its data in the zip"):
        open_source(path)


def test_a_folder_of_five_thousand_digits_is_a_class_by_its_name(tmp_path):
    names = ["1" * 5000, "2"]
    path = filled(tmp_path / "x.zip", {f"{name}/0.png": coded(n) for n, name in enumerate(names)}, "zip")
    assert open_source(path).classes == tuple(names)
    assert shown(names[0]) == "1" * 37 + "..." and shown("a\x1b[2J\udcff") == r"a\x1b[2J\udcff" and shown("ü ") == "ü "


# ---- arrays ----


def npy(head, data):
    """An .npy whose head says what it likes."""
    head = head.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + data


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_an_npz_is_what_its_head_and_its_checksum_say(method, tmp_path):
    array = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)

    def opened(data):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
            archive.writestr("arr_0.npy", data)
        return open_source(tmp_path / "x.npz")

    sound = "{'descr': '|u1', 'fortran_order': False, 'shape': (5, 8, 8, 3), }"
    pixels = [entry.read() for entry in opened(npy(sound, array.tobytes())).entries()]
    assert (np.stack(pixels) == array).all()
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[500] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match="arr_0 cannot be read: .*(CRC|decompressing)"):
        open_source(tmp_path / "x.npz")
    for shape in ("(5, 8, 8, 4)", f"({2**40}, 8, 8, 3)", f"({2**62}, 8, 8, 3)", "(-5, 8, 8, 3)", "(0, 8, 8, 3)"):
        with pytest.raises(ValueError, match="arr_0 cannot be read: .* uint8 .* has 960 bytes"):
            opened(npy(sound.replace("(5, 8, 8, 3)", shape), array.tobytes()))
    for head in ("(" * 90, "{}", sound.replace("|u1", "|O"), "__import__('os').abort()"):
        with pytest.raises(ValueError, match="arr_0 cannot be read: "):
            opened(npy(head, array.tobytes()))
    with pytest.raises(ValueError, match=r"arr_0 cannot be read: \.npy version \(9, 0\) is not"):
        opened(npy(sound, array.tobytes()).replace(b"Y\1", b"Y\x09"))


def test_a_compressed_array_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.data.sources.arrays.MOST_HELD", 10_000)
    np.savez_compressed(tmp_path / "x.npz", np.zeros((60, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"11,648 compressed bytes: save it by np\.savez"):
        open_source(tmp_path / "x.npz")


def test_links_in_a_tar_are_no_images(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(coded(9))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"{kind.decode()}.png")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        info = tarfile.TarInfo("real.png")
        info.size = len(coded(1))
        archive.addfile(info, io.BytesIO(coded(1)))
    assert [key for key, *_ in listed(open_source(tmp_path / "x.tar"))] == ["real.png"]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_member_larger_than_any_image_is_not_read(kind, tmp_path):
    source = open_source(filled(tmp_path / f"x.{kind}", {"a.png": bytes(300_000)}, kind), max_bytes=200_000)
    (entry,) = source.entries()
    with pytest.raises(BadEntry, match="more than 200,000 bytes"):
        entry.read()


def test_a_zip_with_a_changed_byte_or_a_false_size_gives_that_member_only_as_bad(tmp_path):
    path = filled(tmp_path / "x.zip", {f"{n}.png": RNG.bytes(500) for n in range(3)}, "zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"1.png") + 100] ^= 1
    path.write_bytes(data)
    bad = []
    for entry in open_source(path).entries():
        try:
            entry.read()
        except BadEntry:
            bad.append(entry.key)
    assert bad == ["1.png"]


def test_mutated_archives_end_in_images_or_in_a_refusal(tmp_path):
    whole = {kind: filled(tmp_path / f"whole.{kind}", FLAT | {"dataset.json": b'{"labels": null}'}, kind).read_bytes()
             for kind in ("zip", "tar", "tar.gz")}  # fmt: skip
    outcomes = {"refused": 0, "read": 0, "bad": 0}
    for number in range(300):
        kind = ("zip", "tar", "tar.gz")[number % 3]
        data = bytearray(whole[kind])
        for _ in range(RNG.integers(1, 9)):
            data[RNG.integers(0, len(data))] = RNG.integers(0, 256)
        path = tmp_path / f"x.{kind}"
        path.write_bytes(data[: RNG.integers(1, len(data))] if number % 4 == 0 else data)
        try:
            entries = list(open_source(path, max_bytes=1 << 20).entries())
        except ValueError as error:
            assert "source=" in str(error) or "labels_from=" in str(error), error
            outcomes["refused"] += 1
            continue
        for entry in entries:
            try:
                entry.read()
                outcomes["read"] += 1
            except BadEntry:
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 0, outcomes
