"""Several averages in one run: each is that of a run with it alone, to the bit, and is sampled by its decay."""

import numpy as np
import pytest
import torch
from conftest import inside

from diffusion.build.door import trained, weights_of
from diffusion.build.run import parts_of

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
    assert "has no average of this decay. It has: true, false, 0.998, 0.5, 0.9." in capfd.readouterr().err
    assert inside("sample", [*words, "checkpoint=several", "ema=1.5", "out=d"], runs) == 2
    assert "ema=1.5 is outside [0, 1)" in capfd.readouterr().err


def test_the_average_that_is_sampled_may_be_named_by_its_decay(runs):
    by_decay, plain = trained(runs / "several", 0.998), trained(runs / "several")
    assert by_decay.identity() == plain.identity() and by_decay.weights == "ema"
    weights = [model.denoiser.network.state_dict() for model in (by_decay, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_averages_have_two_names():
    """Former versions named them with six digits."""
    decays = [0.0, 0.5, 0.999, 0.99999, 0.9999999, 0.99999995, 1 - 2**-53]
    named = {weights_of(decay) for decay in decays}
    assert len(named | {weights_of(True), weights_of(False)}) == len(decays) + 2
    assert [weights_of(d) for d in (0.0, 0.5, 0.999, 0.99999)] == ["ema 0", "ema 0.5", "ema 0.999", "ema 0.99999"]
    assert weights_of(0.9999999) == "ema 0.9999999"


def test_the_room_of_a_checkpoint_counts_every_average(digits, tmp_path):
    words = ["+experiment=digits", *WORDS, f"data.root={digits}", f"run_dir={tmp_path / 'x'}"]
    one, three = (parts_of([*words, f"ema.decays={decays}"]) for decays in ("[]", "[0.5,0.9]"))
    parameters = sum(p.numel() for p in one.denoiser.network.parameters())
    assert three.checkpoint_bytes - one.checkpoint_bytes == 2 * 4 * parameters


def test_the_sampled_decay_is_not_given_twice(runs, capfd):
    assert inside("train", [*WORDS, "ema.decay=0.9", "ema.decays=[0.9]", "run_dir=x"], runs) == 2
    assert "contains ema.decay=0.9, which is always averaged" in capfd.readouterr().err
