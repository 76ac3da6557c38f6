"""Points that are drawn for training: their law, their order, and that nothing is on disk."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion.data.mixture import MixtureDataModule
from diffusion.images import from_uint8
from diffusion.process.toy import SETS


def batches(module, steps, start=0):
    module.trainer = SimpleNamespace(
        global_rank=0, world_size=1, accumulate_grad_batches=1, global_step=start, num_nodes=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(steps)]


@pytest.mark.parametrize("toy", SETS)
def test_points_are_the_mixture_rounded_to_levels(toy):
    module = MixtureDataModule(toy, 20_000, batch_size=500)
    drawn = torch.cat([batch["image"] for batch in batches(module, 40)])
    assert drawn.shape == (20_000, 2, 1, 1) and drawn.dtype == torch.uint8
    x, exact = from_uint8(drawn)[:, :, 0, 0].double(), SETS[toy]().sample(20_000, torch.Generator().manual_seed(7))
    torch.testing.assert_close(x.T.cov(), exact.T.cov(), rtol=0, atol=0.006)
    torch.testing.assert_close(x.mean(0), exact.mean(0), rtol=0, atol=0.015)
    assert sorted(map(tuple, drawn[:, :, 0, 0].tolist())) == sorted(map(tuple, module.points[:, :, 0, 0].tolist()))


def test_the_order_is_a_function_of_seed_and_place():
    one, again, other = (batches(MixtureDataModule("modes", 5000, 64, seed=seed), 4) for seed in (0, 0, 1))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["image"], other[0]["image"]) and "label" not in one[0]
    later = batches(MixtureDataModule("modes", 5000, 64), 2, start=2)
    assert torch.equal(later[0]["image"], one[2]["image"]) and torch.equal(later[1]["position"], one[3]["position"])


def test_what_a_run_records_of_its_data_is_there():
    module = MixtureDataModule("rings", 10_000, 64)
    assert (module.num_images, module.image_size, module.channels, module.num_classes) == (10_000, 1, 2, 0)
    assert module.lanes == 2 and np.array_equal(module.samples.counts, [4096, 4096, 1808])
    same = MixtureDataModule("rings", 10_000, 128, seed=5, digest=module.index.digest)
    assert same.index.digest == module.index.digest
    with pytest.raises(ValueError, match="holds another data set"):
        _ = MixtureDataModule("rings", 10_001, 64, digest=module.index.digest).index


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"toy": "ring"}, "data.toy=ring must be one of modes, rings"),
        ({"num_points": 0}, "data.num_points=0"),
        ({"flip": True}, "data.flip=true"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MixtureDataModule(**({"toy": "modes", "num_points": 100, "batch_size": 10} | settings))
