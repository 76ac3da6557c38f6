"""Which times a sampler visits: a descending list that starts at a noise level of the papers and ends at 0, clean data.

A grid of `num_steps` transitions has num_steps + 1 entries, whatever num_steps in 1..T; no entry repeats. Knows numbers
only: no schedule, no sampler, and no torch, so that a configuration can be checked without loading it.
"""

import math


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


SPACINGS = {"linear": linear, "quadratic": quadratic, "trailing": trailing}


def times(num_timesteps: int, num_steps: int, spacing: str = "linear") -> list[int]:
    """Times of a sampling run of `num_steps` transitions: strictly descending, num_steps + 1 of them, the last 0.

    Args:
        num_timesteps: T of the schedule.
        num_steps: transitions, 1..T.
        spacing: "linear", "quadratic" or "trailing".

    Raises:
        ValueError: sampler.num_steps or sampler.spacing is not possible.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"sampler.spacing={spacing} is none of {', '.join(SPACINGS)}.")
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"sampler.num_steps={num_steps} must be an integer from 1 to schedule.num_timesteps={num_timesteps}."
        )
    return SPACINGS[spacing](num_timesteps, num_steps)
