"""The kinds of output of a network, and the conversion of each kind to the pair (x0, epsilon) and back.

    x_t = alpha_t x_0 + sigma_t epsilon

Every kind is linear in (x_t, output). So, with x_t = 0, the same functions convert an error of the output to the errors
of x0 and epsilon. Levels are computed in float64 and rounded to the dtype of x_t. Times lie in (0, T]; at t = 0 there
is no noise and the conversions divide by zero. This module knows no network and no loss.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from diffusion.process.kernels import posterior
from diffusion.process.schedule import Schedule, like

Pair = tuple[Tensor, Tensor]


def split_output(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a network's output, (B, C or 2C, ...) for x_t (B, C, ...), into its prediction and its learned variance.

    The second half of the channels, if there is one, ranges from -1 to 1 in the papers. It is returned as
    `Prediction.variance`, v from 0 to 1 (Nichol & Dhariwal 2021, eq. 15). It is not clipped. None: no second half.
    """
    if output.shape == x_t.shape:
        return output, None
    predicted, variance = output.chunk(2, dim=1)
    assert predicted.shape == variance.shape == x_t.shape, (
        f"output {tuple(output.shape)} has neither the channels of x_t {tuple(x_t.shape)} nor twice as many"
    )
    return predicted, (variance + 1) / 2


class Kind(NamedTuple):
    """The functions of a kind of output. x_t, output, x0 and epsilon are (B, ...); t is a float or (B,).

    to_pair(schedule, x_t, t, output) -> (x0, epsilon)
    from_pair(schedule, x_t, t, x0, epsilon) -> output
    input_std(schedule, t) -> the number by which x_t is divided before it enters the network. None: `schedule.std(t)`.
    """

    to_pair: Callable[[Schedule, Tensor, float | Tensor, Tensor], Pair]
    from_pair: Callable[[Schedule, Tensor, float | Tensor, Tensor, Tensor], Tensor]
    input_std: Callable[[Schedule, float | Tensor], Tensor] | None = None


def epsilon_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, epsilon: Tensor) -> Pair:
    """x0 = (x_t - sigma epsilon) / alpha (Ho et al. 2020, eq. 15)."""
    alpha, sigma = schedule(t)
    return (x_t - like(sigma, x_t) * epsilon) * like(1 / alpha, x_t), epsilon


def epsilon_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    return epsilon


def x0_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor) -> Pair:
    """epsilon = (x_t - alpha x0) / sigma."""
    alpha, sigma = schedule(t)
    return x0, (x_t - like(alpha, x_t) * x0) * like(1 / sigma, x_t)


def x0_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    return x0


def v_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, v: Tensor) -> Pair:
    """v = alpha epsilon - sigma x0 (Salimans & Ho 2022, app. D), solved together with x_t = alpha x0 + sigma epsilon.

    The determinant of the two equations is alpha^2 + sigma^2. Under VP it is 1, and the solution is the rotation of the
    paper. Under VE it is at least 1, so that the inverse is exact under any schedule.
    """
    alpha, sigma = schedule(t)
    norm = alpha**2 + sigma**2
    a, s = like(alpha / norm, x_t), like(sigma / norm, x_t)
    return a * x_t - s * v, s * x_t + a * v


def v_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    alpha, sigma = schedule(t)
    return like(alpha, x_t) * epsilon - like(sigma, x_t) * x0


def score_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, score: Tensor) -> Pair:
    """score = -epsilon / sigma (Song et al. 2021, sec. 3.3): the gradient of log q(x_t | x_0)."""
    return epsilon_to_pair(schedule, x_t, t, -like(schedule(t).sigma, x_t) * score)


def score_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    return -like(1 / schedule(t).sigma, x_t) * epsilon


def scaled_score_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, output: Tensor) -> Pair:
    """score = output / sigma, the output scaling of NCSNv2 and NCSN++ (Song & Ermon 2020, technique 3).

    The output is -epsilon, which is of order 1 at every level.
    """
    return epsilon_to_pair(schedule, x_t, t, -output)


def scaled_score_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    return -epsilon


DATA_STD = 0.5  # standard deviation of images in [-1, 1], as in EDM


def edm_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, output: Tensor) -> Pair:
    """x0 = c_skip x_t / alpha + c_out output (Karras et al. 2022, eq. 7 and table 1).

        c_skip = s^2 / (r^2 + s^2),    c_out = r s / sqrt(r^2 + s^2),    s = DATA_STD

    r = sigma / alpha is the paper's sigma. The input of the network is c_in x_t / alpha, c_in = 1 / sqrt(r^2 + s^2)
    (`edm_input_std`).
    """
    skip, out = _edm(schedule, t)
    return x0_to_pair(schedule, x_t, t, like(skip, x_t) * x_t + like(out, x_t) * output)


def edm_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    skip, out = _edm(schedule, t)
    return (x0 - like(skip, x_t) * x_t) * like(1 / out, x_t)


def edm_input_std(schedule: Schedule, t: float | Tensor) -> Tensor:
    """alpha sqrt(r^2 + s^2): the standard deviation of x_t for data of standard deviation s = DATA_STD."""
    alpha, sigma = schedule(t)
    return (sigma**2 + (alpha * DATA_STD) ** 2).sqrt()


def _edm(schedule: Schedule, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip / alpha, c_out)."""
    alpha, sigma = schedule(t)
    ratio = sigma / alpha
    whole = ratio**2 + DATA_STD**2
    return DATA_STD**2 / whole / alpha, ratio * DATA_STD / whole.sqrt()


def mu_to_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, mu: Tensor) -> Pair:
    """Solve mu, the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7), for x0. At t <= 1 mu is x0 itself.

    The coefficient of x0 is about 1e-4 at t = T of the paper's schedule. There, in float32, x0 has about three correct
    digits and epsilon has all of them.
    """
    kernel = posterior(schedule, t, _one_below(t))
    return x0_to_pair(schedule, x_t, t, (mu - like(kernel.x_t, x_t) * x_t) * like(1 / kernel.x0, x_t))


def mu_from_pair(schedule: Schedule, x_t: Tensor, t: float | Tensor, x0: Tensor, epsilon: Tensor) -> Tensor:
    kernel = posterior(schedule, t, _one_below(t))
    return like(kernel.x_t, x_t) * x_t + like(kernel.x0, x_t) * x0


def _one_below(t: float | Tensor) -> float | Tensor:
    return (t - 1).clamp(min=0) if isinstance(t, Tensor) else max(t - 1, 0)


Predicted = Literal["epsilon", "x0", "v", "score", "scaled_score", "mu", "edm"]
PREDICTIONS: dict[str, Kind] = {
    "epsilon": Kind(epsilon_to_pair, epsilon_from_pair),
    "x0": Kind(x0_to_pair, x0_from_pair),
    "v": Kind(v_to_pair, v_from_pair),
    "score": Kind(score_to_pair, score_from_pair),
    "scaled_score": Kind(scaled_score_to_pair, scaled_score_from_pair),
    "mu": Kind(mu_to_pair, mu_from_pair),
    "edm": Kind(edm_to_pair, edm_from_pair, edm_input_std),
}


def prediction_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ValueError: the name is not in PREDICTIONS.
    """
    if name not in PREDICTIONS:
        raise ValueError(f"objective.prediction={name} must be one of {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[name]
