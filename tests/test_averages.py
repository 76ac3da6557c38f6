"""Several averages in one run: each is that of a run with it alone, to the bit, and is sampled by its decay."""

import numpy as np
import pytest
import torch
from conftest import inside

WORDS = ["trainer=cpu", "callbacks=none", "data.batch_size=8", "model.blocks_per_level=1", "save.every_steps=2"]


def last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """`several`, stopped and gone on with; `alone_0.5` and `alone_0.9`, in one go."""
    folder, words = tmp_path_factory.mktemp("averages"), [*WORDS, f"data.root={digits}"]
    for steps in (3, 5):
        several = [
            "ema.decay=0.998",
            "ema.warmup=false",
            "ema.decays=[0.5,0.9]",
            f"trainer.max_steps={steps}",
            "run_dir=several",
        ]
        assert inside("train", [*words, *several], folder) == 0
    for decay in (0.5, 0.9):
        alone = [f"ema.decay={decay}", "ema.warmup=false", "trainer.max_steps=5", f"run_dir=alone_{decay}"]
        assert inside("train", [*words, *alone], folder) == 0
    return folder


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_each_average_is_that_of_a_run_with_it_alone(runs, decay):
    several, alone = last(runs / "several"), last(runs / f"alone_{decay}")
    assert set(several["emas"]) == {"0.5", "0.9"} and "emas" not in alone
    found, wanted = several["emas"][str(decay)], alone["ema"]
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert not torch.equal(found["head.weight"], several["ema"]["head.weight"])


def test_an_average_is_sampled_by_its_decay(runs, capfd, monkeypatch):
    images, words = {}, ["num_images=4", "sampler.num_steps=2"]
    for out, checkpoint, ema in (("a", "several", "0.5"), ("b", "alone_0.5", "true"), ("c", "several", "true")):
        assert inside("sample", [*words, f"checkpoint={checkpoint}", f"ema={ema}", f"out={out}"], runs) == 0
        images[out] = np.load(runs / out / "samples.npz")["arr_0"]
    assert (images["a"] == images["b"]).all()
    assert "ema 0.5 weights" in capfd.readouterr().out
    assert inside("sample", [*words, "checkpoint=several", "ema=0.7", "out=d"], runs) == 2
    assert "has no average of this decay. It has: true, false, 0.5, 0.9." in capfd.readouterr().err
    assert inside("sample", [*words, "checkpoint=several", "ema=1.5", "out=d"], runs) == 2
    assert "ema=1.5 is outside [0, 1)" in capfd.readouterr().err


def test_the_sampled_decay_is_not_given_twice(runs, capfd):
    assert inside("train", [*WORDS, "ema.decay=0.9", "ema.decays=[0.9]", "run_dir=x"], runs) == 2
    assert "has ema.decay=0.9, which is averaged anyway" in capfd.readouterr().err
