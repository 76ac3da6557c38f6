"""The library in a notebook that is executed."""

import nbformat
import numpy as np
import pytest
from conftest import ROOT, inside
from nbclient import NotebookClient
from PIL import Image

CELLS = [
    f"import sys; sys.path.insert(0, {str(ROOT)!r})",
    'import diffusion\nmodel = diffusion.load("run", device="cpu")\n'
    "images = model.sample(4, num_steps=2, labels=[3, 7])",
    'images.pil()[0].save("first.png")\nimages.shape, images.labels.tolist()',
    'try:\n    model.sample(2, num_step=3)\nexcept ValueError as error:\n    print(error)',
]  # fmt: skip


@pytest.mark.slow
def test_three_lines_in_a_notebook_give_the_images_of_the_command(digits, tmp_path):
    words = ["trainer=cpu", "trainer.max_steps=2", "callbacks=none", "data.batch_size=8", "model.blocks_per_level=1"]
    assert inside("train", [*words, f"data.root={digits}", "run_dir=run"], tmp_path) == 0
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    done = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert done.cells[1]["outputs"] == []  # nothing is printed
    assert done.cells[2]["outputs"][0]["data"]["text/plain"] == "((4, 8, 8, 1), [3, 7, 3, 7])"
    assert "Did you mean sampler.num_steps?" in done.cells[3]["outputs"][0]["text"]
    words = [
        "checkpoint=run",
        "out=out",
        "num_images=4",
        "sampler.num_steps=2",
        "labels=[3,7]",
        "trainer=cpu",
        "png=true",
    ]
    assert inside("sample", words, tmp_path) == 0

    first, ours = (np.asarray(Image.open(tmp_path / name)) for name in ("first.png", "out/png/000000.png"))
    assert np.array_equal(first, ours[..., 0] if ours.ndim == 3 else ours)
