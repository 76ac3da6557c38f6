"""A user's own network is trained with the embeddings of the package; an object that is not a network is refused."""

import textwrap

import pytest
import torch

from diffusion.models.embedding import LabelEmbedding, time_embedding_of
from diffusion.models.mlp import MLP
from diffusion.models.network import REQUIRED, lacking
from diffusion.models.unet import UNet

MINE = """
    import torch
    from torch import nn

    from diffusion.models.embedding import LabelEmbedding, time_embedding_of
    from diffusion.models.network import Network


    class Convs(Network):
        def __init__(self, image_size: int, channels: int = 3, width: int = 32, num_classes: int = 0,
                     out_channels: int | None = None) -> None:
            super().__init__(image_size, channels, num_classes, out_channels)
            self.time = time_embedding_of("positional", width, 16.0)
            self.label = LabelEmbedding(num_classes, 4 * width) if num_classes else None
            self.stem, self.project = nn.Conv2d(channels, width, 3, padding=1), nn.Linear(4 * width, width)
            self.head = nn.Conv2d(width, self.out_channels, 3, padding=1)

        def forward(self, x, conditioning_value, labels=None):
            embedding = self.time(conditioning_value)
            if self.label is not None:
                embedding = embedding + self.label(labels, len(x))
            h = torch.relu(self.stem(x) + self.project(embedding)[:, :, None, None])
            return self.head(h)


    class Plain(nn.Module):
        def __init__(self, image_size: int, channels: int = 3, num_classes: int = 0, out_channels: int | None = None):
            super().__init__()
            self.image_size, self.channels, self.out_channels = image_size, channels, out_channels


    def nothing(image_size: int, channels: int = 3, num_classes: int = 0, out_channels: int | None = None):
        return image_size
"""
WORDS = ["trainer=cpu", "callbacks=none", "trainer.max_steps=2", "run_dir=run"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The words that choose a network of `mynets.py`, which has no use for the other settings of the option `mlp`."""
    (tmp_path / "mynets.py").write_text(textwrap.dedent(MINE))
    monkeypatch.syspath_prepend(str(tmp_path))
    without = [f"~model.{name}" for name in ("blocks", "time_embedding", "fourier_scale")]
    return lambda name: ["model=mlp", f"model._target_=mynets.{name}", "model.num_classes=10", *without]


def test_a_network_of_ones_own_is_trained_from_a_file_and_a_yaml(mine, digits, call, tmp_path):
    status, output = call("train", *WORDS, *mine("Convs"), "model.width=32", f"data.root={digits}")
    assert status == 0, output
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["network.label.weight"].shape == (11, 128) and "network.time.dense_1.weight" in state


@pytest.mark.parametrize(
    "name, complaint", [("Plain", "no num_classes, no null_label"), ("nothing", "no forward, no image_size")]
)
def test_what_is_no_network_is_refused_with_what_it_lacks(mine, digits, call, name, complaint, tmp_path):
    status, output = call("train", *WORDS, *mine(name), "~model.width", f"data.root={digits}")
    assert status == 2 and f"model._target_=mynets.{name} is not a network" in output and complaint in output
    assert "diffusion/models/network.py" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("network", [UNet(8, 1, num_classes=10, width=32), MLP(2), MLP(1, 8, num_classes=3)])
def test_the_packages_own_offer_all_of_it(network):
    assert lacking(network) == [] and set(REQUIRED) == {name for name in REQUIRED if hasattr(network, name)}
    assert network.null_label == (network.num_classes or None)
    x = torch.randn(2, network.channels, network.image_size, network.image_size)
    assert network(x, torch.tensor([0.0, 5.0]), None).shape == x.shape


def test_embeddings_are_rows_of_four_widths_and_no_class_is_the_last_label():
    for kind in ("positional", "fourier"):
        assert time_embedding_of(kind, 16, 16.0)(torch.tensor([0.0, 1.5, 999.0])).shape == (3, 64)
    label = LabelEmbedding(5, 8)
    assert torch.equal(label(None, 3), label.weight[[5, 5, 5]])
    assert torch.equal(label(torch.tensor([0, 4, 5]), 3), label.weight[[0, 4, 5]])
