"""A source -> shards: planned, made by several processes, gone on with after a kill, always the same bytes.

The plan cuts the entries of each split into ranges, a shard each. A shard depends on its range alone, so it does not
matter which process makes it, or when. In `out`, while the set is being made and after:

    prepare.json          what decides its content (settings); at the end also the summary
    .prepare/SHARD.json   what became of the entries of a finished shard; its presence says that it is finished
    .prepare/lock         held by the process that works here
    skipped.csv  contact_sheet.png  index.json     at the end; with index.json the set is there

This module knows sources, rules and shards; it knows neither conf/ nor the terminal.
"""

import csv
import errno
import fcntl
import hashlib
import heapq
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from diffusion.data.index import INDEX_NAME, OFFSETS_ROW, OFFSETS_SUFFIX, Index, Shard, read_index, write_index
from diffusion.data.prepare_image import Rule, look, make
from diffusion.data.prepare_processes import over_processes
from diffusion.data.sources import Entry, Source, key_hash, safe_key
from diffusion.files import remove_leftovers, write_atomically

SETTINGS, STATE, SKIPPED, SHEET = "prepare.json", ".prepare", "skipped.csv", "contact_sheet.png"
SHARDS, LEAST, PIXEL_BYTES = 64, 64, 1 << 29  # a set's shards, unless they get fewer images, or more pixels, than these
LOOKED_AT = 64  # images whose sizes are looked at before anything is made
TILES, TILE = 64, 128  # images of the contact sheet, and their largest side in pixels
Report = Callable[[int], None]


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


# ---- the plan ----


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

    counts = Counter(_split(entry, below) for entry in job.source.entries())
    if not counts["train"]:
        raise ValueError(f"validation={share:g} leaves no training images of {counts.total():,}.")
    size = job.shard_samples or shard_samples(counts["train"], job.rule)
    ranges: list[Range] = []
    seen: Counter[str] = Counter()
    for entry in job.source.entries():
        split = _split(entry, below)
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


def _split(entry: Entry, validation_below: int) -> str:
    if entry.split == "train" and validation_below and key_hash(entry.key, b"validation") < validation_below:
        return "validation"
    return entry.split


def first_sizes(source: Source, max_pixels: int) -> Counter[tuple[int, int]]:
    """(width, height) of the first images, those that can be read, with their numbers."""
    sizes: Counter[tuple[int, int]] = Counter()
    for entry in islice(source.entries(), LOOKED_AT):
        try:
            sizes[look(entry.read(), max_pixels)] += 1
        except Exception:  # whatever is wrong with it is said when its turn comes
            continue
    return sizes


# ---- making ----


def make_shard(job: Job, plan: Plan, part: Range, tick: Callable[[], None]) -> None:
    """Write one shard and, after it, the record of it. Of a shard whose entries are all skipped, only the record.

    Raises:
        ValueError: an entry cannot be used, and the job does not skip.
    """
    from diffusion.data.writer import ShardFile  # webdataset, which imports torch

    record: dict[str, Any] = {"shard": None, "original": 0, "enlarged": 0, "classes": {}, "skipped": []}
    classes: Counter[int] = Counter()
    entries = (e for e in job.source.entries(part.place) if _split(e, plan.validation_below) == part.split)
    shard = ShardFile(job.out, part.name, part.split)
    try:
        with shard:
            for number, entry in enumerate(islice(entries, part.count), part.first):
                tick()
                try:
                    made = make(entry.read(), job.rule)
                except Exception as error:  # zipfile, zlib, lmdb, tarfile, the file system: all are of this entry
                    if not job.skip:
                        raise ValueError(
                            f"{job.origin}: {entry.key!r} cannot be used: {_reason(error)}. "
                            f"To leave such images out, and list them in {SKIPPED}: on_bad_sample=skip"
                        ) from error
                    record["skipped"].append([entry.key, _reason(error)])
                    continue
                label = entry.label if job.labelled else None
                shard.write(f"{number:09d}-{safe_key(entry.key)}", made.extension, made.data, label)
                record["original"] += made.original
                record["enlarged"] += made.enlarged
                classes[label] += label is not None
            if not shard.samples:
                raise _Empty
        record["shard"] = asdict(shard.entry())
    except _Empty:
        pass
    record["classes"] = {str(label): n for label, n in sorted(classes.items()) if n}
    write_atomically(_record_path(job, part), json.dumps(record))


class _Empty(Exception):
    """Leaves a shard without samples."""


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _record_path(job: Job, part: Range) -> Path:
    return job.out / STATE / f"{part.name}.json"


def _finished(job: Job, part: Range) -> dict[str, Any] | None:
    """The record of a shard that is on disk, whole; None for one that is still to be made."""
    try:
        record = json.loads(_record_path(job, part).read_bytes())
        if record["skipped"] and not job.skip:
            return None
        if record["shard"] is not None:
            tar, shard = job.out / part.name, record["shard"]
            rows = tar.with_name(tar.name + OFFSETS_SUFFIX).stat().st_size
            if tar.stat().st_size != shard["bytes"] or rows != shard["samples"] * OFFSETS_ROW.itemsize:
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_of(job: Job, plan: Plan) -> dict[str, Any]:
    """All that decides the bytes of the set."""
    entries = {"kind": job.source.kind, "entries": plan.counts, "keys_sha256": plan.digest}
    classes = list(job.source.classes) if job.labelled else []
    size = max(part.count for part in plan.ranges)
    return {
        "name": job.name, **asdict(job.rule), "classes": classes, "validation": job.validation, "shard_samples": size,
        "source": entries,
    }  # fmt: skip


def refuse_other(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds this very data set, finished and with all its files. Nothing is changed.

    Raises:
        ValueError: it holds another one, begun or finished, or other files.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: give a folder.")
    found = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if not found:
        return False
    try:
        recorded = json.loads((out / SETTINGS).read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        what = "another data set" if INDEX_NAME in found else "other files"
        raise ValueError(
            f"out={out} holds {what}, as {min(found - {SETTINGS} or found)}, and no {SETTINGS} of a set to go on with: "
            f"give another folder."
        ) from None
    differing = [key for key in settings if recorded.get(key) != settings[key]]
    if differing:
        was = "; ".join(f"{key}: was {_short(recorded.get(key))}, is {_short(settings[key])}" for key in differing)
        state = "a data set" if INDEX_NAME in found else "the beginning of a data set"
        raise ValueError(f"out={out} holds {state} made otherwise ({was}). Give another out, or remove that folder.")
    if INDEX_NAME not in found:
        return False
    try:
        read_index(out)
    except ValueError:  # files of it are gone: they are made again
        return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + "..."


@contextmanager
def working_in(out: Path) -> Iterator[None]:
    """The folder, made if need be and locked, with what killed processes left in it removed. Empty folders go again.

    Raises:
        ValueError: another process works there.
    """
    before = [p for p in (out, *out.parents) if not p.exists()]
    state = out / STATE
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "ab") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out={out}: another process is preparing there.") from None
        try:
            remove_leftovers(out)
            remove_leftovers(state)
            yield
        finally:
            finished = (out / INDEX_NAME).is_file()  # perhaps by a process that was killed before it tidied up
            if finished or not any(path.suffix == ".json" for path in state.iterdir()):
                shutil.rmtree(state)
            for folder in before:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def make_set(job: Job, plan: Plan, processes: int, report: Report = lambda done: None) -> dict[str, Any]:
    """Make what is missing of the data set, and at last its index; the summary.

    Args:
        processes: that make shards at the same time.
        report: called now and then with the number of entries done, of all.

    Raises:
        ValueError: an entry or the folder cannot be used, no entry is left, or the disk is full. Finished shards stay.
    """
    settings = settings_of(job, plan)
    refuse_other(job.out, settings)
    try:
        with working_in(job.out):
            if refuse_other(job.out, settings):  # again, now that nobody else can write here
                return summary_in(job.out)
            try:
                return _made(job, plan, settings, processes, report)
            except BaseException:
                _withdraw(job, plan)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"out={job.out}: {os.strerror(error.errno)}. "
                f"Finished shards stay: make room, and give the same command."
            ) from error
        raise ValueError(f"out={job.out}: {error}.") from error


def _made(job: Job, plan: Plan, settings: dict[str, Any], processes: int, report: Report) -> dict[str, Any]:
    content = {"settings": settings, "from": job.origin}
    (job.out / INDEX_NAME).unlink(missing_ok=True)  # of a set that has lost files
    write_atomically(job.out / SETTINGS, json.dumps(content, indent=1) + "\n")
    missing = [part for part in plan.ranges if _finished(job, part) is None]
    before = sum(part.count for part in plan.ranges) - sum(part.count for part in missing)
    report(before)
    work = over_processes(
        missing, lambda part, tick: make_shard(job, plan, part, tick), processes, lambda done: report(before + done)
    )
    for _ in work:
        pass
    return _finish(job, plan, settings)


def _withdraw(job: Job, plan: Plan) -> None:
    """After a failure: what is not finished goes, and where nothing is, all."""
    remove_leftovers(job.out)
    kept = 0
    for part in plan.ranges:
        if _finished(job, part) is None:
            for name in (part.name, part.name + OFFSETS_SUFFIX):
                (job.out / name).unlink(missing_ok=True)
            _record_path(job, part).unlink(missing_ok=True)
        else:
            kept += 1
    for name in (SKIPPED, SHEET) if kept else (SKIPPED, SHEET, SETTINGS):
        (job.out / name).unlink(missing_ok=True)


def _finish(job: Job, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything but the shards, the index last; then the records are removed."""
    parts = [(part, _finished(job, part)) for part in plan.ranges]
    lost = [part.name for part, record in parts if record is None]
    assert not lost, f"finished shards are gone: {lost}"
    shards = tuple(Shard(**record["shard"]) for _, record in parts if record["shard"])
    if not any(shard.split == "train" for shard in shards):
        first = next(record["skipped"][0] for _, record in parts if record["skipped"])
        for part, _ in parts:
            _record_path(job, part).unlink()
        raise ValueError(f"{job.origin}: no image can be used; the first is {first[0]!r}: {first[1]}.")
    index = Index(job.out, job.name, job.rule.image_size, job.rule.channels, len(settings["classes"]), shards)
    rows = io.StringIO(newline="")
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["key", "reason"])
    skipped = [entry for _, record in parts for entry in record["skipped"]]
    table.writerows([key.encode(errors="backslashreplace").decode(), reason] for key, reason in skipped)
    classes: dict[str, Counter[str]] = {}
    labels = range(len(settings["classes"]))
    for part, record in parts:
        classes.setdefault(part.split, Counter()).update(record["classes"])
    summary = {
        "images": {split: index.count(split) for split in index.splits},
        "bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "original": sum(record["original"] for _, record in parts),
        "enlarged": sum(record["enlarged"] for _, record in parts),
        "skipped": len(skipped),
        "reasons": dict(Counter(_kind(reason) for _, reason in skipped).most_common()),
        "ignored": len(job.source.ignored),
        "classes": {split: [counted[str(label)] for label in labels] for split, counted in classes.items()},
    }
    write_atomically(job.out / SKIPPED, rows.getvalue())
    write_atomically(job.out / SHEET, contact_sheet(index, settings["classes"]))
    content = {"settings": settings, "from": job.origin, "summary": summary}
    write_atomically(job.out / SETTINGS, json.dumps(content, indent=1) + "\n")
    write_index(index)
    return summary


def _kind(reason: str) -> str:
    """A reason without the figures of one image, to be counted."""
    return " ".join("N" if any(c.isdigit() for c in word) else word for word in reason.split(":")[0].split())


def summary_in(out: Path) -> dict[str, Any]:
    """The summary of the finished set in a folder."""
    return json.loads((out / SETTINGS).read_bytes())["summary"]


def contact_sheet(index: Index, classes: list[str]) -> bytes:
    """A PNG of 64 images, spread evenly over the training shards, with their classes below them."""
    shards = index.of_split("train")
    total = index.count("train")
    chosen = sorted({place * total // min(TILES, total) for place in range(min(TILES, total))})
    columns, side = min(8, len(chosen)), min(index.image_size, TILE)
    side *= max(1, 64 // side)  # small ones enlarged by a whole number
    foot = 14 if classes else 0
    sheet = Image.new("RGB", (columns * (side + 2), -(-len(chosen) // columns) * (side + foot + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    first, which = 0, 0
    for tile, place in enumerate(chosen):
        while place >= first + shards[which].samples:
            first, which = first + shards[which].samples, which + 1
        at, size, label_at, label_size = (int(x) for x in index.offsets(shards[which])[place - first])
        with open(index.path(shards[which]), "rb") as file:
            file.seek(at)
            picture = Image.open(io.BytesIO(file.read(size))).convert("RGB")
            file.seek(label_at)
            label = file.read(label_size)
        if picture.size != (side, side):
            enlarging = picture.width < side
            picture = picture.resize((side, side), Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS)
        left, top = tile % columns * (side + 2) + 1, tile // columns * (side + foot + 2) + 1
        sheet.paste(picture, (left, top))
        if classes:
            draw.text((left, top + side), classes[int(label)][: max(1, side // 6)], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


# ---- verifying ----


def verify_set(out: Path, processes: int, report: Report = lambda done: None) -> tuple[Index, list[str]]:
    """(the index, what is wrong with the set, a line each): sha256 of every shard, offsets, and every sample decoded.

    Raises:
        ValueError: there is no readable index; or a file it names is missing or has another size.
    """
    index = read_index(out)
    found = over_processes(list(index.shards), lambda s, tick: verify_shard(index, s, tick), processes, report)
    return index, [complaint for _, complaints in sorted(found, key=lambda pair: pair[0]) for complaint in complaints]


def verify_shard(index: Index, shard: Shard, tick: Callable[[], None]) -> list[str]:
    """What is wrong with one shard: its digest, its offsets, its samples; the first twenty."""
    import tarfile

    from diffusion.data.samples import decode_image, decode_label
    from diffusion.files import sha256_of

    wrong = []
    if sha256_of(index.path(shard)) != shard.sha256:
        wrong.append(f"{shard.path}: its sha256 is not the one in {INDEX_NAME}: it has changed since it was made")
    expected, keys = [], []
    try:
        with tarfile.open(index.path(shard), "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not keys or keys[-1] != key:
                    keys.append(key)
                    expected.append([0, 0, 0, 0])
                at = 2 if extension in ("cls", "json") else 0
                expected[-1][at : at + 2] = [member.offset_data, member.size]
    except tarfile.TarError as error:
        wrong.append(f"{shard.path}: it is no tar any more: {error}")
    if not np.array_equal(np.array(expected, np.uint64).reshape(-1, 4), index.offsets(shard)):
        wrong.append(f"{shard.path}{OFFSETS_SUFFIX}: it does not say where the samples of the tar are")
    with open(index.path(shard), "rb") as file:
        for key, (at, size, label_at, label_size) in zip(keys, expected, strict=True):
            tick()
            try:
                file.seek(at)
                decode_image(file.read(size), index.channels, index.image_size)
                if index.classes:
                    file.seek(label_at)
                    decode_label(file.read(label_size), index.classes)
            except Exception as error:
                wrong.append(f"{shard.path}: sample {key!r} cannot be decoded: {error}")
    return wrong[:20]
