"""A path -> the source of images that it is."""

import gzip
import os
import zipfile
import zlib
from pathlib import Path

from diffusion.data.sources.arrays import ArraySource, npz_arrays
from diffusion.data.sources.cifar import cifar_source
from diffusion.data.sources.files import FileSource
from diffusion.data.sources.lmdb_folder import LmdbSource
from diffusion.data.sources.members import FolderMembers, TarMembers, ZipMembers
from diffusion.data.sources.source import Source
from diffusion.data.sources.tar import DamagedTar, begins_as_tar, compression_of


def open_source(path: str | os.PathLike, labels_from: str = "auto", max_bytes: int = 1 << 29) -> Source:
    """The source that a path is: told by what is there, not by its name.

    Args:
        path: an LMDB as LSUN distributes it; a CIFAR-10 archive, python or binary, .tar.gz or unpacked; an .npz; a
            folder, .zip or .tar of images.
        labels_from: `auto` (dataset.json, else folders), `none`, `folders`, or a JSON or CSV file; for files of images.
        max_bytes: an encoded image may have, at most.

    Raises:
        ValueError: nothing is there, or it is none of these, or damaged, or empty.
    """
    path = Path(path)
    if path.name == "data.mdb":
        path = path.parent
    if not path.exists():
        raise ValueError(f"source={path}: file or folder not found. Give a path, or source=digits.")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"source={path} is neither a file nor a folder.")
    try:
        if path.is_dir():
            if (path / "data.mdb").is_file():
                return LmdbSource(path, max_bytes)
            return cifar_source(path) or FileSource(FolderMembers(path), labels_from, max_bytes)
        if begins_as_tar(path):  # before zips, which are known by their ends: a tar may end in one
            return cifar_source(path) or FileSource(TarMembers(path), labels_from, max_bytes)
        if zipfile.is_zipfile(path):
            arrays = npz_arrays(path)
            return ArraySource(*arrays) if arrays else FileSource(ZipMembers(path), labels_from, max_bytes)
        if by := compression_of(path):
            raise ValueError(f"source={path} is compressed by {by}: unpack it first.")
    except (DamagedTar, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"source={path} is damaged or truncated: {error}. Download it again.") from error
    except OSError as error:
        raise ValueError(f"source={path} cannot be read: {error}.") from error
    raise ValueError(
        f"source={path} is neither an LMDB (a folder with data.mdb), nor a folder, .zip or .tar of images, nor an "
        f".npz, nor a CIFAR-10 archive; if it is a download, it may be cut off."
    )
