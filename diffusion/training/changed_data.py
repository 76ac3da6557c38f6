"""Handling of a data set that changes during a run: the run saves no further checkpoint and ends.

No sample is used that is known to have changed (`data.shards.readers`), so the checkpoints of a run come from unchanged
data, with one exception. If a set has no digest per sample, the content of a file can change without a sign. When such
a change is found, all checkpoints since the last check of the content may come from changed data, and are renamed. The
time of that check is also written to the run folder, because another rank may still be writing a checkpoint; the next
start renames that one too.
"""

import contextlib
import json
from collections.abc import Callable

from diffusion.data.shards.changes import DataChanged
from diffusion.distributed.ranks import Ranks
from diffusion.files import read_regular, write_atomically
from diffusion.runs.folder import RunFolder

NOTE = "changed_data.json"  # in the run folder: the time since when checkpoints may come from changed data
SUFFIX = "other_data"  # suffix of a checkpoint that is set aside


class NoteDamaged(ValueError):
    """The note is damaged, so that it is unknown which checkpoints may come from changed data."""

    exit_status = 2


def look_together(look: Callable[[], None], ranks: Ranks) -> None:
    """Check the data on all ranks. Raises DataChanged on every rank if one of them has found a change."""
    found = None
    try:
        look()
    except DataChanged as error:
        found = error
    first = ranks.from_main(next(filter(None, ranks.collected(found)), None))
    if found or first:
        raise found or first


def distrust(folder: RunFolder, error: BaseException, aside: bool = True) -> list[str]:
    """Set aside the checkpoints that may come from changed data, if the error says so, and write the note.

    Args:
        aside: False: only write the note.

    Returns:
        A line of text for each checkpoint that was set aside.
    """
    if not isinstance(error, DataChanged) or error.since is None:
        return []
    write_atomically(folder.path / NOTE, json.dumps({"since": error.since, "why": str(error)}) + "\n")
    return _set_aside(folder, error.since) if aside else []


def distrust_noted(folder: RunFolder) -> list[str]:
    """At the start of a run: set aside further checkpoints according to the note. Returns a line of text for each.

    Raises:
        NoteDamaged: the note cannot be read.
    """
    note = folder.path / NOTE
    try:
        since = float(json.loads(read_regular(note, 1 << 20))["since"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise NoteDamaged(
            f"{note} is damaged. It holds the time since when checkpoints of this run may come from changed data. "
            f"Move away the checkpoints that you do not trust, and delete this file."
        ) from error
    lines = _set_aside(folder, since)
    note.unlink()
    return lines


def _set_aside(folder: RunFolder, since: float) -> list[str]:
    lines = []
    for step in folder.steps():
        with contextlib.suppress(FileNotFoundError):  # another rank has done it
            if folder.checkpoint_path(step).stat().st_mtime > since:
                path = folder.set_aside(step, SUFFIX)
                lines.append(f"Set aside, because it may come from changed data: {path}")
    if lines:
        folder.point_to_what_is_left()
    return lines
