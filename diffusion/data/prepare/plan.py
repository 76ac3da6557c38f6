"""The plan of a data set: the number of entries of each split, divided into ranges of one shard each.

A shard depends on its range only, so that any process can create it at any time. This module reads the keys of all
entries and the sizes of the first images; it writes nothing.
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
from diffusion.progress import counted

SHARDS, LEAST, PIXEL_BYTES = 64, 64, 1 << 29  # number of shards; fewest images and most bytes of pixels per shard
LOOKED_AT = 64  # number of images whose sizes are read first


class Range(NamedTuple):
    """The entries of one shard.

    split: its split. number: its number in the split. place: where in the source its first entry is. first: number of
    its first entry in the split. count: number of its entries.
    """

    split: str
    number: int
    place: int | bytes
    first: int
    count: int

    @property
    def name(self) -> str:
        """File name of the shard."""
        return f"{self.split}-{self.number:05d}.tar"


@dataclass(frozen=True)
class Plan:
    """The plan of a data set.

    ranges: all ranges.
    counts: number of entries by split.
    validation_below: training keys whose hash is below this are moved to the split validation.
    digest: digest of all keys, splits and labels.
    """

    ranges: tuple[Range, ...]
    counts: dict[str, int]
    validation_below: int
    digest: str


@dataclass(frozen=True)
class Job:
    """The settings of a data set to create.

    Args:
        out: folder of the data set.
        name: name of the data set.
        source: source of the images.
        origin: path of the source, which is recorded.
        rule: how every image is converted.
        labelled: whether labels are stored.
        validation: images to move from the split train to validation: a share below 1, or a number.
        shard_samples: images per shard; None means 1/64 of the set (`shard_samples`).
        skip: skip entries that cannot be used; False means that they are errors.
        max_bad_share: largest share of the entries that may be skipped.
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
    """Make the plan, in two passes over the keys: the first counts them, the second finds where the shards begin.

    Raises:
        ValueError: `validation` leaves no training images, or the source has its own validation split.
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
        raise ValueError(f"validation={share}: the source has its own validation split. Give validation=0.")
    if share >= counts["train"] > 0 and share >= 1:
        images = counted(counts["train"], "training image", "training images")
        raise ValueError(f"validation={share:g} must be below the number of training images: there are only {images}.")
    below = 1 - lowest[0] if lowest else int(share * 2**64)

    counts = Counter(split_of(entry, below) for entry in job.source.entries())
    if not counts["train"]:
        raise ValueError(f"validation={share:g} leaves no training images of {counts.total():,}. Give a smaller value.")
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
    """The default number of images per shard: 1/64 of the set, at least 64, but at most 512 MiB of pixels."""
    most = max(1, PIXEL_BYTES // (rule.channels * rule.image_size**2))
    return min(max(-(-images // SHARDS), LEAST), most)


def split_of(entry: Entry, validation_below: int) -> str:
    """The split of an entry; see `Plan.validation_below`."""
    if entry.split == "train" and validation_below and key_hash(entry.key, b"validation") < validation_below:
        return "validation"
    return entry.split


def first_sizes(source: Source, max_pixels: int) -> Counter[tuple[int, int]]:
    """How often each (width, height) occurs among the first images; those that cannot be read are left out."""
    sizes: Counter[tuple[int, int]] = Counter()
    for entry in islice(source.entries(), LOOKED_AT):
        try:
            sizes[look(entry.read(), max_pixels)] += 1
        except BadEntry:  # it is reported when it is converted
            continue
    return sizes
