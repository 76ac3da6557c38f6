"""Damaged and hostile sources of `prepare`, of every kind.

Each function here writes one into the folder `work`, and gives (what was done to it, how many images must be accounted
for). `trap` is a file that must not come to be.
"""

import os
import tarfile
import warnings
import zipfile

import numpy as np
from fuzzing import (
    TABLES,
    bad_batch,
    bad_image,
    broken,
    broken_lmdb,
    cifar_of,
    link,
    members_of,
    npz_broken,
    odd_name,
    tar_head_added,
    tar_heads,
    tar_of,
    tar_size_changed,
    zip_bomb,
    zip_field_changed,
    zip_of,
)


def folder(rng, work, trap):
    """A folder with bad images, and with something in it that is no file."""
    members, done = members_of(rng), []
    for name in [name for name in members if rng.integers(3) == 0]:
        members[name], how = bad_image(rng, members[name], trap)
        done.append(how)
    if rng.integers(4) == 0:
        members["set/dataset.json"] = TABLES[rng.integers(len(TABLES))]
    for name, data in members.items():
        written(work / "x" / name, data)
    extra = work / "x" / "set" / "a" / "extra.png"
    ways = {
        "a pipe": lambda: os.mkfifo(extra),
        "a link to a device": lambda: extra.symlink_to("/dev/zero"),
        "a link to itself": lambda: extra.symlink_to("extra.png"),
        "a link to a folder": lambda: extra.symlink_to("../.."),
        "a hard link": lambda: os.link(work / "x" / "set/a/00.png", extra),
        "a name that is no text": lambda: written(work / "x" / os.fsdecode(b"set/\xff\x1b[2J/\n.png"), b"x"),
        "nothing": lambda: None,
    }
    way = str(rng.choice(list(ways)))
    ways[way]()
    return f"{done}, {way}", 12 + (way != "nothing")


def odd_members(rng, trap, links):
    """(names and contents of a sound archive's odd members, what is odd)."""
    members, done = list(members_of(rng).items()), []
    for number, (name, data) in enumerate(members):
        way = rng.integers(9)
        if way == 0:
            members[number] = odd_name(rng, name, trap), data
            done.append(f"name {members[number][0][:20]!r}")
        elif way == 1:
            data, how = bad_image(rng, data, trap)
            members[number] = name, data
            done.append(how)
        elif way == 2 and links:
            members[number] = name, link(rng, trap)
            done.append("link")
        elif way == 3:
            members[number] = members[rng.integers(len(members))][0], data
            done.append("twice")
    if rng.integers(4) == 0:
        members.append(("set/dataset.json", TABLES[rng.integers(len(TABLES))]))
        done.append("table")
    return members, str(done)


def odd_zip(rng, work, trap):
    members, how = odd_members(rng, trap, links=False)
    members = [(name.encode(errors="replace").decode(), data) for name, data in members]
    method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[rng.integers(4)]
    with warnings.catch_warnings(action="ignore"):  # two members of one name
        written(work / "x.zip", zip_of(members, method))
    return how, 12


def odd_tar(rng, work, trap):
    members, how = odd_members(rng, trap, links=True)
    kind = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[rng.integers(2)]
    if kind == tarfile.PAX_FORMAT:
        members = [(name.encode(errors="replace").decode(), data) for name, data in members]
    written(work / "x.tar", tar_of(members, kind=kind))
    return how, 12


def broken_zip(rng, work, trap):
    way = rng.integers(4)
    if way == 0:
        written(work / "x.zip", zip_bomb(rng, "a/bomb.png"))
        return "zip bomb", 3
    method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)[rng.integers(2)]
    data = zip_of(members_of(rng).items(), method)
    data, how = (zip_field_changed(rng, data), "zip field") if way == 1 else broken(rng, data)
    written(work / "x.zip", data)
    return how, 12


def broken_tar(rng, work, trap):
    whole, way = tar_of(members_of(rng).items()), rng.integers(4)
    if way == 0:
        data, how = tar_size_changed(rng, whole), "tar size"
    elif way == 1:
        data, how = tar_head_added(rng, whole), "tar head"
    else:
        data, how = broken(rng, whole)
    written(work / "x.tar", data)
    # a tar whose last members have become zeros cannot be told from a shorter one
    return how, sum(any(data[start:]) for start in tar_heads(whole)) if how == "zeroed" else 12


def broken_gz(rng, work, trap):
    data, how = broken(rng, tar_of(members_of(rng).items(), "w:gz"))
    written(work / "x.tar.gz", data)
    return how, 12


def lsun(rng, work, trap):
    data, how = broken_lmdb(rng)
    written(work / "x" / "data.mdb", data)
    return how, 60


def npz(rng, work, trap):
    arrays = {"arr_0": rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), "arr_1": np.arange(12) % 3}
    method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)[rng.integers(2)]
    data, how = npz_broken(rng, arrays, trap, method)
    written(work / "x.npz", data)
    return how, 12


def cifar(rng, work, trap):
    form = ("py", "bin")[rng.integers(2)]
    members = cifar_of(rng, form)
    name, how = list(members)[rng.integers(6)], "archive"
    if rng.integers(5):
        members[name], how = bad_batch(rng, members[name], trap)
    if rng.integers(2):
        for key, data in members.items():
            written(work / "x" / key, data)
    else:
        data = tar_of(list(members.items()), "w:gz")
        if how == "archive":
            data, how = broken(rng, data)
        written(work / "x.tar.gz", data)
    return f"{form} {how}", 36


def written(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


SOURCES = {
    "folder": folder, "zip": odd_zip, "tar": odd_tar, "broken zip": broken_zip, "broken tar": broken_tar,
    "broken tar.gz": broken_gz, "lmdb": lsun, "npz": npz, "cifar": cifar,
}  # fmt: skip
