"""Real times between two ends, falling from start to stop: even in t, or in lambda. Knows schedules and no sampler.

A sampler may visit any real time in (0, T]; `process.times` has the grids of the papers, which are integers.
"""

import numpy as np

from diffusion.process.schedule import Schedule


def even(start: float, stop: float, num_steps: int) -> list[float]:
    """num_steps + 1 times, evenly apart in t, both ends included."""
    return np.linspace(start, stop, num_steps + 1).tolist()


def geometric(schedule: Schedule, start: float, stop: float, num_steps: int) -> list[float]:
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
