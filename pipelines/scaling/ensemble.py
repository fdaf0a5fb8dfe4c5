"""The default law: the equal-weight mean of the families P and L in log loss, with intervals.

The variance of log y at x has four parts: that of each posterior, the distance of the two, the noise of
single runs, and a structural one, `(d * end slope * log(x / x_max))**2`, for what no posterior knows: that
real curves bend away from every fitted form. Without it nominal 90 % intervals cover half of what comes
(docs/scaling-laws.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.scaling.curves import MIN_SCALES, Floats
from pipelines.scaling.intervals import CONFIDENCE, Forecast, forecast, structural_variance
from pipelines.scaling.posterior import EXPONENTS, Posterior, fit_posterior

STEP = 1e-3
"""Of log x, for the slope."""
RESAMPLES = 100
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    posteriors: tuple[Posterior, Posterior]
    x_max: float
    freedom: int
    """Of Student's t: distinct x beyond the three parameters of each family, at least 1."""
    resampled: tuple["Ensemble", ...] = ()
    """Fits to seeds drawn anew, where there are several: their spread is a part of the curve's variance."""

    @property
    def noise(self) -> float:
        """Standard deviation of log y of single runs about the curve."""
        return float(np.sqrt(np.mean([posterior.noise**2 for posterior in self.posteriors])))

    @property
    def end_slope(self) -> float:
        """-d log y / d log x at x_max."""
        ends = np.array([self.x_max, self.x_max * np.exp(-STEP)])
        last, before = np.log(self.predict(ends))
        return float((before - last) / STEP)

    def predict(self, x: Floats) -> Floats:
        """Median loss (n,) at x (n,)."""
        means = [posterior.log_moments(x)[0] for posterior in self.posteriors]
        return np.asarray(np.exp(np.mean(means, axis=0)))

    def curve_variance(self, x: Floats) -> Floats:
        """Of the curve's log y (n,), structural part included, noise left out."""
        (mean_p, variance_p), (mean_l, variance_l) = (one.log_moments(x) for one in self.posteriors)
        spread = (variance_p + variance_l) / 2 + ((mean_p - mean_l) / 2) ** 2
        total = spread + structural_variance(self.end_slope, x, self.x_max)
        if self.resampled:
            total = total + np.var([np.log(other.predict(x)) for other in self.resampled], axis=0, ddof=1)
        return np.asarray(total)

    def forecast(self, x: Floats, confidence: float = CONFIDENCE) -> Forecast:
        return forecast(self.predict(x), self.curve_variance(x) + self.noise**2, confidence, self.freedom)

    def parameters(self) -> dict[str, tuple[float, float]]:
        """Mean and standard error by name, such as `P.k`; x counts in units of x_max."""
        return {
            f"{posterior.family}.{name}": value
            for posterior in self.posteriors
            for name, value in posterior.parameters().items()
        }

    def draw_logs(self, x: Floats, count: int, rng: np.random.Generator) -> Floats:
        """Curves of log y (count, n) at x (n,): a family, an exponent each; no noise, no structural part."""
        logs = np.empty((count, len(x)))
        which = rng.integers(2, size=count)
        for number, posterior in enumerate(self.posteriors):
            rows = np.flatnonzero(which == number)
            picks = rng.choice(len(EXPONENTS), size=len(rows), p=posterior.weights)
            logs[rows] = posterior.log_curves(x)[picks]
        return logs


def fit_ensemble(x: Floats, y: Floats, seeds: NDArray[np.int64] | None = None) -> Ensemble:
    """From points (n,) each, as a checked `Curve` has them; `seeds` (n,) are resampled as wholes."""
    return Ensemble(
        posteriors=(fit_posterior("P", x, y), fit_posterior("L", x, y)),
        x_max=float(x.max()),
        freedom=max(1, len(np.unique(x)) - 3),
        resampled=tuple(_resampled(x, y, seeds)) if seeds is not None else (),
    )


def _resampled(x: Floats, y: Floats, seeds: NDArray[np.int64]) -> Iterator[Ensemble]:
    """Fits to as many seeds as there are, drawn with replacement."""
    rng = np.random.default_rng(SEED)
    names = np.unique(seeds)
    for _ in range(RESAMPLES):
        rows = np.concatenate([np.flatnonzero(seeds == one) for one in rng.choice(names, size=len(names))])
        if len(np.unique(x[rows])) >= MIN_SCALES:
            yield fit_ensemble(x[rows], y[rows])
