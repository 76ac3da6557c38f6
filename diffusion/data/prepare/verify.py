"""A finished data set held against its index: every byte by its digest, every sample decoded."""

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

MOST = 20  # complaints about a shard


def verify_set(out: Path, processes: int, report: Report = lambda done: None) -> tuple[Index, list[str]]:
    """(the index, what is wrong with the set, a line each): digests of every shard, offsets, every sample decoded.

    Raises:
        ValueError: there is no readable index; or a file it names is missing or has another size.
    """
    index = read_index(out)
    found = over_processes(list(index.shards), lambda s, tick: verify_shard(index, s, tick), processes, report)
    wrong = [complaint for _, complaints in sorted(found, key=lambda pair: pair[0]) for complaint in complaints]
    return index, _told_otherwise(index) + wrong


def verify_shard(index: Index, shard: Shard, tick: Callable[[], None]) -> list[str]:
    """What is wrong with one shard: its digests, its offsets, its samples; the first twenty."""
    from diffusion.data.shards.samples import decode_image, decode_label  # torch

    wrong = [
        f"{name}: its sha256 is not the one in {INDEX_NAME}: it has changed since it was made"
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
            wrong.append(f"{shard.path}{OFFSETS_SUFFIX}: it does not say where the samples of the tar are")
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
    return (wrong + _digests_otherwise(index, shard, digests))[:MOST]


def _digests_otherwise(index: Index, shard: Shard, digests: list[int]) -> list[str]:
    """Whether the digests file says something else than these digests, which the samples of the tar have."""
    name = shard.path + DIGESTS_SUFFIX
    if shard.digests_sha256 is None:
        there = (index.root / name).exists()
        return [f"{name}: {INDEX_NAME} does not name it, so the digests in it are not looked at"] if there else []
    if index.digests(shard).tolist() == digests:
        return []
    return [f"{name}: its digests are not those of the samples in the tar"]


def _told_otherwise(index: Index) -> list[str]:
    """Where the index says something else than what prepare wrote beside it; nothing for a set made otherwise."""
    try:
        text = (index.root / SETTINGS).read_bytes()
    except FileNotFoundError:
        return []
    try:
        content = json.loads(text)
        settings, summary = content["settings"], content["summary"]
        told: dict[str, Any] = {key: settings[key] for key in ("name", "image_size", "channels")}
        told |= {"classes": len(settings["classes"]), "images": summary["images"], "bytes": summary["bytes"]}
        told |= {"shards": summary["shards"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return [f"{SETTINGS}: it is damaged"]
    found = {
        "name": index.name, "image_size": index.image_size, "channels": index.channels, "classes": index.classes,
        "images": {split: index.count(split) for split in index.splits},
        "bytes": sum(shard.bytes for shard in index.shards), "shards": len(index.shards),
    }  # fmt: skip
    return [
        f"{INDEX_NAME}: it says {key} {found[key]}, where {SETTINGS} says {told[key]}"
        for key in found
        if found[key] != told[key]
    ]
