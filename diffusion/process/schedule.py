"""Noise schedules: the amplitudes of signal and noise in x_t. Also the types that all other modules use.

    x_t = alpha_t x_0 + sigma_t epsilon,    epsilon ~ N(0, I)

A schedule is a function `schedule(t) -> Level(alpha, sigma)` of real t in [0, T]: 0 is clean data, the integers 1..T
are the noise levels of the papers. It knows no network, no loss and no sampler.

Each family of schedules lies on a curve in the plane of alpha and sigma:

    alpha^2 + sigma^2 = 1    variance preserving (VP, Ho et al. 2020)
    alpha = 1                variance exploding (VE, Song & Ermon 2019)
    alpha^2 + sigma = 1      sub-VP (Song et al. 2021, score SDE)

The position on the curve at time t is given by a table of levels (`Table`) or by a formula (`Continuous`). No other
file depends on which curve it is.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.settings import Between, Count, Positive, settings

RandomNormal = Callable[[Tensor], Tensor]
"""`randn(x)` is standard normal noise of the shape, dtype and device of x, as `torch.randn_like`."""


class Level(NamedTuple):
    """Amplitudes of signal and noise at a time: two float64 tensors of the shape of the time."""

    alpha: Tensor
    sigma: Tensor


class Prediction(NamedTuple):
    """The output of a denoiser at x_t: x0 and epsilon, (B, ...), in the dtype of x_t.

    They satisfy alpha_t x0 + sigma_t epsilon = x_t.
    `variance` is v in [0, 1], or None if the network learned no variance. It interpolates the log variance of the
    reverse kernel between that of the posterior (0) and that of the forward kernel (1) (Nichol & Dhariwal 2021, eq.
    15). Only `kernels.reverse_std` uses it.
    """

    x0: Tensor
    epsilon: Tensor
    variance: Tensor | None = None


class Denoiser(Protocol):
    """A function (x_t, t, labels) -> Prediction.

    x_t is (B, ...), t a float or a (B,) tensor in (0, T], labels (B,) int64 or None.
    """

    def __call__(self, x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction: ...


def like(value: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per image so that it broadcasts against x, and cast it to the dtype of x.

    (B,) -> (B, 1, ..., 1). A tensor of the shape of x keeps its shape. A 0-dim tensor is returned unchanged.
    Coefficients are computed in float64; this is the only place where they are rounded.
    """
    if value.ndim == 0:
        return value
    return value.to(x.dtype).reshape(x.shape if value.shape == x.shape else (-1, *[1] * (x.ndim - 1)))


class Schedule(ABC):
    """alpha and sigma at every real time in [0, T]: 1 and 0 at t = 0, and lambda = log(alpha / sigma) falls with t.

    Args:
        num_timesteps: T.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    @abstractmethod
    def _level(self, t: Tensor) -> Level:
        """The level at float64 times in [0, T], on any device."""

    @abstractmethod
    def _time(self, log_ratio: Tensor) -> Tensor:
        """The inverse: the times of float64 lambdas in [lambda_T, infinity]."""

    def __call__(self, t: float | Tensor) -> Level:
        """Amplitudes of signal and noise at time t: float64, in the shape and on the device of t.

        The range of a tensor on an accelerator is not checked, because reading it would make the host wait.

        Raises:
            ValueError: t is outside [0, T].
        """
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)
        if t.device.type == "cpu" and not ((t >= 0) & (t <= self.num_timesteps)).all():
            raise ValueError(f"time {t.tolist()} is outside [0, {self.num_timesteps}] (schedule.num_timesteps).")
        return self._level(t.to(torch.float64))

    def std(self, t: float | Tensor) -> Tensor:
        """Standard deviation of x_t for data of mean 0 and variance 1: 1 under VP, sqrt(1 + sigma_t^2) under VE."""
        alpha, sigma = self(t)
        return (alpha**2 + sigma**2).sqrt()

    @property
    def prior_std(self) -> float:
        """Standard deviation of x_T for data of unit variance: sampling starts from N(0, prior_std^2).

        A sampler that starts at t < T starts from N(0, std(t)^2).
        """
        return float(self.std(self.num_timesteps))

    def log_ratio(self, t: float | Tensor) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t), half the log signal-to-noise ratio: float64, in the shape of t."""
        alpha, sigma = self(t)
        return alpha.log() - sigma.log()

    def time_of(self, log_ratio: float | Tensor) -> float | Tensor:
        """The time at which lambda_t = log(alpha_t / sigma_t) has this value: the inverse of `log_ratio`.

        Args:
            log_ratio: lambda, a float or a tensor of any shape. The result is of the same kind; infinity gives t = 0.

        Raises:
            ValueError: lambda is below lambda_T, by more than rounding.
        """
        if not isinstance(log_ratio, Tensor):
            return float(self.time_of(torch.tensor(log_ratio, dtype=torch.float64)))
        wanted, least = log_ratio.to(torch.float64), float(self.log_ratio(self.num_timesteps))
        if wanted.device.type == "cpu" and not (wanted >= least - 1e-9).all():
            raise ValueError(f"lambda {wanted.tolist()} is below lambda_T = {least:.6g}.")
        return self._time(wanted.clamp(min=least))


class Table(Schedule):
    """A schedule given by tables of alpha and sigma at the integers 1..T, interpolated at real times in [0, T].

    Between integers lambda is interpolated linearly. Below t = 1, where lambda is unbounded, sigma is interpolated
    linearly. In both cases the schedule stays on its curve, alpha^2 + c sigma^2 = 1.

    Args:
        alpha: signal amplitudes at t = 1..T, (T,).
        sigma: noise amplitudes at t = 1..T, (T,).
        preserving: the c of the curve: 1 for VP, 0 for VE.

    Raises:
        ValueError: in float64, a level is not noisier than the one before it, or has no signal.
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, preserving: float) -> None:
        assert alpha.shape == sigma.shape and alpha.ndim == 1, f"expected two (T,) tables, got {alpha.shape}"
        super().__init__(len(alpha))
        clean = torch.ones(1, dtype=torch.float64)
        self._preserving = preserving
        alphas = torch.cat([clean, alpha.to("cpu", torch.float64)])
        sigmas = torch.cat([0 * clean, sigma.to("cpu", torch.float64)])
        lambdas = alphas.log() - sigmas.log()
        if not (lambdas.diff() < 0).all() or not lambdas[1:].isfinite().all():
            raise ValueError(
                "schedule: every noise level must be noisier than the one before it and must keep some signal, in "
                "float64. Give a smaller beta or a smaller schedule.num_timesteps."
            )
        self._host = alphas.device
        self._tables = {self._host: (alphas, sigmas, lambdas)}

    def _level(self, t: Tensor) -> Level:
        alphas, sigmas, lambdas = self._on(t.device)
        nearest = t.round()
        above = t.ceil().clamp(min=1)
        below, part = above.long() - 1, t - above + 1
        noise_to_signal = (-torch.lerp(lambdas[below], lambdas[below + 1], part)).exp()
        small_sigma = part * sigmas[1]
        small_alpha = (1 - self._preserving * small_sigma**2).sqrt()
        alpha = torch.where(below > 0, (1 + self._preserving * noise_to_signal**2).rsqrt(), small_alpha)
        sigma = torch.where(below > 0, noise_to_signal * alpha, small_sigma)
        on_table, row = t == nearest, nearest.long()
        return Level(torch.where(on_table, alphas[row], alpha), torch.where(on_table, sigmas[row], sigma))

    def _time(self, log_ratio: Tensor) -> Tensor:
        _, sigmas, lambdas = self._on(log_ratio.device)
        noise_to_signal = (-log_ratio).exp()
        sigma = noise_to_signal * (1 + self._preserving * noise_to_signal**2).rsqrt()
        below = (torch.searchsorted(-lambdas, -log_ratio.contiguous()) - 1).clamp(1, max(1, self.num_timesteps - 1))
        next_up = (below + 1).clamp(max=self.num_timesteps)
        span = torch.where(next_up > below, lambdas[below] - lambdas[next_up], 1.0)
        between = below + (lambdas[below] - log_ratio) / span
        return torch.where(log_ratio > lambdas[1], sigma / sigmas[1], between)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._tables[self._host])
        return self._tables[device]


class Continuous(Schedule):
    """A schedule given by a formula: the process dx = -beta x du / 2 + ..., with beta linear in u = t / T.

    Song et al. 2021, score SDE, app. B and C; u is their time.

        alpha = exp(-B / 2),    B = integral of beta = beta_min u + (beta_max - beta_min) u^2 / 2

    The curve gives sigma as a function of B. In their code u starts at 1e-3; with T = 1000 that is t = 1, as here.

    Args:
        num_timesteps: T. It only sets the unit of t and the number of levels in training.
        beta_min, beta_max: the rate beta at u = 0 and at u = 1.
        sigma: sigma as a function of B.
        integral: B as a function of the noise-to-signal ratio sigma / alpha, the inverse.

    Raises:
        ValueError: num_timesteps < 1, not 0 < beta_min <= beta_max, or in float64 no signal is left at T.
    """

    def __init__(
        self,
        num_timesteps: int,
        beta_min: float,
        beta_max: float,
        sigma: Callable[[Tensor], Tensor],
        integral: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(num_timesteps)
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(
                f"schedule.beta_min={beta_min}, schedule.beta_max={beta_max}: beta_min must be above 0 and not above "
                "beta_max."
            )
        self._start, self._rise = beta_min, beta_max - beta_min
        self._sigma, self._integral = sigma, integral
        if not self.log_ratio(num_timesteps).isfinite():
            raise ValueError(
                f"schedule.beta_max={beta_max}: no signal is left at the last noise level. Give a smaller value."
            )

    def _level(self, t: Tensor) -> Level:
        u = t / self.num_timesteps
        integral = self._start * u + self._rise * u**2 / 2
        return Level((-integral / 2).exp(), self._sigma(integral))

    def _time(self, log_ratio: Tensor) -> Tensor:
        integral = self._integral((-log_ratio).exp())
        root = (self._start**2 + 2 * self._rise * integral).sqrt()
        return (2 * integral / (self._start + root) * self.num_timesteps).clamp(max=self.num_timesteps)


Beta = Annotated[float, Between(0, 1, ends="()")]


@settings("schedule")
def vp_linear(num_timesteps: Count = 1000, beta_start: Beta = 1e-4, beta_end: Beta = 0.02) -> Schedule:
    """Variance-preserving schedule with beta linear in t (Ho et al. 2020, sec. 4).

    Raises:
        ValueError: num_timesteps < 1, or not 0 < beta_start <= beta_end < 1.
    """
    _check_betas(beta_start, beta_end)
    return _from_betas(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


@settings("schedule")
def vp_quadratic(num_timesteps: Count = 1000, beta_start: Beta = 1e-4, beta_end: Beta = 0.02) -> Schedule:
    """Variance-preserving schedule with sqrt(beta) linear in t ("quad" in the code of Ho et al. 2020).

    Raises:
        ValueError: num_timesteps < 1, or not 0 < beta_start <= beta_end < 1.
    """
    _check_betas(beta_start, beta_end)
    return _from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2)


@settings("schedule")
def vp_constant(num_timesteps: Count = 1000, beta: Beta = 0.01) -> Schedule:
    """Variance-preserving schedule with the same beta at every step ("const" in the code of Ho et al. 2020).

    Raises:
        ValueError: num_timesteps < 1, or beta outside (0, 1).
    """
    return _from_betas(torch.full((num_timesteps,), beta, dtype=torch.float64))


@settings("schedule")
def vp_cosine(num_timesteps: Count = 1000, offset: Positive = 0.008, beta_max: Beta = 0.999) -> Schedule:
    """Variance-preserving schedule whose alpha_bar is a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    Args:
        num_timesteps: T.
        offset: the paper's s, which prevents the first betas from being close to 0.
        beta_max: upper limit of beta, reached near T.

    Raises:
        ValueError: num_timesteps < 1, offset <= 0, or beta_max outside (0, 1).
    """
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = ((u + offset) / (1 + offset) * (math.pi / 2)).cos() ** 2
    return _from_betas((1 - f[1:] / f[:-1]).clamp(max=beta_max))


@settings("schedule")
def ve_geometric(num_timesteps: Count = 1000, sigma_min: Positive = 0.01, sigma_max: Positive = 50.0) -> Schedule:
    """Variance-exploding schedule whose sigma_1..sigma_T are a geometric sequence.

    Song & Ermon 2019, sec. 4.2, and 2020, sec. 3. sigma is geometric between the levels too. So this is also the
    continuous-time VE process of Song et al. 2021 (score SDE, app. C), whose time in [0, 1] is (t - 1) / (T - 1). With
    num_timesteps=1 the only level is sigma_min.

    Raises:
        ValueError: num_timesteps < 1, or not 0 < sigma_min < sigma_max.
    """
    if not sigma_min < sigma_max:
        raise ValueError(
            f"schedule.sigma_min={sigma_min}, schedule.sigma_max={sigma_max}: sigma_min must be below sigma_max."
        )
    sigma = torch.linspace(math.log(sigma_min), math.log(sigma_max), num_timesteps, dtype=torch.float64).exp()
    return Table(torch.ones_like(sigma), sigma, preserving=0.0)


@settings("schedule")
def vp_continuous(num_timesteps: Count = 1000, beta_min: Positive = 0.1, beta_max: Positive = 20.0) -> Schedule:
    """Variance-preserving schedule in continuous time: sigma^2 = 1 - exp(-B) (Song et al. 2021, score SDE, eq. 11).

    With T = 1000, alpha and sigma differ by less than 5 % from those of vp_linear, whose beta_t is about beta / T.

    Raises:
        ValueError: as `Continuous`.
    """
    return Continuous(
        num_timesteps,
        beta_min,
        beta_max,
        sigma=lambda integral: (-torch.expm1(-integral)).sqrt(),
        integral=lambda ratio: torch.log1p(ratio**2),
    )


@settings("schedule")
def sub_vp(num_timesteps: Count = 1000, beta_min: Positive = 0.1, beta_max: Positive = 20.0) -> Schedule:
    """Sub-VP schedule: the alpha of VP, and sigma = 1 - exp(-B), the square of VP's (Song et al. 2021, SDE, eq. 13).

    Raises:
        ValueError: as `Continuous`.
    """
    return Continuous(
        num_timesteps,
        beta_min,
        beta_max,
        sigma=lambda integral: -torch.expm1(-integral),
        integral=lambda ratio: 2 * torch.asinh(ratio / 2),
    )


def _from_betas(beta: Tensor) -> Schedule:
    """The VP schedule of these betas. alpha_bar_t = prod (1 - beta), as a sum of logarithms, precise for small beta."""
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    return Table((log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt(), preserving=1.0)


def _check_betas(beta_start: float, beta_end: float) -> None:
    if beta_start > beta_end:
        raise ValueError(
            f"schedule.beta_start={beta_start}, schedule.beta_end={beta_end}: beta_start must not be above beta_end."
        )
