"""The images that an extractor takes, known before it is built: needs no torch."""

from typing import NamedTuple


class Takes(NamedTuple):
    """Of an extractor: the channels of its images, and their size in pixels; None: any size."""

    channels: int
    image_size: int | None = None

    def __str__(self) -> str:
        size = f"{self.image_size}x{self.image_size} pixels" if self.image_size else "any size"
        return f"{self.channels}-channel images of {size}"

    def unfit(self, **found: int) -> dict[str, int]:
        """What images would have to have in the place of what they have, as {"channels": 3}; {} if they can be taken.

        Args:
            found: their channels and image_size.
        """
        return {key: wanted for key, wanted in self._asdict().items() if wanted not in (None, found[key])}


INCEPTION, DIGITS = Takes(3), Takes(1, 8)
OWN = {"inception": INCEPTION, "digits": DIGITS}  # the extractors of this package, by their names
