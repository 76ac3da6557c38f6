"""Images as files: those of a folder, a zip or a tar, with labels from the folders they lie in or from a table.

A name is looked at for a label and becomes part of a key. The entries are in the order of a hash of their names,
because folders hold one class each: neighbours in a shard are then of mixed classes, and always the same.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from diffusion.data.sources.members import Members
from diffusion.data.sources.source import MOST_CLASSES, BadEntry, Entry, key_hash, labels_of

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
SPLITS |= {"validation": "validation", "test": "test", "testing": "test"}
TABLE = "dataset.json"
TABLE_BYTES = 1 << 28
DIGITS = 18  # of a class's number in text; more are a name


class FileSource:
    """A `Source` over the images among some members.

    Below folders named train, test, val or the like, images are of that split. What is left of a name after the folders
    common to all: its first folder is its class, where there are at least two.

    Args:
        members: the files.
        labels_from: `auto`, `none`, `folders`, or the path of a JSON or CSV file; see `sources.labels_of`.
        max_bytes: an image may have, at most.

    Raises:
        ValueError: there is no image, or the labels cannot be had.
    """

    def __init__(self, members: Members, labels_from: str, max_bytes: int) -> None:
        self.members, self.max_bytes = members, max_bytes
        every = members.names()
        names = [name for name in every if not _hidden(name)]
        images = [n for n in names if n.lower().endswith(EXTENSIONS)]
        others = [n for n in names if not n.lower().endswith(EXTENSIONS) and PurePosixPath(n).name != TABLE]
        hidden = [f"{n} (hidden)" for n in every if _hidden(n) and n.lower().endswith(EXTENSIONS) and not _macos(n)]
        self.ignored = sorted(others + hidden + members.left_out)
        if not images:
            self._refuse_empty(names)
        images.sort(key=lambda name: (key_hash(name, b"order"), name))
        common = os.path.commonprefix([f"{os.path.dirname(name)}/" if "/" in name else "" for name in images])
        common = common[: common.rfind("/") + 1]
        relative = [name[len(common) :] for name in images]
        self._splits, relative = _splits(relative)
        self._names = images
        self.classes, self._labels = self._labelled(labels_from, common, relative, names)
        self.kind = f"{members.kind} of {len(images):,} images"

    def _refuse_empty(self, names: list[str]) -> None:
        where = f"source={self.members.path}"
        for name in names:
            if name.endswith("data.mdb"):
                raise ValueError(f"{where} holds an LMDB, which cannot be read inside an archive: unpack it first.")
        met = f"; it has {len(names):,} other files, as {names[0]!r}" if names else "; it is empty"
        raise ValueError(f"{where}: no image ({', '.join(EXTENSIONS)}) in this {self.members.kind}{met}.")

    def _labelled(
        self, labels_from: str, common: str, relative: list[str], names: list[str]
    ) -> tuple[tuple[str, ...], list[int] | None]:
        """(names of the classes, the label of each image), or ((), None) without labels."""
        if labels_from == "none":
            return (), None
        table = None
        if labels_from == "auto":
            at = next((n for n in (f"{common}{TABLE}", TABLE) if n in names), None)
            table = labels_of(at, self._table(at)) if at else None
        elif labels_from != "folders":
            try:
                table = labels_of(labels_from, Path(labels_from).read_bytes())
            except OSError as error:
                raise ValueError(f"labels_from={labels_from} cannot be read: {error.strerror}.") from error
        if table is not None:
            given = [table.get(name, table.get(name[len(common) :])) for name in self._names]
            without = [name for name, label in zip(self._names, given, strict=True) if label is None]
            if without:
                raise ValueError(f"labels_from={labels_from}: {len(without):,} images lack a label, as {without[0]!r}.")
        else:
            given = [name.split("/")[0] if "/" in name else None for name in relative]
            if None in given or len(set(given)) < 2:
                if labels_from == "folders":
                    raise ValueError(
                        f"labels_from=folders: the images of {self.members.path} do not all lie in one of several "
                        f"folders, as {self._names[given.index(None) if None in given else 0]!r}."
                    )
                return (), None
        return _numbered(given, labels_from, table is not None)

    def _table(self, name: str) -> bytes:
        try:
            return self.members.read(name, TABLE_BYTES)
        except BadEntry as error:
            raise ValueError(f"source={self.members.path}: {name!r} cannot be used: {error}.") from error

    def entries(self, start: int | None = None) -> Iterator[Entry]:
        """The images in the order of the hashes of their names."""
        for place in range(start or 0, len(self._names)):
            name = self._names[place]
            label = None if self._labels is None else self._labels[place]
            read = partial(self.members.read, name, self.max_bytes)
            yield Entry(place, name, self._splits[place] if self._splits else "train", label, read)


def _hidden(name: str) -> bool:
    """Whether a file or one of its folders is the system's and not the user's."""
    parts = (part for part in name.split("/") if part not in (".", ".."))
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _macos(name: str) -> bool:
    """Whether a file is what macOS adds to archives and foreign disks, beside each file and with its extension."""
    return any(part.startswith(("._", "__MACOSX")) for part in name.split("/"))


def _splits(names: list[str]) -> tuple[list[str] | None, list[str]]:
    """(the split of each name, the names without it), where all lie below train and folders of other splits."""
    tops = {name.split("/")[0].lower() if "/" in name else "" for name in names}
    if len(tops) < 2 or not tops <= set(SPLITS) or "train" not in {SPLITS[top] for top in tops}:
        return None, names
    pairs = [name.split("/", 1) for name in names]
    return [SPLITS[top.lower()] for top, _ in pairs], [rest for _, rest in pairs]


def _numbered(given: list[int | str], labels_from: str, table: bool) -> tuple[tuple[str, ...], list[int]]:
    """(classes, labels): integers of a table are labels themselves; names are numbered in their sorted order."""
    decimal = all(isinstance(x, int) or (x.strip().isdecimal() and len(x) <= DIGITS) for x in given)
    if table and decimal:
        labels = [int(x) for x in given]
        if min(labels) < 0 or max(labels) >= MOST_CLASSES:
            raise ValueError(f"labels_from={labels_from}: labels from {min(labels)} to {max(labels)}; 0 is the first.")
        return tuple(str(n) for n in range(max(labels) + 1)), labels
    classes = sorted({str(x) for x in given}, key=int if decimal else None)
    number = {name: n for n, name in enumerate(classes)}
    return tuple(classes), [number[str(x)] for x in given]
