"""What is to be made of a source: its entries counted, and each split cut into ranges, a shard each.

A shard depends on its range alone, so it does not matter which process makes it, or when. This module reads keys and,
of the first few images, sizes; it makes nothing.
"""

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from diffusion.data.prepare.image import Rule, look
from diffusion.data.sources.source import BadEntry, Entry, Source, key_hash

SHARDS, LEAST, PIXEL_BYTES = 64, 64, 1 << 29  # a set's shards, unless they get fewer images, or more pixels, than these
LOOKED_AT = 64  # images whose sizes are looked at before anything is made


class Range(NamedTuple):
    """One shard to be: its split, number in it, the entry it starts at, and its entries."""

    split: str
    number: int
    place: int | bytes
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}.tar"


@dataclass(frozen=True)
class Plan:
    """All ranges, the entries by split, the limit of hashes below which a key is validation, a digest of all keys."""

    ranges: tuple[Range, ...]
    counts: dict[str, int]
    validation_below: int
    digest: str


@dataclass(frozen=True)
class Job:
    """A data set to be made.

    Args:
        out: its folder. name: of the data set. source: where its images come from. origin: that path, for the record.
        rule: what becomes of every image. labelled: whether labels are stored.
        validation: a share below 1, or a number of images, that is taken out of split train.
        shard_samples: images in a shard; None: a 64th of the set.
        skip: leave out entries that cannot be used, instead of refusing the set.
        max_bad_share: share of the entries that may be left out so; more are an error.
    """

    out: Path
    name: str
    source: Source
    origin: str
    rule: Rule
    labelled: bool
    validation: float = 0.0
    shard_samples: int | None = None
    skip: bool = False
    max_bad_share: float = 0.1


def planned(job: Job) -> Plan:
    """Two walks over the keys: how many there are, then where the shards begin.

    Raises:
        ValueError: `validation` leaves nothing to train on, or the source brings its own validation split.
    """
    counts, digest, lowest, share = Counter(), hashlib.sha256(), [], job.validation
    for entry in job.source.entries():
        counts[entry.split] += 1
        label = entry.label if job.labelled else None
        digest.update(f"{entry.key}\0{entry.split}\0{label}\n".encode(errors="surrogateescape"))
        if share >= 1 and entry.split == "train":  # a heap of the smallest hashes
            heapq.heappush(lowest, -key_hash(entry.key, b"validation"))
            if len(lowest) > share:
                heapq.heappop(lowest)
    if share and counts["validation"]:
        raise ValueError(f"validation={share}: the source has a validation split of its own; leave it at 0.")
    if share >= counts["train"] > 0 and share >= 1:
        raise ValueError(f"validation={share:g}: there are only {counts['train']:,} training images.")
    below = 1 - lowest[0] if lowest else int(share * 2**64)

    counts = Counter(split_of(entry, below) for entry in job.source.entries())
    if not counts["train"]:
        raise ValueError(f"validation={share:g} leaves no training images of {counts.total():,}.")
    size = job.shard_samples or shard_samples(counts["train"], job.rule)
    ranges: list[Range] = []
    seen: Counter[str] = Counter()
    for entry in job.source.entries():
        split = split_of(entry, below)
        number, within = divmod(seen[split], size)
        if within == 0:
            ranges.append(Range(split, number, entry.place, seen[split], min(size, counts[split] - seen[split])))
        seen[split] += 1
    ranges.sort(key=lambda r: (("train", "validation", "test").index(r.split), r.number))
    return Plan(tuple(ranges), {r.split: counts[r.split] for r in ranges}, below, digest.hexdigest())


def shard_samples(images: int, rule: Rule) -> int:
    """Images in a shard of a set that sets none: a 64th, at least 64, and at most half a GiB of pixels."""
    most = max(1, PIXEL_BYTES // (rule.channels * rule.image_size**2))
    return min(max(-(-images // SHARDS), LEAST), most)


def split_of(entry: Entry, validation_below: int) -> str:
    if entry.split == "train" and validation_below and key_hash(entry.key, b"validation") < validation_below:
        return "validation"
    return entry.split


def first_sizes(source: Source, max_pixels: int) -> Counter[tuple[int, int]]:
    """(width, height) of the first images, those that can be read, with their numbers."""
    sizes: Counter[tuple[int, int]] = Counter()
    for entry in islice(source.entries(), LOOKED_AT):
        try:
            sizes[look(entry.read(), max_pixels)] += 1
        except BadEntry:  # what is wrong with it is said when its turn comes
            continue
    return sizes
