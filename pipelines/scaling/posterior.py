"""Two families whose posterior is an integral over the exponent alone.

- P: `y = e + b x**-k`, e and b >= 0, residuals relative to y (form M2 of Alabdulmohsin et al. 2022);
- L: `log y = A + B x**-k`, B >= 0.

Both are linear given k, so a grid over k holds the posterior in closed form, within a millisecond. Points
near the end of the curve count more, `(x / x_max)**recency`, since only the end says how it goes on. k has a
log-normal prior. The settings below were chosen by backtests inside the `fit` parts of 36 learning curves
(docs/scaling-laws.md).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.scaling.curves import Floats

Family = Literal["P", "L"]

RECENCY = 3.5
PRIORS: dict[Family, tuple[float, float]] = {"P": (1.0, 0.4), "L": (0.3, 0.15)}
"""Median of the exponent and standard deviation of its logarithm."""
EXPONENTS = np.geomspace(0.02, 4.0, 80)
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Of one family, on a grid of g exponents."""

    family: Family
    weights: Floats
    """(g,), sum 1."""
    offset: Floats
    """(g,): e of P, A of L."""
    scale: Floats
    """(g,): b or B, at x / x_max = 1."""
    x_max: float
    noise: float
    """Standard deviation of log y about the curve."""

    def log_curves(self, x: Floats) -> Floats:
        """log y (g, n) at x (n,), for every exponent of the grid."""
        powers = np.exp(-EXPONENTS[:, None] * np.log(x / self.x_max))
        values = self.offset[:, None] + self.scale[:, None] * powers
        return np.log(np.maximum(values, TINY)) if self.family == "P" else values

    def log_moments(self, x: Floats) -> tuple[Floats, Floats]:
        """Mean and variance of the curve's log y, (n,) each; without noise."""
        curves = self.log_curves(x)
        mean = self.weights @ curves
        return mean, self.weights @ (curves - mean) ** 2

    def parameters(self) -> dict[str, tuple[float, float]]:
        """Posterior mean and standard deviation of each, by name; x counts in units of x_max."""
        names = ("e", "b", "k") if self.family == "P" else ("A", "B", "k")
        found = {}
        for name, values in zip(names, (self.offset, self.scale, EXPONENTS), strict=True):
            mean = float(self.weights @ values)
            found[name] = (mean, float(np.sqrt(self.weights @ (values - mean) ** 2)))
        return found


def fit_posterior(family: Family, x: Floats, y: Floats) -> Posterior:
    """From points (n,), in any order."""
    x_max = float(x.max())
    steps = np.log(x / x_max)
    recency = np.exp(RECENCY * steps)
    target = y if family == "P" else np.log(y)
    weights = recency / y**2 if family == "P" else recency
    powers = np.exp(-EXPONENTS[:, None] * steps)
    offset, scale = _lines(powers, target, weights, through_zero=family == "P")
    residuals = target - offset[:, None] - scale[:, None] * powers
    squares = (weights * residuals**2).sum(axis=1)
    effective = recency.sum() ** 2 / (recency @ recency)  # Kish: as many points of equal weight
    freedom = max(effective - 2, 1.0)
    median, spread = PRIORS[family]
    log_posterior = -0.5 * freedom * np.log(squares + TINY)
    log_posterior -= 0.5 * (np.log(EXPONENTS / median) / spread) ** 2
    density = np.exp(log_posterior - log_posterior.max())
    density /= density.sum()
    variance = float(density @ squares) / recency.sum() * effective / freedom
    return Posterior(
        family=family,
        weights=density,
        offset=offset,
        scale=scale,
        x_max=x_max,
        noise=float(np.sqrt(variance)),
    )


def _lines(powers: Floats, target: Floats, weights: Floats, *, through_zero: bool) -> tuple[Floats, Floats]:
    """Weighted least squares of target (n,) on each row of powers (g, n): offsets and slopes, (g,) each.

    Slopes are never negative (the curve falls), nor are offsets with `through_zero`.
    """
    total = weights.sum()
    mean_power, mean = powers @ weights / total, float(weights @ target) / total
    centred = powers - mean_power[:, None]
    spread = (weights * centred**2).sum(axis=1)
    slope = (weights * centred * (target - mean)).sum(axis=1) / np.maximum(spread, TINY)
    offset = mean - slope * mean_power
    if through_zero:
        below = offset < 0
        alone = (weights * powers * target).sum(axis=1) / (weights * powers**2).sum(axis=1)
        slope, offset = np.where(below, alone, slope), np.where(below, 0.0, offset)
    rising = slope < 0
    return np.where(rising, mean, offset), np.where(rising, 0.0, slope)
