"""The resolutions that occur in a network which halves its images. No torch, so that they can be checked early."""

import math
from collections.abc import Sequence


def resolutions(image_size: int, levels: int) -> list[int]:
    """Sizes in pixels at the levels of a network, finest first: image_size / 2 ** k where that is an integer."""
    return [image_size >> k for k in range(levels) if image_size % 2**k == 0]


def check_attention(image_size: int, levels: int, attention_resolutions: Sequence[int]) -> None:
    """Check the resolutions at which a network attends.

    Raises:
        ValueError: a size does not occur in the network, or is given twice.
    """
    there = resolutions(image_size, levels)
    given = f"model.attention_resolutions={str(list(attention_resolutions)).replace(' ', '')}"
    for size in attention_resolutions:
        if size not in there:
            raise ValueError(
                f"{given}: {size} is not a resolution of this network. With model.image_size={image_size} and "
                f"{levels} {'level' if levels == 1 else 'levels'} (model.multipliers) the resolutions are "
                f"{', '.join(map(str, there))}. [] means attention in the middle block only."
            )
    if len(set(attention_resolutions)) < len(attention_resolutions):
        raise ValueError(f"{given}: a resolution occurs more than once. Give each resolution once.")


def nearest_resolutions(image_size: int, levels: int, wanted: Sequence[int]) -> list[int]:
    """The nearest occurring size for each wanted one, measured by their ratio; finest first, without duplicates."""
    there = resolutions(image_size, levels)
    return sorted({min(there, key=lambda size: abs(math.log(size / target))) for target in wanted}, reverse=True)
