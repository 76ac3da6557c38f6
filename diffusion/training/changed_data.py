"""What a run does when its data set has changed under it: it saves nothing more, and ends.

No sample is used that is known to be another one (`data.shards.readers`), so the checkpoints of a run hold sound data
only, with one exception: the content of a file may change without any sign of it, in a set that has no digest for each
sample. When that is found out, the weights of all checkpoints since the content was last checked may come from it, and
these checkpoints are set aside. The time is also noted in the run folder, because another rank may still be writing a
checkpoint: the next start sets aside what it finds.
"""

import contextlib
import json
from collections.abc import Callable

from diffusion.data.shards.changes import DataChanged
from diffusion.distributed.ranks import Ranks
from diffusion.files import read_regular, write_atomically
from diffusion.runs.folder import RunFolder

NOTE = "changed_data.json"  # in the run folder: since when checkpoints are not to be trusted
SUFFIX = "other_data"  # of a checkpoint that is set aside


class NoteDamaged(ValueError):
    """Nobody knows which checkpoints are to be trusted."""

    exit_status = 2


def look_together(look: Callable[[], None], ranks: Ranks) -> None:
    """Look at the data on all ranks. DataChanged on every rank if one of them has found a change."""
    found = None
    try:
        look()
    except DataChanged as error:
        found = error
    first = ranks.from_main(next(filter(None, ranks.collected(found)), None))
    if found or first:
        raise found or first


def distrust(folder: RunFolder, error: BaseException, aside: bool = True) -> list[str]:
    """Note since when checkpoints may come from other data, if the error says so, and set them aside; a line about
    each. `aside` False: only note it."""
    if not isinstance(error, DataChanged) or error.since is None:
        return []
    write_atomically(folder.path / NOTE, json.dumps({"since": error.since, "why": str(error)}) + "\n")
    return _set_aside(folder, error.since) if aside else []


def distrust_noted(folder: RunFolder) -> list[str]:
    """At the start of a run: set aside what was not yet there when the change was found; a line about each."""
    note = folder.path / NOTE
    try:
        since = float(json.loads(read_regular(note, 1 << 20))["since"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise NoteDamaged(
            f"{note} is damaged. It says since when the checkpoints of this run may come from changed data: move those "
            f"away that you do not trust, and remove the note."
        ) from error
    lines = _set_aside(folder, since)
    note.unlink()
    return lines


def _set_aside(folder: RunFolder, since: float) -> list[str]:
    lines = []
    for step in folder.steps():
        with contextlib.suppress(FileNotFoundError):  # another rank did it
            if folder.checkpoint_path(step).stat().st_mtime > since:
                path = folder.set_aside(step, SUFFIX)
                lines.append(f"Set aside, as it may come from other data: {path}")
    if lines:
        folder.point_to_what_is_left()
    return lines
