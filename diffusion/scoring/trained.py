"""A model out of a checkpoint: its denoiser, and what its checkpoint says of its run."""

from pathlib import Path
from typing import Any, NamedTuple

from diffusion.denoiser import NetworkDenoiser
from diffusion.files import sha256_of
from diffusion.runs.folder import digest_beside
from diffusion.runs.recorded import Facts, Recorded


class Trained(NamedTuple):
    """A model out of a checkpoint: its denoiser with the chosen weights, and what the checkpoint says of its run.

    Args:
        weights: "ema", "raw", or which further average. trust: modules outside this package that it may name.
    """

    record: Recorded
    denoiser: NetworkDenoiser
    step: int
    path: Path
    weights: str
    trust: tuple[str, ...] = ()

    @property
    def facts(self) -> Facts:
        """What the checkpoint says of its run."""
        return Facts.of(self.record)

    @property
    def digest(self) -> str:
        """sha256 of the checkpoint's file."""
        return digest_beside(self.path) or sha256_of(self.path)

    def identity(self) -> dict[str, Any]:
        """Which model this is, as JSON."""
        return {"checkpoint_sha256": self.digest, "weights": self.weights}

    def about(self) -> dict[str, Any]:
        """What results.jsonl says of it."""
        parameters = sum(p.numel() for p in self.denoiser.network.parameters())
        known = {"step": self.step, "weights": self.weights, "checkpoint_sha256": self.digest}
        return known | {"parameters": parameters}

    @property
    def run_folder(self) -> Path | None:
        """The folder of its run; None for a file that lies elsewhere."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else None

    @property
    def name(self) -> str:
        """What its run is called."""
        return self.facts.name or self.path.stem

    @property
    def data_name(self) -> str:
        """What its data set is called."""
        return self.facts.data_name or "its data set"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        net = self.denoiser.network
        return net.channels, net.image_size, net.image_size

    @property
    def num_classes(self) -> int:
        """Classes; 0 for an unconditional model."""
        return self.denoiser.network.num_classes

    @property
    def learns_variance(self) -> bool:
        """Whether the network says how wide a reverse step is."""
        return self.denoiser.network.out_channels == 2 * self.denoiser.network.channels
