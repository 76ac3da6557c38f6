"""Distributions whose noised score is known exactly. They are denoisers without a network, and are used in tests.

Data of a Gaussian mixture, sum_k w_k N(m_k, S_k), noised to x = alpha x_0 + sigma epsilon, is the mixture of
N(alpha m_k, C_k), C_k = alpha^2 S_k + sigma^2 I. With r_k(x) the responsibility of component k,

    score = sum_k r_k C_k^-1 (alpha m_k - x)
    x0 = E[x_0 | x] = sum_k r_k (m_k + alpha S_k C_k^-1 (x - alpha m_k)),    epsilon = -sigma score

Everything is computed in float64 on the CPU; results have the dtype and device of x. The two-dimensional toy data sets
(`SETS`) are mixtures too. This module knows schedules; it knows no network and no sampler.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.process.schedule import Denoiser, Level, Prediction, Schedule

Numbers = float | Sequence | Tensor


class Mixture:
    """A mixture of Gaussians over numbers or vectors; each component has a class label.

    Points are x (...) if the means are numbers, and x (..., d) if they are vectors. Labels are int64 in the shape of
    the first axis (or axes) of x. None means the whole mixture. So does the label `num_classes`, the null label, as in
    networks with label dropout.

    Args:
        weights: (K,), positive; they are normalised.
        means: (K,) for numbers, (K, d) for vectors.
        covariances: (K, d, d), or None.
        stds: (K,), isotropic standard deviations, or None; 0 is allowed (point masses). Give either covariances or
            stds.
        classes: label of each component, (K,); every label of 0..max must occur. By default component k has label k.

    Raises:
        ValueError: shapes do not match, weights are not positive, or a covariance is not positive semidefinite.
    """

    def __init__(
        self,
        weights: Numbers,
        means: Numbers,
        covariances: Numbers | None = None,
        stds: Numbers | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        weights, means = _float64(weights), _float64(means)
        if (covariances is None) == (stds is None):
            raise ValueError("Give exactly one of covariances and stds.")
        if weights.ndim != 1 or means.ndim not in (1, 2) or len(means) != len(weights) or not (weights > 0).all():
            raise ValueError(f"weights {weights.tolist()} must be positive, one per mean (means {tuple(means.shape)}).")
        self.of_vectors = means.ndim == 2
        self._means = means if self.of_vectors else means[:, None]  # (K, d)
        num, dim = self._means.shape
        if stds is not None:
            stds = _float64(stds)
            if stds.shape != (num,) or not (stds >= 0).all():
                raise ValueError(f"stds {stds.tolist()} must be {num} numbers >= 0.")
            self._turned = False
            self._axes = torch.eye(dim, dtype=torch.float64).expand(num, dim, dim)
            self._variances = (stds**2)[:, None].expand(num, dim)
        else:
            covariances = _float64(covariances)
            if covariances.shape != (num, dim, dim) or not torch.allclose(covariances, covariances.mT):
                raise ValueError(f"covariances {tuple(covariances.shape)} must be symmetric, ({num}, {dim}, {dim}).")
            self._turned = True
            self._variances, self._axes = torch.linalg.eigh(covariances)  # S_k = axes diag(variances) axes^T
            if not (self._variances >= -1e-12).all():
                raise ValueError("covariances must be positive semidefinite.")
            self._variances = self._variances.clamp(min=0)
        self.weights = weights / weights.sum()
        self.classes = torch.arange(num) if classes is None else torch.as_tensor(classes, dtype=torch.int64)
        self.num_classes = int(self.classes.max()) + 1
        if self.classes.shape != (num,) or set(self.classes.tolist()) != set(range(self.num_classes)):
            raise ValueError(f"classes {self.classes.tolist()} must be {num} labels in which each of 0..max occurs.")
        member = self.classes == torch.arange(self.num_classes)[:, None]
        member = torch.cat([member, torch.ones(1, num, dtype=torch.bool)])  # the last row is the null label
        share = torch.where(member, self.weights, 0.0)
        self._log_weights = (share / share.sum(1, keepdim=True)).log()  # (classes + 1, K)

    def sample(self, num: int, generator: torch.Generator | None = None, labels: Tensor | None = None) -> Tensor:
        """Draw num points of the data: (num,) or (num, d), float64. With labels (num,), draw from these classes."""
        rows = self._log_weights[self._rows(labels)].expand(num, -1).exp()
        component = torch.multinomial(rows, 1, generator=generator)[:, 0]
        z = torch.randn(num, self._means.shape[1], dtype=torch.float64, generator=generator)
        z = torch.einsum("nij,nj->ni", self._axes[component], z * self._variances[component].sqrt())
        x = self._means[component] + z
        return x if self.of_vectors else x[:, 0]

    def log_density(self, x: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
        """log q(x) of the noised data at this level: float64, in the shape of x without the axis of the vectors."""
        return self._joint(self._points(x), level, labels)[0].logsumexp(-1)

    def score(self, x: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
        """Gradient of log q(x) at this level, given the labels if any: shape and dtype of x."""
        return self._like(x, -self._whitened(self._points(x), level, labels)[1])

    def spread(self, level: Level) -> Tensor:
        """Standard deviation of each coordinate of the noised data: () or (d,), float64."""
        std = self.moments(level)[1].diagonal().sqrt()
        return std if self.of_vectors else std[0]

    def components(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (K,), means (K, d) and covariances (K, d, d) of the noised data, float64; d = 1 for numbers."""
        alpha, sigma = level
        variances = alpha**2 * self._variances + sigma**2
        covariances = torch.einsum("kij,kj,klj->kil", self._axes, variances, self._axes)
        return self.weights, alpha * self._means, covariances

    def moments(self, level: Level) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of the noised data, float64; d = 1 for numbers."""
        weights, means, covariances = self.components(level)
        mean = weights @ means
        apart = means - mean
        return mean, torch.einsum("k,kij->ij", weights, covariances) + torch.einsum(
            "k,ki,kj->ij", weights, apart, apart
        )

    def responsibilities(self, x: Tensor, level: Level) -> Tensor:
        """Probability of each class given the noised point: (..., classes), float64."""
        joint = self._joint(self._points(x), level, None)[0].softmax(-1)
        member = (self.classes[:, None] == torch.arange(self.num_classes)).to(joint)
        return joint @ member

    def denoiser(self, schedule: Schedule) -> Denoiser:
        """The exact denoiser: E[x_0 | x_t] and E[epsilon | x_t], given the labels if any."""

        def denoise(x_t: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Prediction:
            points, level = self._points(x_t), schedule(t)
            x0, whitened = self._whitened(points, level, labels)
            return Prediction(self._like(x_t, x0), self._like(x_t, _per_point(level.sigma, points) * whitened))

        return denoise

    def flow(
        self,
        x: Tensor,
        schedule: Schedule,
        t: float,
        s: float,
        labels: Tensor | None = None,
        tolerance: float = 1e-10,
    ) -> Tensor:
        """Solve the probability flow from x at time t to time s, above or below t; shape and dtype of x.

        With y = x / alpha and r = sigma / alpha the flow is dy/dr = epsilon (Song et al. 2021, DDIM, eq. 14), the VE
        flow for any schedule. It is solved in asinh(r) with the Dormand-Prince 5(4) pair.

        Args:
            tolerance: error allowed per step, relative to 1 + |y|.

        Raises:
            ValueError: tolerance is too small for float64.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        one = torch.ones((), dtype=torch.float64)

        def slope(u: float, y: Tensor) -> Tensor:
            r = one * math.sinh(u)
            return math.cosh(u) * r * self._whitened(y, Level(one, r), labels)[1]

        start, stop = math.asinh(sigma_t / alpha_t), math.asinh(sigma_s / alpha_s)
        return self._like(x, alpha_s * _integrate(slope, self._points(x) / alpha_t, start, stop, tolerance))

    def _points(self, x: Tensor) -> Tensor:
        x = x.to("cpu", torch.float64)
        return x if self.of_vectors else x[..., None]

    def _like(self, x: Tensor, points: Tensor) -> Tensor:
        return (points if self.of_vectors else points[..., 0]).to(x)

    def _rows(self, labels: Tensor | None) -> Tensor:
        return torch.tensor(self.num_classes) if labels is None else labels.cpu()

    def _joint(self, x: Tensor, level: Level, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log of weight times density (..., K), and x - alpha m_k and C_k in the axes of S_k (..., K, d); alpha."""
        alpha, sigma = (_per_point(value, x)[..., None] for value in level)
        offset = x[..., None, :] - alpha * self._means
        if self._turned:
            offset = torch.einsum("kij,...ki->...kj", self._axes, offset)
        variance = alpha**2 * self._variances + sigma**2
        log_weights = self._log_weights[self._rows(labels)]
        log_weights = log_weights.reshape(*log_weights.shape[:-1], *[1] * (x.ndim - log_weights.ndim), -1)
        log_density = -0.5 * (offset**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return log_weights + log_density, offset, variance, alpha

    def _whitened(self, x: Tensor, level: Level, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x] and sum_k r_k C_k^-1 (x - alpha m_k), both (..., d), without dividing by alpha or sigma."""
        joint, offset, variance, alpha = self._joint(x, level, labels)
        responsibility = joint.softmax(-1)
        whitened = offset / variance
        pulled = alpha * self._variances * whitened
        if self._turned:
            whitened, pulled = (torch.einsum("kij,...kj->...ki", self._axes, part) for part in (whitened, pulled))
        x0 = torch.einsum("...k,...ki->...i", responsibility, self._means + pulled)
        return x0, torch.einsum("...k,...ki->...i", responsibility, whitened)


class Gaussian(Mixture):
    """N(mean, std^2) over numbers or N(mean, covariance) over vectors: one component, with a flow in closed form.

    Args:
        mean: a number, or (d,).
        std: a number, the isotropic standard deviation, or None.
        covariance: (d, d), or None. Give either std or covariance.
    """

    def __init__(self, mean: Numbers, std: float | None = None, covariance: Numbers | None = None) -> None:
        super().__init__(
            [1.0],
            _float64(mean)[None],
            covariances=None if covariance is None else _float64(covariance)[None],
            stds=None if std is None else [std],
        )

    def flow(
        self,
        x: Tensor,
        schedule: Schedule,
        t: float,
        s: float,
        labels: Tensor | None = None,
        tolerance: float = 0.0,
    ) -> Tensor:
        """The exact `Mixture.flow`: along each axis of the covariance, (x - mean) / std does not change."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        axes, variances, mean = self._axes[0], self._variances[0], self._means[0]
        stretch = ((alpha_s**2 * variances + sigma_s**2) / (alpha_t**2 * variances + sigma_t**2)).sqrt()
        moved = (((self._points(x) - alpha_t * mean) @ axes) * stretch) @ axes.mT
        return self._like(x, alpha_s * mean + moved)


# ---- two-dimensional data sets, within [-1, 1] up to tails of five standard deviations ----

BLUR = 0.6  # standard deviation of components divided by their distance; their sum is then constant within 0.2 %


def modes(weights: Sequence[float] = (1, 2, 3, 4, 5, 6, 7, 8), radius: float = 0.7, std: float = 0.06) -> Mixture:
    """Isotropic modes on a circle, far apart, one class each, to count how a sampler reproduces their weights."""
    turn = 2 * math.pi * torch.arange(len(weights), dtype=torch.float64) / len(weights)
    return Mixture(weights, radius * _direction(turn), stds=[std] * len(weights))


def rings(radii: Sequence[float] = (0.4, 0.8), width: float = 0.03) -> Mixture:
    """Concentric rings, weighted by their length, one class each. width: standard deviation across the ring."""
    parts = [_arc((0.0, 0.0), radius, 0.0, 2 * math.pi, round(60 * radius), width) for radius in radii]
    return _joined(parts)


def moons(width: float = 0.04) -> Mixture:
    """Two interleaved half circles, one class each. width: standard deviation across the arc."""
    upper = _arc((-0.25, -0.1), 0.5, 0.0, math.pi, 16, width)
    lower = _arc((0.25, 0.1), 0.5, math.pi, 2 * math.pi, 16, width)
    return _joined([upper, lower])


def checkerboard(squares: int = 4) -> Mixture:
    """The black squares of a board on [-0.8, 0.8]^2, uniform with blurred edges, one class each.

    Args:
        squares: number of squares per side.
    """
    side, per_side = 1.6 / squares, 6
    inside = (torch.arange(per_side, dtype=torch.float64) + 0.5) / per_side
    grid = torch.cartesian_prod(inside, inside)
    black = [(i, j) for i in range(squares) for j in range(squares) if (i + j) % 2 == 0]
    corners = torch.tensor(black, dtype=torch.float64)
    means = -0.8 + side * (corners[:, None] + grid).reshape(-1, 2)
    classes = torch.arange(len(black)).repeat_interleave(len(grid)).tolist()
    return Mixture([1.0] * len(means), means, stds=[side / per_side * BLUR] * len(means), classes=classes)


SETS = {"modes": modes, "rings": rings, "moons": moons, "checkerboard": checkerboard}


def _direction(turn: Tensor) -> Tensor:
    return torch.stack([turn.cos(), turn.sin()], dim=-1)


def _arc(
    centre: tuple[float, float], radius: float, start: float, stop: float, num: int, width: float
) -> tuple[Tensor, Tensor]:
    """Means (num, 2) and covariances (num, 2, 2) of `num` components along an arc, with deviation `width` across it."""
    step = (stop - start) / num
    turn = start + step * (torch.arange(num, dtype=torch.float64) + 0.5)
    outward, along = _direction(turn), _direction(turn + math.pi / 2)
    length = BLUR * radius * step
    covariances = sum(std**2 * d[:, :, None] * d[:, None, :] for std, d in ((width, outward), (length, along)))
    return _float64(centre) + radius * outward, covariances


def _joined(arcs: Sequence[tuple[Tensor, Tensor]]) -> Mixture:
    means, covariances = (torch.cat(part) for part in zip(*arcs, strict=True))
    classes = [k for k, (part, _) in enumerate(arcs) for _ in part]
    return Mixture([1.0] * len(means), means, covariances=covariances, classes=classes)


def _float64(value: Numbers) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _per_point(value: Tensor, x: Tensor) -> Tensor:
    """Reshape () or (B,) so that it broadcasts against x (B, ..., d)."""
    value = value.cpu()
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value


# Dormand & Prince 1980: nodes, stages, and the difference between the fifth-order and the fourth-order result.
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _integrate(slope, y: Tensor, u: float, stop: float, tolerance: float) -> Tensor:
    """Solve dy/du = slope(u, y) from u to `stop` with adaptive step size; returns y at `stop`."""
    h = (stop - u) / 100
    while u != stop:
        h = stop - u if abs(h) >= abs(stop - u) else h
        slopes: list[Tensor] = []
        for node, stage in zip(_NODES, _STAGES, strict=True):
            moved = y + h * sum((a * k for a, k in zip(stage, slopes, strict=True)), torch.zeros_like(y))
            slopes.append(slope(u + node * h, moved))
        error = h * sum(e * k for e, k in zip(_ERROR, slopes, strict=True))
        size = float((error.abs() / (tolerance * (1 + y.abs()))).max())
        assert math.isfinite(size), f"the flow is not finite at asinh(sigma / alpha) = {u}"
        if size <= 1:
            y, u = moved, stop if h == stop - u else u + h
        elif abs(h) < 1e-13:
            raise ValueError(f"tolerance={tolerance} is too small for float64 arithmetic. Give a larger tolerance.")
        h *= min(5.0, max(0.2, 0.9 * max(size, 1e-9) ** -0.2))
    return y
