"""Images of files scored against real ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion.distributed.place import Place
from diffusion.distributed.ranks import Ranks
from diffusion.files import Room
from diffusion.scoring.against import Against, Given, Output, image_set
from diffusion.scoring.scores import features_of


@dataclass(frozen=True)
class Comparison:
    """A set of images, and what it is scored against.

    Args:
        images: the set. named: what the user calls it.
    """

    images: Given
    named: str
    against: Against
    output: Output

    def introduction(self) -> str:
        """What is about to be done, in a line."""
        return f"Scoring {self.named} against {self.against.named} with extractor={self.against.extractor.name}"

    def rooms(self) -> list[Room]:
        """The folders that are written to, and what they need."""
        return [Room(self.output.key, self.output.folder)]

    def rows(self, ranks: Ranks, where: Place) -> list[dict[str, Any]]:
        """Score by all ranks; the rows on rank 0, none on others."""
        against = self.against
        against.extractor.network.to(where.device)
        reference = against.reference(against.extractor, ranks)
        found = features_of(image_set(self.images), against.extractor, ranks)
        if found is None or reference is None:
            return []
        about = {"images": self.named, "data": against.named, "split": against.split}
        shown = np.arange(min(against.neighbours, len(found[0].pooled)))
        images = image_set(self.images).batch(shown)[0] if len(shown) else None
        return against.rows(reference, *found, images, about, {}, self.output.neighbours, ranks)
