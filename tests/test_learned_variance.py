"""The rows of table 2 of Ho et al. 2020 as configurations, and networks that say how wide the reverse step is."""

import numpy as np
import pytest
import torch
from conftest import inside
from test_experiments import composed

from diffusion.build import door
from diffusion.build import parts as build
from diffusion.process.kernels import reverse_std

SMALL = ["callbacks=none", "trainer.max_steps=20", "data.batch_size=16", "model.blocks_per_level=1", "log_every=20"]
SMALL += ["save.every_steps=0", "ema.warmup=true", "trainer=cpu"]
ROWS = {  # words, channels of the output, what the paper says of it
    "epsilon, L, fixed": (["objective=bound"], 1, None),
    "epsilon, L, fixed large": (["objective=bound", "objective.variance=large"], 1, None),
    "epsilon, L, learned": (["objective=bound", "objective.variance=learned"], 2, "unstable"),
    "epsilon, L_simple": (["objective=epsilon"], 1, None),
    "mu, L, fixed": (["objective=bound", "objective.prediction=mu"], 1, None),
    "mu, L, learned": (["objective=bound", "objective.prediction=mu", "objective.variance=learned"], 2, None),
    "mu, unweighted": (["objective=mu"], 1, "unstable"),
    "hybrid, Nichol & Dhariwal 2021": (["objective=hybrid"], 2, None),
}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, digits):
    """A run of two steps with a learned variance."""
    folder = tmp_path_factory.mktemp("hybrid")
    words = [*SMALL, f"data.root={digits}", "run_dir=run", "objective=hybrid", "trainer.max_steps=2"]
    assert inside("train", words, folder) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("words, channels, said", ROWS.values(), ids=ROWS)
def test_a_row_of_table_2_trains_on_digits(words, channels, said, digits, call, recwarn, tmp_path):
    """The two that the paper calls unstable do so under a warning that says it."""
    status, output = call("train", *SMALL, f"data.root={digits}", "run_dir=run", "objective.label_dropout=0.2", *words)
    assert status == 0, output
    warned = [str(w.message) for w in recwarn if "Ho et al. 2020" in str(w.message)]
    assert len(warned) == (said is not None) and all(said in w for w in warned)
    header, row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    loss = float(dict(zip(header.split(","), row.split(","), strict=True))["train/loss"])
    assert np.isfinite(loss)
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"]["network.head.weight"].shape[0] == channels
    assert all(v.isfinite().all() for v in content["state_dict"].values())
    assert any(not torch.equal(v, content["state_dict"][f"network.{k}"]) for k, v in content["ema"].items())


def test_a_checkpoint_with_a_learned_variance_is_built_again_and_sampled_from(hybrid, call, tmp_path):
    model = door.trained(str(hybrid))
    x = torch.randn(2, *model.image_shape)
    prediction = model.denoiser(x, 500, torch.tensor([3, 4]))
    assert prediction.variance.shape == prediction.x0.shape == x.shape
    images = {}
    for variance in ("learned", "small"):
        words = [f"sampler=ancestral_{variance}" if variance == "learned" else "sampler=ancestral"]
        words += ["sampler.num_steps=4", "num_images=4", f"out={variance}", f"checkpoint={hybrid}", "trainer=inference"]
        status, output = call("sample", *words)
        assert status == 0, output
        images[variance] = np.load(tmp_path / variance / "samples.npz")["arr_0"]
    assert images["learned"].shape == images["small"].shape == (4, 8, 8, 1)
    assert (images["learned"] != images["small"]).any()


def test_an_untrained_network_starts_half_way_between_the_two_variances(hybrid):
    """Its last layer is nearly 0, hence v = 1/2: the geometric mean of beta tilde and beta."""
    cfg = composed("+experiment=digits", "objective=hybrid")
    schedule = build.schedule(cfg)
    network = build.network(cfg).eval()
    share = (network(torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]))[:, 1:] + 1) / 2
    std = reverse_std(schedule, torch.tensor([11, 501]), torch.tensor([10, 500]), "learned", share)
    ends = [reverse_std(schedule, torch.tensor([11, 501]), torch.tensor([10, 500]), v) for v in ("small", "large")]
    middle = (ends[0] * ends[1]).sqrt().float()
    torch.testing.assert_close(std.mean((1, 2, 3)), middle, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "words, mentions",
    [
        (["sampler=ancestral_learned"], ["sampler.variance=learned", "objective=hybrid"]),
        (
            ["sampler=predictor_corrector", "sampler.predictor.variance=learned"],
            ["sampler.predictor.variance=learned", "objective=hybrid"],
        ),
        (["objective=hybrid", "objective.variance=small"], ["objective.variance=small", "objective=epsilon"]),
        (["objective=bound", "objective.variance=learnt"], ["objective.variance=learnt", "small, large, learned"]),
        (["objective=hybrid", "objective.vlb_weight=0"], ["objective.vlb_weight=0", "above 0"]),
        (["objective=hybrid", "+model.out_channels=1"], ["model.out_channels=1", "objective.variance=learned"]),
        (["objective=epsilon", "+objective.variance=learned"], ["objective.variance", "Simple"]),
    ],
)
def test_what_does_not_go_together_is_refused(words, mentions, call, digits, tmp_path):
    status, output = call("train", *SMALL, f"data.root={digits}", "objective.label_dropout=0.2", "run_dir=run", *words)
    assert status == 2 and all(m in output for m in mentions), output
    assert not (tmp_path / "run").exists()


def test_sampling_with_a_variance_that_nobody_learned_is_refused(call, digits, tmp_path):
    words = [*SMALL, f"data.root={digits}", "trainer.max_steps=1", "run_dir=run"]
    assert call("train", *words)[0] == 0
    status, output = call("sample", "checkpoint=run", "out=s", "sampler=ancestral_learned", "num_images=2")
    assert status == 2 and "sampler.variance=learned" in output and not (tmp_path / "s").exists()
