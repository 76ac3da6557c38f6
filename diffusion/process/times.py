"""Which times a sampler visits: a descending list that starts at a noise level of the papers and ends at 0, clean data.

A grid of `num_steps` levels has num_steps + 1 entries, whatever num_steps in 1..T, and as many transitions; no entry
repeats. With `visits` each level stands there so often in a row: between equal times Langevin dynamics and correctors
take their steps. Knows numbers only: no schedule, no sampler, and no torch, so that a configuration can be checked
without loading it.
"""

import math
from typing import Literal


def linear(num_timesteps: int, num_steps: int) -> list[int]:
    """1 + floor(k T / S), k = S-1..0, then 0: DDIM's own grid (Song et al. 2021, app. D.2), "leading" elsewhere.

    Its first time is 1 + T - T/S, not T; S = T gives T..1.
    """
    return [1 + k * num_timesteps // num_steps for k in reversed(range(num_steps))] + [0]


def quadratic(num_timesteps: int, num_steps: int) -> list[int]:
    """1 + floor(u_k^2), u from 0 to sqrt(0.8 T), then 0: dense near the data (Song et al. 2021, app. D.2, CIFAR-10).

    The low end of that formula repeats levels from S = 20 or so. Counted upwards, a level that is not above the one
    before it becomes the one before it plus 1: S distinct levels remain, none above T, and S = T gives T..1.
    """
    levels: list[int] = []
    for k in range(num_steps):
        u2 = 0.8 * num_timesteps * (k / max(1, num_steps - 1)) ** 2
        levels.append(max(1 + math.floor(u2 + 1e-9), 1 + (levels[-1] if levels else 0)))
    return levels[::-1] + [0]


def trailing(num_timesteps: int, num_steps: int) -> list[int]:
    """T - k T / S, k = 0..S-1, to the nearest level (Lin et al. 2024, table 2), then 0: starts at T itself."""
    return [round(num_timesteps * (num_steps - k) / num_steps) for k in range(num_steps)] + [0]


Spacing = Literal["linear", "quadratic", "trailing"]
SPACINGS = {"linear": linear, "quadratic": quadratic, "trailing": trailing}


def times(num_timesteps: int, num_steps: int, spacing: str = "linear", visits: int = 1) -> list[int]:
    """Times of a sampling run: strictly descending where visits is 1, num_steps + 1 of them, the last 0.

    Args:
        num_timesteps: T of the schedule.
        num_steps: levels that are visited, 1..T.
        spacing: "linear", "quadratic" or "trailing".
        visits: how often each of them is: steps that leave from it, all but the last of which stay.

    Raises:
        ValueError: sampler.num_steps, sampler.spacing or sampler.visits is not possible.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"sampler.spacing={spacing} is none of {', '.join(SPACINGS)}.")
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"sampler.num_steps={num_steps} must be an integer from 1 to schedule.num_timesteps={num_timesteps}."
        )
    if not isinstance(visits, int) or isinstance(visits, bool) or visits < 1:
        raise ValueError(f"sampler.visits={visits} must be an integer, at least 1.")
    levels = SPACINGS[spacing](num_timesteps, num_steps)
    return [level for level in levels[:-1] for _ in range(visits)] + levels[-1:]
