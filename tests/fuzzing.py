"""What a bad disk, a cut download or a hostile hand makes of data: mutations of bytes, images, archives, LMDBs, arrays.

Everything is drawn from the generator handed in: the same seed gives the same case. A trap is a pickle that makes a
file when it is loaded. This file builds and breaks; it does not know what is to be expected of the result.
"""

import functools
import io
import json
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image, PngImagePlugin

SIZE, CHANNELS = 16, 3


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def picture(rng, width=SIZE, height=SIZE, kind=None, mode="RGB", **options):
    """The bytes of a smooth image, of a format drawn where none is given."""
    kind = kind or ("PNG", "JPEG", "WEBP", "BMP")[rng.integers(4)]
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


# ---- bytes ----


def flipped(rng, data):
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)


def flipped_in_the_head(rng, data):
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(min(len(data), 600))] ^= 1 << rng.integers(8)


def truncated(rng, data):
    del data[rng.integers(len(data)) :]


def zeroed(rng, data):
    block = 512 if rng.integers(2) else int(rng.integers(1, 5000))
    start = int(rng.integers(len(data)))
    start -= start % 512 if block == 512 else 0
    stop = min(start + block, len(data))
    data[start:stop] = bytes(stop - start)


def huge(rng, data):
    """An integer somewhere becomes as large as it can be."""
    width = int(rng.choice([2, 4, 8]))
    start = int(rng.integers(max(1, len(data) - width)))
    start -= start % width
    value = (2 ** (8 * width) - 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 0)[rng.integers(4)]
    data[start : start + width] = value.to_bytes(width, "little")[: len(data) - start]


def swapped(rng, data):
    """Two blocks change places."""
    size = int(rng.choice([16, 512, 4096]))
    first, second = (int(x) * size for x in rng.integers(0, max(1, len(data) // size), 2))
    data[first : first + size], data[second : second + size] = (
        data[second : second + size], data[first : first + size],
    )  # fmt: skip


def appended(rng, data):
    data += data[: rng.integers(len(data))] if rng.integers(2) else rng.bytes(rng.integers(1, 3000))


def cut_out(rng, data):
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 700))]


BYTES = (flipped, flipped_in_the_head, truncated, zeroed, huge, swapped, appended, cut_out)


def broken(rng, data):
    """(the data broken in one way, its name); never the data as they were."""
    while True:
        way = BYTES[rng.integers(len(BYTES))]
        found = bytearray(data)
        way(rng, found)
        if found != data:
            return bytes(found), way.__name__


# ---- images ----


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=2, rows=b"", more=b""):
    """A PNG by hand, whose checksums are right whatever else is wrong."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = more + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def bomb(rng):
    """A kilobyte that becomes gigabytes, in the pixels or beside them."""
    kind = rng.integers(6)
    return png(*(int(x) for x in 2 ** rng.uniform(10, 31, 2))) if kind == 5 else bombs()[kind]


@functools.cache
def bombs():
    zeros = zlib.compress(bytes(1 << 25))
    return (
        png(SIZE, SIZE, rows=bytes(1 << 25)),
        png(SIZE, SIZE, more=chunk(b"zTXt", b"k\0\0" + zeros)),
        png(SIZE, SIZE, more=chunk(b"iCCP", b"k\0\0" + zeros)),
        png(1, 500_000, rows=bytes(2_000_000)),
        png(500_000, 1, rows=bytes(1_500_001)),
    )


@functools.cache
def packed_zeros():
    """2**30 zeros, deflated: a block of them time and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * 64 + b"\3\0"


def odd(rng):
    """An image that is sound, and of a kind that must be handled or refused by name."""
    exif, notes = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = int(rng.integers(0, 12))
    notes.add_text("a", "b" * 2000)
    return (
        lambda: png(SIZE, SIZE, 16, 2, bytes(SIZE * (1 + 6 * SIZE))),
        lambda: picture(rng, kind="JPEG", mode="CMYK"),
        lambda: picture(rng, 20, 30, kind="JPEG", exif=exif),
        lambda: picture(rng, kind="PNG", exif=rng.bytes(60)),
        lambda: picture(rng, kind="PNG", mode="RGBA", pnginfo=notes),
        lambda: picture(rng, kind="PNG", mode="LA"),
        lambda: picture(rng, kind="PNG", mode="P", transparency=int(rng.integers(256))),
        lambda: picture(rng, kind="PNG", mode="1"),
        lambda: picture(rng, kind="GIF"),
        lambda: picture(rng, kind="TIFF"),
        lambda: picture(rng, 1, 3),
        lambda: picture(rng, kind="PNG", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))]),
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='16' height='16'/>",
    )[rng.integers(13)]()  # fmt: skip


def foreign(rng, trap):
    """What is no image: pickles and tensors with a trap in them, arrays, nothing."""
    objects, buffer = np.empty(2, object), io.BytesIO()
    objects[0] = Trap(trap)
    kind = rng.integers(6)
    if kind == 0:
        return pickle.dumps(Trap(trap))
    if kind == 1:
        np.save(buffer, objects, allow_pickle=True)
    elif kind == 2:
        with zipfile.ZipFile(buffer, "w") as archive:  # the layout of torch.save
            archive.writestr("archive/data.pkl", pickle.dumps(Trap(trap)))
    elif kind == 3:
        np.save(buffer, np.zeros((SIZE, SIZE, 3), np.uint8))
    elif kind == 4:
        return b"#!/bin/sh\ntouch " + str(trap).encode()
    return buffer.getvalue()


def bad_image(rng, data, trap):
    """(what is put in the place of an image, what was done)."""
    kind = rng.integers(8)
    if kind < 4:
        return broken(rng, data)
    if kind == 4:
        return bomb(rng), "bomb"
    return (odd(rng), "odd") if kind < 7 else (foreign(rng, trap), "foreign")


# ---- folders, zips and tars of images ----


def members_of(rng, count=12):
    """Images of two classes by their names."""
    return {f"set/{'ab'[n % 2]}/{n:02d}.{('png', 'jpg')[n % 2]}": picture(rng) for n in range(count)}


TABLES = (
    b"[" * 100_000, b'{"labels": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"", b"\xff\xfe", b"null", b"7",
    b'{"labels": [["a", 1e999]]}', b'{"labels": {"a": 1}}', b'[["set/a/00.png", ' + b"9" * 5000 + b"]]",
    b'{"set/a/00.png": 99999999999999999999999}', b'{"labels": [[[], 1]]}', b'{"labels": [["a"]]}',
)  # fmt: skip


def odd_name(rng, name, trap):
    """Another name for a member; those of a folder need no more than this file system allows."""
    return (
        f"../../{name}", f"/{name}", f"{trap.parent}/slip.png", "a/../../../slip.png", "..\\..\\slip.png",
        "a\x1b[2Jb.png", "\udcff\udcfe/x.png", "ü b;$(touch x)'.png", "x" * 300 + ".png", "1" * 5000 + "/a.png",
        ".png", "set/a/.png", "a\nb\r.png", "a\0b.png", "CON.png", "set/./a//b.png", "-rf.png",
    )[rng.integers(17)]  # fmt: skip


def zip_of(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def tar_of(members, mode="w", kind=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind, encoding="utf-8") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(rng, trap):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE)
    return kinds[rng.integers(5)], ("/etc/passwd", "../../secret.png", "set/a/00.png", str(trap))[rng.integers(4)]


def tar_heads(data):
    """Where the headers of a tar begin."""
    return [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]


def tar_size_changed(rng, data):
    """The size in a member's header becomes huge or negative, its checksum right."""
    data, start = bytearray(data), rng.choice(tar_heads(data))
    value = int(rng.choice([2**62, 2**40, 2**33 - 1, -512, -1024, -(2**40), 99_999]))
    binary = (b"\x80\0\0\0" if value > 0 else b"\xff" * 4) + struct.pack(">q", value)
    field = b"%011o\0" % value if 0 <= value < 8**11 else binary
    return bytes(resealed(data, start, 124, field))


def resealed(data, start, at, field):
    data[start + at : start + at + len(field)] = field
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return data


def tar_head_added(rng, data):
    """A header before all others that states a long name, or one of pax, of any size; or thousands of them."""
    head = bytearray(tar_of([("x", b"")])[:512])
    kind = (b"L", b"x", b"g", b"K", b"S")[rng.integers(5)]
    body = b"30 size=-1024\n" + bytes(498) if rng.integers(2) else b"25 GNU.sparse.map=0,1,-5\n".ljust(512, b"\0")
    size = (512, 2**33 - 1, 8 * 10**9)[rng.integers(3)]
    resealed(head, 0, 156, kind)
    resealed(head, 0, 124, b"%011o\0" % size)
    return bytes((head + body) * (1 if rng.integers(2) else 3000)) + data


def zip_field_changed(rng, data):
    """A size, offset, method, or checksum in the directory of a zip, or in its end, becomes another one."""
    data = bytearray(data)
    starts = [n for n in range(len(data) - 46) if data[n : n + 4] == b"PK\1\2"]
    end = data.rindex(b"PK\5\6")
    of_member = ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4))
    fields = [(start + at, width) for start in starts for at, width in of_member]
    fields += [(end + at, width) for at, width in ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2))] * 3
    at, width = fields[rng.integers(len(fields))]
    value = int(rng.choice([0, 1, 7, 12, 14, 255, 2**15, 2 ** (8 * width) - 2, 2 ** (8 * width) - 1]))
    data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(data)


def zip_bomb(rng, name, method=zipfile.ZIP_DEFLATED):
    """A member that becomes a gigabyte; its stated size is the true one, or a kilobyte."""
    packed = packed_zeros()
    data = bytearray(zip_of([("a/0.png", picture(rng)), (name, packed), ("b/1.png", picture(rng))], zipfile.ZIP_STORED))
    size = (1 << 30, 1000)[rng.integers(2)]
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        start = data.index(mark, data.index(mark) + 4)
        data[start + at : start + at + 2] = (8).to_bytes(2, "little")
        data[start + at + 14 : start + at + 18] = size.to_bytes(4, "little")
    return bytes(data)


# ---- an LMDB, arrays, CIFAR-10 ----

PAGE = 4096


@functools.cache
def sound_lmdb():
    """data.mdb of 60 images in a tree of two levels, their bytes within its pages and outside them."""
    rng = np.random.default_rng(4)
    with tempfile.TemporaryDirectory() as folder:
        with lmdb.open(folder, map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
            for number in range(60):
                size = (90, 70) if number % 3 == 0 else (16, 16)
                image = picture(rng, *size, kind=("WEBP", "PNG")[number % 2])
                transaction.put(b"%040x" % (number * 7919 % 100_003), image)
        return Path(folder, "data.mdb").read_bytes()


def broken_lmdb(rng):
    """A number in the head or the nodes of one of its pages becomes another one, or any bytes."""
    data = bytearray(sound_lmdb())
    page = int(rng.integers(len(data) // PAGE)) * PAGE
    if rng.integers(4) == 0:
        return broken(rng, data)
    lower = int.from_bytes(data[page + 12 : page + 14], "little")
    nodes = [int.from_bytes(data[at : at + 2], "little") for at in range(page + 16, page + min(lower, PAGE), 2)]
    places = [(0, 8), (8, 2), (10, 2), (12, 2), (14, 2), *((16 + 2 * n, 2) for n in range(len(nodes)))]
    places += [(node + at, 2) for node in nodes if node < PAGE - 8 for at in (0, 2, 4, 6)] * 2
    places += [(node + 48, 8) for node in nodes if node < PAGE - 56]
    if page < 2 * PAGE:
        places = [(at, 4) for at in range(0, 136, 4)]
    at, width = places[rng.integers(len(places))]
    old = int.from_bytes(data[page + at : page + at + width], "little")
    flipped_bit, any_page = old ^ 1 << int(rng.integers(8 * width)), int(rng.integers(2, 30))
    new = (old + 1, old - 1, flipped_bit, 2 ** (8 * width) - 1, 0, any_page)[rng.integers(6)] % 2 ** (8 * width)
    data[page + at : page + at + width] = (new if new != old else old ^ 1).to_bytes(width, "little")
    return bytes(data), f"page {page // PAGE} +{at}: {old} -> {new}"


def npy_of(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_with_head(shape, kind="|u1", data=b"", fortran=False, version=b"\1\0"):
    """An .npy by hand: it may say anything of itself."""
    head = f"{{'descr': {kind!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(head).to_bytes(2, "little") + head + data


def npz_broken(rng, arrays, trap, method):
    """An .npz of arrays that say what is not so, or hold objects."""
    members, kind, objects = {k: npy_of(v) for k, v in arrays.items()}, rng.integers(10), np.empty((4, 8, 8, 3), object)
    objects.fill(Trap(trap))
    if kind < 5:
        return broken(rng, zip_of([(f"{k}.npy", v) for k, v in members.items()], method))
    if kind == 5:
        return zip_field_changed(rng, zip_of([(f"{k}.npy", v) for k, v in members.items()], method)), "zip field"
    shapes = (
        "(99999, 999999, 9999, 3)",
        f"({2**62}, 8, 8, 3)",
        "(-1, 8, 8, 3)",
        "(12, 16, 16, 4)",
        "(3, 3)",
        "'x'",
        f"({2**40}, 1, 1, 1)",
        "(12, 16, 16, 3.0)",
        "(True, 16, 16, 3)",
        "(12, 0, 0, 3)",
        "(5000000000, 1, 1, 3)",
    )
    name = list(members)[rng.integers(2)]
    members[name] = (
        npy_of(objects),
        npy_with_head(shapes[rng.integers(len(shapes))], data=rng.bytes(12 * 16 * 16 * 3)),
        npy_with_head("(12, 16, 16, 3)", ("|O", "<f8", "|V1", "|S1", "|S0")[rng.integers(5)], rng.bytes(9216)),
        npy_with_head("(" * 80 + ")" * 80),
        npy_with_head("(12,16,16,3)", data=rng.bytes(9216), version=(b"\3\0", b"\2\0", b"\x09\0")[rng.integers(3)]),
    )[rng.integers(5)]  # fmt: skip
    return zip_of([(f"{k}.npy", v) for k, v in members.items()], method), f"{name} odd"


ROWS = 6
BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def cifar_of(rng, form):
    """The six batches of an archive, small."""
    pixels, labels = rng.integers(0, 256, (6, ROWS, 3072), dtype=np.uint8), rng.integers(0, 10, (6, ROWS))
    if form == "bin":
        rows = [np.hstack([np.uint8(y)[:, None], x]).tobytes() for x, y in zip(pixels, labels, strict=True)]
        return {f"cifar-10-batches-bin/{name}.bin": row for name, row in zip(BATCHES, rows, strict=True)}
    found = {}
    for name, x, y in zip(BATCHES, pixels, labels, strict=True):
        content = {b"data": x, b"labels": y.tolist(), b"batch_label": b"a"}
        found[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, 4)
    return found


def bad_batch(rng, data, trap):
    """What is put in the place of a batch: a broken one, or a pickle that wants to do something."""
    kind = rng.integers(8)
    if kind < 4:
        return broken(rng, data)
    good = pickle.loads(data) if data[:1] == b"\x80" else {}
    held = b"cnumpy\nndarray\n"
    return (
        (pickle.dumps(Trap(trap)), "trap"),
        (pickle.dumps(good | {b"labels": [Trap(trap)] * ROWS}), "trap in the labels"),
        (b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.", "system"),
        (b"c_codecs\nencode\nN}V__defaults__\nVrot13\n\x85s\x86b.", "attributes of a function"),
        (held + b"N}V__init__\nNs\x86b.", "attributes of a class"),
        (b"(" * (1 << 25) + b".", "marks"),
        (b"]" * (1 << 25) + b".", "lists"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "a length"),
        (b"\x80\x02]r" + (2**32 - 1).to_bytes(4, "little") + b".", "a place in the memo"),
        (pickle.dumps([]) * 3 + bytes(1 << 26), "more than a batch"),
        (b"]" + b"]a" * 200_000 + b".", "nested"),
    )[rng.integers(11)]  # fmt: skip


# ---- a finished set ----


def index_changed(rng, data):
    """index.json with one value changed, well formed; or broken bytes."""
    if rng.integers(3) == 0:
        return broken(rng, data)
    content = json.loads(data)
    odd = (-1, 0, 7, 2**70, 1.5, "x", None, [], {}, True, "../../x.tar", "/etc/passwd", "a\0b", "y" * 5000, "\udcff")
    at = content if rng.integers(2) else content["shards"][rng.integers(len(content["shards"]))]
    key = list(at)[rng.integers(len(at))]
    at[key] = odd[rng.integers(len(odd))]
    kind = rng.integers(12)
    if kind == 0:
        content["shards"] = [shard for shard in json.loads(data)["shards"] for _ in range(2)]
    elif kind == 1:
        return b"[" * 100_000, "nested"
    return json.dumps(content).encode(), f"{key} -> {str(at[key])[:20]}"
