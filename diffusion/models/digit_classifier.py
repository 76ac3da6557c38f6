"""A small classifier of 8x8 digits. It takes the place of Inception for the embedded digits.

Its features and class probabilities give digits-FID and digits-IS. These names say that the values are comparable only
with each other. This module knows images and labels; the caller decides when the classifier is trained.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.images import from_uint8
from diffusion.noise import Stream, permutation, seed63

FEATURES, CLASSES = 64, 10


class DigitClassifier(nn.Module):
    """Convolutional classifier: uint8 (B, 1, 8, 8) -> features (B, 64), logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.dense, self.head = nn.Linear(64 * 4 * 4, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.conv_1(from_uint8(images)))
        h = F.max_pool2d(F.relu(self.conv_2(h)), 2)
        features = F.relu(self.dense(h.flatten(1)))
        return features, self.head(features)


def train_digit_classifier(images: Tensor, labels: Tensor, epochs: int = 20, seed: int = 0) -> DigitClassifier:
    """Train the classifier with Adam on the cross-entropy. Takes about three seconds.

    It runs on one thread with a fixed seed, so that every call returns the same weights. The number of threads and the
    state of torch's random generator are restored afterwards.

    Args:
        images: uint8 (N, 1, 8, 8). labels: int64 (N,), 0 ... 9.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(seed63(seed, Stream.INIT))
        model = DigitClassifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for epoch in range(epochs):
            order = torch.from_numpy(permutation(len(images), seed, Stream.SHARDS, epoch))
            for batch in order.split(64):
                _, logits = model(images[batch])
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.eval()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
