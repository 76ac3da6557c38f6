"""Creation of the shards of a plan, by several processes. It can be resumed after a kill, and gives the same bytes.

Files in `out`, during the work and after it:

    prepare.json          the settings that determine the content; at the end also the summary
    .prepare/SHARD.json   the record of a finished shard; the shard is finished if this file exists
    .prepare/lock         held by the process that works here
    skipped.csv  contact_sheet.png  index.json     written at the end; the set is complete when index.json exists

This module knows plans, rules and shards. It knows neither conf/ nor the terminal.
"""

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion.data.prepare.image import make
from diffusion.data.prepare.plan import Job, Plan, Range, split_of
from diffusion.data.prepare.processes import over_processes
from diffusion.data.prepare.sheet import contact_sheet
from diffusion.data.shards.index import INDEX_NAME, Index, Shard, read_index, shard_files, write_index
from diffusion.data.sources.source import BadEntry, safe_key
from diffusion.files import Room, describe_disk_error, locked, remove_leftovers, write_atomically
from diffusion.progress import counted

SETTINGS, STATE, SKIPPED, SHEET = "prepare.json", ".prepare", "skipped.csv", "contact_sheet.png"
Report = Callable[[int], None]


def make_shard(job: Job, plan: Plan, part: Range, tick: Callable[[], None]) -> int:
    """Write one shard, and then its record. If all its entries are skipped, write only the record.

    Returns:
        The number of entries that were skipped.

    Raises:
        ValueError: an entry cannot be used, and the job does not skip.
    """
    from diffusion.data.shards.writer import ShardFile  # it needs webdataset, which imports torch

    record: dict[str, Any] = {"shard": None, "original": 0, "enlarged": 0, "classes": {}, "skipped": []}
    classes: Counter[int] = Counter()
    entries = (e for e in job.source.entries(part.place) if split_of(e, plan.validation_below) == part.split)
    shard = ShardFile(job.out, part.name, part.split)
    try:
        with shard:
            for number, entry in enumerate(islice(entries, part.count), part.first):
                tick()
                try:
                    made = make(entry.read(), job.rule)
                except BadEntry as error:
                    reason = str(error).strip().rstrip(".")
                    if not job.skip:
                        raise ValueError(
                            f"{job.origin}: {entry.key!r} cannot be used: {reason}. To skip such images, and list "
                            f"them in {SKIPPED}, give on_bad_sample=skip."
                        ) from error
                    record["skipped"].append([entry.key, reason])
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
    return len(record["skipped"])


class _Empty(Exception):
    """Raised inside a shard that has no samples, so that it is not written."""


def _record_path(job: Job, part: Range) -> Path:
    return job.out / STATE / f"{part.name}.json"


def _finished(job: Job, part: Range) -> dict[str, Any] | None:
    """The record of a finished shard whose files are complete; None for a shard that must be created."""
    try:
        record = json.loads(_record_path(job, part).read_bytes())
        if record["skipped"] and not job.skip:
            return None
        if record["shard"] is not None:
            shard = Shard(**record["shard"])
            if shard.path != part.name or shard.digests_sha256 is None:  # None: of an earlier version, without digests
                return None
            if any((job.out / name).stat().st_size != size for name, size, _ in shard.files):
                return None
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_of(job: Job, plan: Plan) -> dict[str, Any]:
    """All settings that determine the bytes of the set."""
    entries = {"kind": job.source.kind, "entries": plan.counts, "keys_sha256": plan.digest}
    classes = list(job.source.classes) if job.labelled else []
    size = max(part.count for part in plan.ranges)
    return {
        "name": job.name, **asdict(job.rule), "classes": classes, "validation": job.validation, "shard_samples": size,
        "source": entries,
    }  # fmt: skip


def refuse_other(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds exactly this data set, complete. Changes nothing.

    Raises:
        ValueError: it holds another data set, complete or not, or other files.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file. Give a folder.")
    found = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if not found:
        return False
    try:
        content = json.loads((out / SETTINGS).read_bytes())
        recorded, whole = dict(content["settings"]), isinstance(content.get("summary"), dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        what = "another data set" if INDEX_NAME in found else "other files"
        raise ValueError(
            f"out={out} holds {what} (such as {min(found - {SETTINGS} or found)}), and no {SETTINGS} of a set that "
            f"could be continued. Give another folder."
        ) from None
    differing = [key for key in settings if recorded.get(key) != settings[key]]
    if differing:
        was = "; ".join(f"{key}: was {_short(recorded.get(key))}, is {_short(settings[key])}" for key in differing)
        state = "a data set" if INDEX_NAME in found else "an incomplete data set"
        raise ValueError(
            f"out={out} holds {state} with other settings ({was}). Give another out, or remove that folder."
        )
    if INDEX_NAME not in found or not whole:
        return False
    try:
        read_index(out)
    except ValueError:  # files are missing: they are created again
        return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:200] + "..."


@contextmanager
def working_in(out: Path) -> Iterator[None]:
    """Context that creates and locks the folder, and removes the temporary files of killed processes.

    At the end it removes empty folders.

    Raises:
        ValueError: another process works there.
    """
    state = out / STATE
    with locked(state / "lock", f"out={out}"):
        try:
            remove_leftovers(out)
            remove_leftovers(state)
            yield
        finally:
            finished = (out / INDEX_NAME).is_file()  # perhaps from a process that was killed before this cleanup
            if finished or not any(path.suffix == ".json" for path in state.iterdir()):
                shutil.rmtree(state)


def make_set(job: Job, plan: Plan, processes: int, report: Report = lambda done: None) -> dict[str, Any]:
    """Create the missing shards of the data set, and then its index. Returns the summary.

    Args:
        processes: number of processes that create shards.
        report: called regularly with the number of entries done.

    Raises:
        ValueError: an entry or the folder cannot be used, too many or all entries were skipped, or the disk is full.
            Finished shards are kept.
    """
    settings = settings_of(job, plan)
    refuse_other(job.out, settings)
    try:
        with working_in(job.out):
            if refuse_other(job.out, settings):  # check again, now that the folder is locked
                return summary_in(job.out)
            try:
                return _made(job, plan, settings, processes, report)
            except BaseException:
                _withdraw(job, plan)
                raise
    except OSError as error:
        message = describe_disk_error(error, Room("out", job.out, *_needs(job, plan)))
        raise ValueError(message or f"out={job.out}: {error}.") from error


def _needs(job: Job, plan: Plan) -> tuple[int, str]:
    """The approximate number of bytes still to be written, and what they are for.

    It is estimated from the finished shards or, without any, from the size of uncompressed images.
    """
    records = [(part.count, _finished(job, part)) for part in plan.ranges]
    done = [(count, record["shard"]["bytes"]) for count, record in records if record and record["shard"]]
    images, written = (sum(column) for column in zip(*done, strict=True)) if done else (0, 0)
    missing = sum(count for count, record in records if record is None)
    each = written / images if images else job.rule.channels * job.rule.image_size**2
    return int(missing * each), f"about {counted(missing, 'image', 'images')}"


def _made(job: Job, plan: Plan, settings: dict[str, Any], processes: int, report: Report) -> dict[str, Any]:
    content = {"settings": settings, "from": job.origin}
    (job.out / INDEX_NAME).unlink(missing_ok=True)  # the index of a set with missing files
    write_atomically(job.out / SETTINGS, json.dumps(content, indent=1) + "\n")
    records = {part: _finished(job, part) for part in plan.ranges}
    missing = [part for part in plan.ranges if records[part] is None]
    before = sum(part.count for part in plan.ranges) - sum(part.count for part in missing)
    skipped = sum(len(record["skipped"]) for record in records.values() if record)
    _check_share(job, plan, skipped)
    report(before)
    work = over_processes(
        missing, lambda part, tick: make_shard(job, plan, part, tick), processes, lambda done: report(before + done)
    )
    for _, more in work:
        skipped += more
        _check_share(job, plan, skipped)
    return _finish(job, plan, settings)


def _check_share(job: Job, plan: Plan, skipped: int) -> None:
    """Raise ValueError if more entries were skipped than the job allows."""
    total = sum(plan.counts.values())
    if skipped <= job.max_bad_share * total:
        return
    records = (_finished(job, part) for part in plan.ranges)
    key, reason = next(record["skipped"][0] for record in records if record and record["skipped"])
    raise ValueError(
        f"{job.origin}: {skipped:,} of {total:,} images cannot be used, more than max_bad_share={job.max_bad_share:g} "
        f"allows. The first is {key!r}: {reason}."
    )


def _withdraw(job: Job, plan: Plan) -> None:
    """After a failure, remove what is not finished; if no shard is finished, remove everything."""
    remove_leftovers(job.out)
    records = {part: _finished(job, part) for part in plan.ranges}
    kept = any(record and record["shard"] for record in records.values())
    for part, record in records.items():
        if record is None or not kept:
            for name in shard_files(part.name):
                (job.out / name).unlink(missing_ok=True)
            _record_path(job, part).unlink(missing_ok=True)
    for name in (SKIPPED, SHEET) if kept else (SKIPPED, SHEET, SETTINGS):
        (job.out / name).unlink(missing_ok=True)


def _finish(job: Job, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Write everything except the shards, the index last. Returns the summary."""
    parts = [(part, _finished(job, part)) for part in plan.ranges]
    lost = [part.name for part, record in parts if record is None]
    assert not lost, f"finished shards are missing: {lost}"
    shards = tuple(Shard(**record["shard"]) for _, record in parts if record["shard"])
    if not any(shard.split == "train" for shard in shards):
        first = next(record["skipped"][0] for _, record in parts if record["skipped"])
        raise ValueError(f"{job.origin}: no image can be used. The first is {first[0]!r}: {first[1]}.")
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
        "classes": {split: [numbers[str(label)] for label in labels] for split, numbers in classes.items()},
    }
    write_atomically(job.out / SKIPPED, rows.getvalue())
    write_atomically(job.out / SHEET, contact_sheet(index, settings["classes"]))
    content = {"settings": settings, "from": job.origin, "summary": summary}
    write_atomically(job.out / SETTINGS, json.dumps(content, indent=1) + "\n")
    write_index(index)
    return summary


def _kind(reason: str) -> str:
    """A reason with its numbers replaced by N, so that equal reasons can be counted."""
    return " ".join("N" if any(c.isdigit() for c in word) else word for word in reason.split(":")[0].split())


def summary_in(out: Path) -> dict[str, Any]:
    """The summary of the complete set in a folder."""
    return json.loads((out / SETTINGS).read_bytes())["summary"]
