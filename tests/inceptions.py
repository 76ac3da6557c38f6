"""Inception's file of weights as torch-fidelity reads it, filled with random ones; and a small network that scores."""

from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

OWN = ["extractor=custom", "extractor.name=own", "extractor.target=inceptions.small"]  # words of a command


def write_random_inception(path: Path, seed: int = 0) -> Path:
    """Random weights under the names of the real ones, of a spread that lets images differ in their features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    with mock.patch("torch.load", return_value={}), mock.patch.object(Inception, "load_state_dict"):
        network = Inception("inception", ["2048"], "not read")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, old in network.state_dict().items():
        if name.endswith("conv.weight"):
            fan_in = old[0].numel()
            state[name] = torch.randn(old.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith("fc.weight"):
            state[name] = torch.randn(old.shape, generator=generator) * 0.1
        else:
            state[name] = old  # norms as they begin: mean 0, variance 1
    torch.save(state, path)
    return path


class Small(nn.Module):
    """uint8 (B, 3, H, W) -> (features (B, 12), logits (B, 5)): two convolutions and a mean."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(3, 24, 3, 2), nn.Conv2d(24, 12, 3, 2)
            self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 255
        features = self.second(self.first(x).relu()).relu().mean((2, 3))
        return features, 30 * self.head(features)


def small() -> nn.Module:
    """What a user's function gives who has an extractor of his own."""
    return Small()
