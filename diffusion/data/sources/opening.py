"""Opening a path as a source of images."""

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
    """Open a path as a source. The kind of source is detected from the content, not from the name.

    Args:
        path: an LMDB of LSUN; a CIFAR-10 archive, python or binary, as .tar.gz or unpacked; an .npz; or a folder, .zip
            or .tar of images.
        labels_from: for image files: `auto` (dataset.json, else folders), `none`, `folders`, or a JSON or CSV file.
        max_bytes: largest size of an encoded image.

    Raises:
        ValueError: the path does not exist, is none of these, or is damaged or empty.
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
        if begins_as_tar(path):  # before zips, which are recognised by their end: a tar may end with a zip
            return cifar_source(path) or FileSource(TarMembers(path), labels_from, max_bytes)
        if zipfile.is_zipfile(path):
            arrays = npz_arrays(path)
            return ArraySource(*arrays) if arrays else FileSource(ZipMembers(path), labels_from, max_bytes)
        if by := compression_of(path):
            raise ValueError(f"source={path} is compressed by {by}. Unpack it first.")
    except (DamagedTar, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"source={path} is damaged or truncated: {error}. Download it again.") from error
    except OSError as error:
        raise ValueError(f"source={path} cannot be read: {error}.") from error
    raise ValueError(
        f"source={path} is neither an LMDB (a folder with data.mdb), nor a folder, .zip or .tar of images, nor an "
        f".npz, nor a CIFAR-10 archive. If it was downloaded, it may be truncated."
    )
