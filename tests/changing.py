"""What may happen to the shards of a data set while it is in use; sets as they were made before there were digests."""

import json
import os
import shutil

from diffusion.data.shards.index import DIGESTS, INDEX_NAME, read_index


def without_digests(root):
    """The set as it was written before there were digests."""
    file = root / INDEX_NAME
    content = json.loads(file.read_text())
    del content[DIGESTS]
    file.write_text(json.dumps(content, indent=1) + "\n")
    for digests in root.glob("*.xxh3"):
        digests.unlink()
    return root


def swap(tar, other):
    """Each under the other's name."""
    aside = tar.with_name("aside")
    tar.rename(aside)
    other.rename(tar)
    aside.rename(other)


def cut(tar, other):
    """Truncated where it is."""
    os.truncate(tar, tar.stat().st_size // 3)


def overwrite(tar, other):
    """Other content in the same file, of the same size and with the same time."""
    times, data = tar.stat(), other.read_bytes()
    with open(tar, "r+b") as file:
        file.write(data)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))


def overwrite_a_sample(tar, other):
    """The bytes of one image, in the same file, of the same size and with the same time."""
    times, index = tar.stat(), read_index(tar.parent)
    (shard,) = (shard for shard in index.shards if shard.path == tar.name)
    at, size = index.offsets(shard)[17][:2].tolist()
    with open(tar, "r+b") as file:
        file.seek(at + size - 9)
        file.write(b"damaged!!")
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))


def delete(tar, other):
    """Gone."""
    tar.unlink()


def replace(tar, other):
    """Another file of the same size under its name."""
    shutil.copy2(other, tar.with_name("aside"))
    tar.with_name("aside").rename(tar)


CHANGES = (swap, cut, overwrite, overwrite_a_sample, delete, replace)
HARMLESS = {
    "touched": lambda tar: tar.touch(),
    "copied back": lambda tar: (shutil.copy(tar, tar.with_name("aside")), tar.with_name("aside").replace(tar)),
    "written again": lambda tar: tar.open("r+b").write(tar.read_bytes()),
    "another mode": lambda tar: tar.chmod(0o640),
}
