"""What images are scored against: an extractor, metrics and a set of real images; and where the results go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion.data.image_files import ImageFiles
from diffusion.data.module import ImageShardsDataModule
from diffusion.distributed.ranks import Ranks
from diffusion.metrics.extractors import Extractor, Features
from diffusion.metrics.metric import Metric
from diffusion.metrics.reference import Reference
from diffusion.scoring.scores import ImageSet, save_neighbours, score

Given = ImageShardsDataModule | ImageFiles


def image_set(given: Given) -> ImageSet:
    return given.samples if isinstance(given, ImageShardsDataModule) else given


def labelled(given: Given) -> bool:
    return given.labelled if isinstance(given, ImageFiles) else bool(given.num_classes)


def image_size(given: Given) -> tuple[int, int]:
    """(height, width)."""
    return given.image_size if isinstance(given, ImageFiles) else (given.image_size, given.image_size)


@dataclass(frozen=True)
class Output:
    """Where results go.

    Args:
        key: the setting that names the folder, "out" or "checkpoint". folder: what is written lies below it.
        pieces: the folder of unfinished work. neighbours: of the picture of the nearest real images, None: nowhere.
        run: the run folder whose results.jsonl gets the rows; None: they go to `file`.
    """

    key: str
    folder: Path
    pieces: Path
    neighbours: Path | None = None
    run: Path | None = None
    file: Path | None = None


@dataclass(frozen=True)
class Against:
    """What scores are against.

    Args:
        real: the real images. named: what the user calls them. split: of them.
        reference: (extractor, ranks) -> what they are held against, on rank 0.
        per_class: whether each class is scored as well. neighbours: images that are shown beside real ones.
    """

    extractor: Extractor
    metrics: Mapping[str, Metric]
    real: Given
    reference: Callable[[Extractor, Ranks], Reference | None]
    named: str
    split: str
    per_class: bool = False
    neighbours: int = 0

    def rows(
        self,
        reference: Reference,
        features: Features,
        labels: Tensor | None,
        images: Tensor | None,
        about: Mapping[str, Any],
        paper: Mapping[str, float | None],
        picture: Path | None,
        ranks: Ranks,
    ) -> list[dict[str, Any]]:
        """Lines of results.jsonl, and a picture of the real images nearest to `images`, if there are any."""
        if isinstance(self.real, ImageFiles) and self.real.lossy:
            about = {**about, "reference_format": "jpeg"}
        given = labels if self.per_class else None
        rows = score(features, self.extractor, reference, self.metrics, about, paper, given, ranks.working)
        if images is not None and picture is not None:
            save_neighbours(picture, images, features.pooled[: len(images)], reference, image_set(self.real))
            print(f"Nearest real images: {picture}")
            rows = [{**row, "neighbours": picture.name} for row in rows]
        return rows
