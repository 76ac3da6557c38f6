"""Sources of image files in a folder, a zip or a tar, with labels from their folders or from a table.

Names are used for labels and as part of keys. The entries are in the order of a hash of their names. So the neighbours
in a shard have mixed classes, although a folder holds one class, and the order is always the same.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from diffusion.data.sources.members import Members
from diffusion.data.sources.source import MOST_CLASSES, BadEntry, Entry, key_hash, labels_of
from diffusion.progress import counted

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
SPLITS |= {"validation": "validation", "test": "test", "testing": "test"}
TABLE = "dataset.json"
TABLE_BYTES = 1 << 28
DIGITS = 18  # largest number of digits of a class number in text; longer text is a name


class FileSource:
    """A `Source` over the image files of a folder or archive.

    Folders named train, test, val or similar give the split. Folders that are common to all images are ignored; the
    next folder is the class, if there are at least two.

    Args:
        members: the files.
        labels_from: `auto`, `none`, `folders`, or the path of a JSON or CSV file; see `source.labels_of`.
        max_bytes: largest size of an image file.

    Raises:
        ValueError: there are no images, or the labels cannot be read.
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
        self.kind = f"{members.kind} of {counted(len(images), 'image', 'images')}"

    def _refuse_empty(self, names: list[str]) -> None:
        where = f"source={self.members.path}"
        for name in names:
            if name.endswith("data.mdb"):
                raise ValueError(f"{where} holds an LMDB, which cannot be read inside an archive. Unpack it first.")
        others = f"it has {counted(len(names), 'other file', 'other files')}, such as {names[0]!r}" if names else ""
        raise ValueError(
            f"{where}: no image ({', '.join(EXTENSIONS)}) in this {self.members.kind}; {others or 'it is empty'}."
        )

    def _labelled(
        self, labels_from: str, common: str, relative: list[str], names: list[str]
    ) -> tuple[tuple[str, ...], list[int] | None]:
        """The names of the classes and the label of each image; () and None without labels."""
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
                images = counted(len(without), "image has", "images have")
                raise ValueError(f"labels_from={labels_from}: {images} no label, such as {without[0]!r}.")
        else:
            given = [name.split("/")[0] if "/" in name else None for name in relative]
            if None in given or len(set(given)) < 2:
                if labels_from == "folders":
                    raise ValueError(
                        f"labels_from=folders needs at least two folders with images and no image outside of them, "
                        f"unlike {self._names[given.index(None) if None in given else 0]!r} in {self.members.path}."
                    )
                return (), None
        return _numbered(given, labels_from, table is not None)

    def _table(self, name: str) -> bytes:
        try:
            return self.members.read(name, TABLE_BYTES)
        except BadEntry as error:
            raise ValueError(f"source={self.members.path}: {name!r} cannot be used: {error}.") from error

    def entries(self, start: int | None = None) -> Iterator[Entry]:
        """The images, in the order of the hashes of their names."""
        for place in range(start or 0, len(self._names)):
            name = self._names[place]
            label = None if self._labels is None else self._labels[place]
            read = partial(self.members.read, name, self.max_bytes)
            yield Entry(place, name, self._splits[place] if self._splits else "train", label, read)


def _hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden or created by the system."""
    parts = (part for part in name.split("/") if part not in (".", ".."))
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _macos(name: str) -> bool:
    """Whether a file is one of those that macOS adds to archives and foreign disks, beside each file."""
    return any(part.startswith(("._", "__MACOSX")) for part in name.split("/"))


def _splits(names: list[str]) -> tuple[list[str] | None, list[str]]:
    """The split of each name, and the names without their split folder; None if there are no such folders.

    All names must be in folders of splits, and one of them must be train.
    """
    tops = {name.split("/")[0].lower() if "/" in name else "" for name in names}
    if len(tops) < 2 or not tops <= set(SPLITS) or "train" not in {SPLITS[top] for top in tops}:
        return None, names
    pairs = [name.split("/", 1) for name in names]
    return [SPLITS[top.lower()] for top, _ in pairs], [rest for _, rest in pairs]


def _numbered(given: list[int | str], labels_from: str, table: bool) -> tuple[tuple[str, ...], list[int]]:
    """The names of the classes and the labels. Integers in a table are labels; names are numbered in sorted order."""
    decimal = all(isinstance(x, int) or (x.strip().isdecimal() and len(x) <= DIGITS) for x in given)
    if table and decimal:
        labels = [int(x) for x in given]
        if min(labels) < 0 or max(labels) >= MOST_CLASSES:
            raise ValueError(
                f"labels_from={labels_from}: labels are from {min(labels)} to {max(labels)}, expected 0 to "
                f"{MOST_CLASSES - 1}."
            )
        return tuple(str(n) for n in range(max(labels) + 1)), labels
    classes = sorted({str(x) for x in given}, key=int if decimal else None)
    number = {name: n for n, name in enumerate(classes)}
    return tuple(classes), [number[str(x)] for x in given]
