"""The sizes, in pixels, that occur in a network which halves its images; without torch, to be looked at early."""

import math
from collections.abc import Sequence


def resolutions(image_size: int, levels: int) -> list[int]:
    """Sizes at the levels of a network, finest first: image_size / 2 ** k, as many as can be halved to."""
    return [image_size >> k for k in range(levels) if image_size % 2**k == 0]


def check_attention(image_size: int, levels: int, attention_resolutions: Sequence[int]) -> None:
    """Raise ValueError where attention is asked for at a size that does not occur, or twice at the same."""
    there = resolutions(image_size, levels)
    given = f"model.attention_resolutions={str(list(attention_resolutions)).replace(' ', '')}"
    for size in attention_resolutions:
        if size not in there:
            raise ValueError(
                f"{given}: {size} is not a resolution of this network. model.image_size={image_size} and {levels} "
                f"levels (model.multipliers) have {', '.join(map(str, there))}; [] attends at the lowest one alone."
            )
    if len(set(attention_resolutions)) < len(attention_resolutions):
        raise ValueError(f"{given}: a resolution is there more than once. Give it once.")


def nearest_resolutions(image_size: int, levels: int, wanted: Sequence[int]) -> list[int]:
    """For each wanted size the nearest one that occurs, by their ratio; finest first, none twice."""
    there = resolutions(image_size, levels)
    return sorted({min(there, key=lambda size: abs(math.log(size / target))) for target in wanted}, reverse=True)
