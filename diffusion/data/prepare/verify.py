"""Verification of a data set against its index: all bytes by their digests, and every sample decoded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data.prepare.processes import over_processes
from diffusion.data.prepare.shards import SETTINGS, Report
from diffusion.data.shards.index import (
    DIGESTS_SUFFIX,
    INDEX_NAME,
    OFFSETS_SUFFIX,
    Index,
    Shard,
    read_index,
    sample_digest,
)
from diffusion.data.sources.tar import DamagedTar, members_of_tar
from diffusion.files import sha256_of

MOST = 20  # largest number of errors that are reported for one shard


def verify_set(out: Path, processes: int, report: Report = lambda done: None) -> tuple[Index, list[str]]:
    """Verify a data set: the digests and offsets of every shard, and every sample.

    Returns:
        The index, and a line of text for each error.

    Raises:
        ValueError: the index cannot be read, or a file that it names is missing or has another size.
    """
    index = read_index(out)
    found = over_processes(list(index.shards), lambda s, tick: verify_shard(index, s, tick), processes, report)
    wrong = [complaint for _, complaints in sorted(found, key=lambda pair: pair[0]) for complaint in complaints]
    return index, _differences_from_settings(index) + wrong


def verify_shard(index: Index, shard: Shard, tick: Callable[[], None]) -> list[str]:
    """Verify one shard: its digests, offsets and samples. Returns a line of text for each error, at most MOST."""
    from diffusion.data.shards.samples import decode_image, decode_label  # torch

    wrong = [
        f"{name}: its sha256 differs from the one in {INDEX_NAME}: it has changed since it was created"
        for name, _, sha256 in shard.files
        if sha256_of(index.root / name) != sha256
    ]
    keys, places = [], []
    with open(index.path(shard), "rb") as file:
        try:
            for member in members_of_tar(file):
                key, _, extension = member.name.partition(".")
                if not keys or keys[-1] != key:
                    keys.append(key)
                    places.append([0, 0, 0, 0])
                at = 2 if extension in ("cls", "json") else 0
                places[-1][at : at + 2] = [member.offset_data, member.size]
        except DamagedTar as error:
            wrong.append(f"{shard.path}: {error}")
        if not np.array_equal(np.array(places, np.uint64).reshape(-1, 4), index.offsets(shard)):
            wrong.append(f"{shard.path}{OFFSETS_SUFFIX}: its offsets are not those of the samples in the tar")
        digests = []
        for key, (at, size, label_at, label_size) in zip(keys, places, strict=True):
            tick()
            # a header can state any size
            there = ((min(size, shard.bytes), at), (min(label_size, shard.bytes), label_at))
            image, label = (os.pread(file.fileno(), *member) for member in there)
            digests.append(sample_digest(image, label))
            try:
                decode_image(image, index.channels, index.image_size)
                if index.classes:
                    decode_label(label, index.classes)
            except Exception as error:  # as in Samples: Pillow raises many kinds
                wrong.append(f"{shard.path}: sample {key!r} cannot be decoded: {str(error) or type(error).__name__}")
    return (wrong + _different_digests(index, shard, digests))[:MOST]


def _different_digests(index: Index, shard: Shard, digests: list[int]) -> list[str]:
    """An error if the digests file differs from these digests, which are those of the samples in the tar."""
    name = shard.path + DIGESTS_SUFFIX
    if shard.digests_sha256 is None:
        there = (index.root / name).exists()
        return [f"{name}: it is not listed in {INDEX_NAME}, so its digests are not used"] if there else []
    if index.digests(shard).tolist() == digests:
        return []
    return [f"{name}: its digests are not those of the samples in the tar"]


def _differences_from_settings(index: Index) -> list[str]:
    """An error for each value in which the index differs from prepare.json; [] for a set without prepare.json."""
    try:
        text = (index.root / SETTINGS).read_bytes()
    except FileNotFoundError:
        return []
    try:
        content = json.loads(text)
        settings, summary = content["settings"], content["summary"]
        recorded: dict[str, Any] = {key: settings[key] for key in ("name", "image_size", "channels")}
        recorded |= {"classes": len(settings["classes"]), "images": summary["images"], "bytes": summary["bytes"]}
        recorded |= {"shards": summary["shards"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return [f"{SETTINGS}: it is damaged"]
    found = {
        "name": index.name, "image_size": index.image_size, "channels": index.channels, "classes": index.classes,
        "images": {split: index.count(split) for split in index.splits},
        "bytes": sum(shard.bytes for shard in index.shards), "shards": len(index.shards),
    }  # fmt: skip
    return [
        f"{INDEX_NAME}: it has {key}={found[key]}, but {SETTINGS} has {key}={recorded[key]}"
        for key in found
        if found[key] != recorded[key]
    ]
