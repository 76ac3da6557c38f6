"""Scores of images that are there: folders, zips and npz, by a network of one's own."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows
from inceptions import OWN, small
from PIL import Image

from diffusion.build import extractors
from diffusion.build.extractors import Choice

METRICS = "metrics=[fid,is,kid,precision,recall,nearest]"


def colours(count: int, seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def as_folder(images: np.ndarray, folder: Path, extension: str = "png") -> Path:
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{k:04d}.{extension}")
    return folder


def test_a_folder_a_zip_and_an_npz_of_the_same_images_score_the_same(call, tmp_path):
    a, b = colours(40, 0), colours(30, 1)
    as_folder(a, tmp_path / "a")
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a")
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", arr_0=b)
    found = []
    for name in ("a", "a.zip", "a.npz"):
        words = [f"images={name}", "reference=b.npz", *OWN, METRICS, f"out={len(found)}.jsonl"]
        status, output = call("evaluate", *words)
        assert status == 0, output
        found.append({k: r["value"] for k, r in rows(tmp_path / f"{len(found)}.jsonl").items()})
    assert found[0] == found[1] == found[2]
    row = rows(tmp_path / "0.jsonl")["fid"]
    assert row["metric"] == "own-FID" and row["extractor"] == "own" and len(row["extractor_sha256"]) == 64
    assert (tmp_path / "0_neighbours.png").is_file()


def test_the_picture_shows_the_nearest_real_images(call, tmp_path):
    real = colours(50, 0)
    np.savez(tmp_path / "a.npz", arr_0=real[[7, 20, 31]])
    np.savez(tmp_path / "b.npz", arr_0=real)
    words = ["images=a.npz", "reference=b.npz", *OWN, "metrics=[fid,nearest]", "neighbours=3", "out=r.jsonl"]
    assert call("evaluate", *words)[0] == 0
    assert rows(tmp_path / "r.jsonl")["nearest"]["value"] == 0
    picture = np.asarray(Image.open(tmp_path / "r_neighbours.png"))
    side = 34  # images of 16 pixels, doubled, and the lines between them
    for row, number in enumerate((7, 20, 31)):
        tile = lambda column, y=2 + row * side: picture[y : y + 32 : 2, 2 + column * side :][:, :32:2]  # noqa: E731
        assert (tile(0) == real[number]).all() and (tile(2) == real[number]).all()
        assert (tile(1) == 24).all() and (tile(3) != real[number]).any()


def test_a_users_own_module_is_an_extractor(call, tmp_path):
    """With a file of weights, whose digest is checked before it is read."""
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"weights")
    chosen = Choice("own", target="inceptions.small")
    one, two = (extractors.custom_extractor(chosen) for _ in range(2))
    assert one.digest == two.digest and one.title("FID") == "own-FID"
    other = extractors.custom_extractor(replace(chosen, target="inceptions.Small"))
    assert other.digest != one.digest  # the same weights, perhaps not the same features
    assert extractors.code_of(small) == extractors.code_of(type(one.network)) and len(extractors.code_of(small)) == 64
    assert extractors.code_of(partial(small)) is None and extractors.code_of(dict) is None
    assert torch.equal(one.network.head.weight, small().head.weight)
    with pytest.raises(ValueError, match="extractor.weights=.*has sha256"):
        extractors.custom_extractor(replace(chosen, weights=str(weights), sha256="0" * 64))


# ---- what cannot be scored ----


def grey(folder: Path) -> Path:
    return as_folder(colours(5, 0)[..., 0], folder)


def several_sizes(folder: Path) -> Path:
    as_folder(colours(5, 0), folder)
    Image.fromarray(colours(1, 0, 20)[0]).save(folder / "zz.png")
    return folder


def with_nan(path: Path) -> Path:
    images = colours(5, 0).astype(np.float32)
    images[0, 0, 0, 0] = np.nan
    np.savez(path, arr_0=images)
    return path


def damaged(folder: Path) -> Path:
    as_folder(colours(5, 0), folder)
    path = folder / "0003.png"
    path.write_bytes(path.read_bytes()[:60])
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def of_objects(path: Path) -> Path:
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))
    return path


WRONG = {
    "another size": (
        lambda f: as_folder(colours(5, 0, 20), f),
        "The images have 20x20 pixels, the reference has 16x16",
    ),
    "grey for colours": (grey, "holds grey images"),
    "several sizes": (several_sizes, "several sizes: zz.png has 20x20"),
    "NaN": (lambda f: with_nan(f.with_suffix(".npz")), "float32"),
    "an empty folder": (empty, "no image"),
    "one image": (lambda f: as_folder(colours(1, 0), f), "fid needs at least 2 images, here are 1"),
    "pickles": (lambda f: of_objects(f.with_suffix(".npz")), "Python objects"),
    "a damaged picture": (damaged, "0003.png cannot be used"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_scored_is_refused_by_name(case, call, tmp_path):
    make, words = WRONG[case]
    np.savez(tmp_path / "real.npz", arr_0=colours(20, 1))
    path = make(tmp_path / "given")
    status, output = call("evaluate", f"images={path}", "reference=real.npz", *OWN, "metrics=[fid]", "out=r.jsonl")
    assert status == 2 and words in output, output
    assert len(output.strip().splitlines()) <= 2 and not (tmp_path / "r.jsonl").exists()
