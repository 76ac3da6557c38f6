"""Time grids: which times a walk visits, as descending lists that end at 0, clean data.

    times(schedule, num_steps, spacing)      the grid of a sampling
    steps_of(times)                          its num_steps
    even, geometric, refined                 grids between two times, for experiments

Times are real numbers in (0, T]; the noise levels of the papers are the integers. No entry repeats; with `visits` each
level stands there so often in a row: between equal times Langevin dynamics and correctors take their steps. Knows
schedules and no sampler. Imports no torch, so that a configuration can be checked without loading it.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from diffusion.process.schedule import Schedule

Spacing = Literal["linear", "quadratic", "trailing", "lambda", "karras"]
RHO = 7.0  # of Karras' grid: theirs


def linear(num_timesteps: int, num_steps: int) -> list[float]:
    """1 + floor(k T / S), k = S-1..0: DDIM's own grid (Song et al. 2021, app. D.2), "leading" elsewhere.

    Its first time is 1 + T - T/S, not T; S = T gives T..1. The only level of S = 1 is T, where that formula gives 1, at
    which next to nothing of an image would be made: one step from pure noise.
    """
    if num_steps == 1:
        return [num_timesteps]
    return [1 + k * num_timesteps // num_steps for k in reversed(range(num_steps))]


def quadratic(num_timesteps: int, num_steps: int) -> list[float]:
    """1 + floor(u_k^2), u from 0 to sqrt(0.8 T): dense near the data (Song et al. 2021, app. D.2, CIFAR-10).

    As in the code of that paper, where the low end repeats levels from S = 20 or so. Here a level is visited once, so
    that there are fewer than S. The only level of S = 1 is the highest, where that code has the lowest, t = 1: one step
    from noise.
    """
    if num_steps == 1:
        return [1 + int(num_timesteps * 0.8)]
    levels = np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2
    return sorted({1 + int(level) for level in levels}, reverse=True)


def trailing(num_timesteps: int, num_steps: int) -> list[float]:
    """T - k T / S, k = 0..S-1, to the nearest level (Lin et al. 2024, table 2): starts at T itself."""
    return [round(num_timesteps * (num_steps - k) / num_steps) for k in range(num_steps)]


def uniform_in_lambda(schedule: "Schedule", num_steps: int) -> list[float]:
    """From T to 1, evenly apart in lambda = log(alpha / sigma) (Lu et al. 2022, DPM-Solver, sec. 3.4)."""
    top = float(schedule.num_timesteps)
    return [top] if num_steps == 1 else geometric(schedule, top, 1.0, num_steps - 1)


def karras(schedule: "Schedule", num_steps: int, rho: float = RHO) -> list[float]:
    """From T to 1, evenly apart in r^(1 / rho), r = sigma / alpha (Karras et al. 2022, eq. 5, whose sigma is our r).
    The larger rho, the shorter the steps near the data; rho = 1 is evenly in r."""
    top = float(schedule.num_timesteps)
    if num_steps == 1:
        return [top]
    high, low = (math.exp(-float(schedule.log_ratio(t))) ** (1 / rho) for t in (top, 1.0))
    inner = np.linspace(high, low, num_steps)[1:-1] ** rho
    return [top, *(schedule.time_of(-math.log(r)) for r in inner), 1.0]


OF_LEVELS: dict[str, Callable[[int, int], list[float]]] = {
    "linear": linear, "quadratic": quadratic, "trailing": trailing,
}  # fmt: skip
SPACINGS = (*OF_LEVELS, "lambda", "karras")


def check_grid(
    num_timesteps: int, num_steps: int | None = None, spacing: str | Sequence[float] = "linear", visits: int = 1
) -> None:
    """Refuse a grid that cannot be, by the number of levels alone.

    Raises:
        ValueError: sampler.num_steps, sampler.spacing or sampler.visits is not possible.
    """
    if not isinstance(visits, int) or isinstance(visits, bool) or visits < 1:
        raise ValueError(f"sampler.visits={visits} must be an integer, at least 1.")
    if not isinstance(spacing, str):
        listed = list(spacing)
        falling = all(t > s for t, s in zip(listed, listed[1:], strict=False))
        if not listed or not falling or listed[0] > num_timesteps or listed[-1] < 0 or listed[0] <= 0:
            text = str(listed).replace(" ", "")
            raise ValueError(
                f"sampler.spacing={text} must be falling times from schedule.num_timesteps={num_timesteps} or less to "
                f"0 or more."
            )
        return
    if spacing not in SPACINGS:
        raise ValueError(f"sampler.spacing={spacing} must be one of {', '.join(SPACINGS)}.")
    whole = isinstance(num_steps, int) and not isinstance(num_steps, bool) and 1 <= num_steps <= num_timesteps
    if num_steps is not None and not whole:
        raise ValueError(
            f"sampler.num_steps={num_steps} must be an integer from 1 to schedule.num_timesteps={num_timesteps}."
        )


def times(
    schedule: "Schedule | int",
    num_steps: int | None = None,
    spacing: str | Sequence[float] = "linear",
    visits: int = 1,
    rho: float = RHO,
) -> list[float]:
    """Times of a sampling run: strictly falling where visits is 1, the last 0.

    Args:
        schedule: or T alone, which the grids of levels need no more than.
        num_steps: levels that are visited, 1..T; None: all of them, T..1, whatever the spacing. Quadratic spacing
            visits fewer.
        spacing: one of SPACINGS, or the times themselves, falling; 0 is added at their end.
        visits: how often each of them is: steps that leave from it, all but the last of which stay.
        rho: of the spacing "karras", above 0.

    Raises:
        ValueError: as `check_grid`.
    """
    top = schedule if isinstance(schedule, int) else schedule.num_timesteps
    check_grid(top, num_steps, spacing, visits)
    if not isinstance(spacing, str):
        levels = [t for t in spacing if t > 0]
    elif num_steps is None:
        levels = list(range(top, 0, -1))
    elif spacing in OF_LEVELS:
        levels = OF_LEVELS[spacing](top, num_steps)
    elif spacing == "lambda":
        levels = uniform_in_lambda(schedule, num_steps)
    else:
        levels = karras(schedule, num_steps, rho)
    return [level for level in levels for _ in range(visits)] + [0]


def steps_of(times: Sequence[float]) -> int:
    """Steps of a walk that do not stay: the `num_steps` that gives such a grid, whatever the visits of a level."""
    return sum(t != s for t, s in pairwise(times))


# ---- between two times ----


def even(start: float, stop: float, num_steps: int) -> list[float]:
    """num_steps + 1 times, evenly apart in t, both ends included."""
    return np.linspace(start, stop, num_steps + 1).tolist()


def geometric(schedule: "Schedule", start: float, stop: float, num_steps: int) -> list[float]:
    """num_steps + 1 times, evenly apart in lambda: sigma / alpha falls by the same factor at each step. stop > 0.

    On any schedule these are the levels of NCSN's geometric ladder, seen through the change of variables.
    """
    ends = [float(schedule.log_ratio(t)) for t in (start, stop)]
    inner = np.linspace(*ends, num_steps + 1)[1:-1]
    return [float(start), *(schedule.time_of(float(value)) for value in inner), float(stop)]


def refined(times: list[float], parts: int) -> list[float]:
    """Each step of the grid in so many, evenly apart in t: every time of the grid is a time of the finer one."""
    inner = [np.linspace(t, s, parts + 1)[:-1].tolist() for t, s in zip(times, times[1:], strict=False)]
    return [t for step in inner for t in step] + [float(times[-1])]
