"""How error falls with data, parameters or compute: a power law with honest uncertainty.

`error = b * x**-c` is form M1 of Alabdulmohsin, Neyshabur and Zhai 2022 (arXiv 2209.06640), fitted by least
squares of log(error). It has no floor, so it flatters forecasts far beyond the points: `predict` refuses
more than `extrapolation_limit` times the largest x that was seen.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from workers.errors import ConfigError

Floats = NDArray[np.float64]

EXTRAPOLATION_LIMIT = 2.0
"""Backtests cut curves at x_max / 2; nothing is known of farther horizons."""


def error_rate(errors: int, n: int) -> float:
    """Share of errors with half a pseudo-count for each outcome: (errors + 1/2) / (n + 1).

    The posterior mean under Jeffreys' prior Beta(1/2, 1/2), so never 0 or 1: a model without a single
    error on n images still has a logarithm, and one that falls as n grows.
    """
    _check_counts(errors, n)
    return (errors + 0.5) / (n + 1)


def wilson_interval(errors: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, from counts of independent images."""
    _check_counts(errors, n)
    z = float(ndtri((1 + _check_confidence(confidence)) / 2))
    share, spread = errors / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # Exact at both ends, where rounding would leave 1e-17 or step outside.
    low = 0.0 if errors == 0 else float(max(0.0, centre - half))
    high = 1.0 if errors == n else float(min(1.0, centre + half))
    return low, high


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """`b * x**-c`, and how well the points determined it."""

    b: float
    """Error at x = 1, in the unit of the points."""
    c: float
    """Exponent; positive where the error falls."""
    log_b_error: float | None
    """Standard error of log(b); None with two points, through which every line runs exactly."""
    c_error: float | None
    """Standard error of the exponent; None with two points."""
    rmsle: float
    """Root mean square of the residuals of log(y), over the fitted points."""
    num_points: int
    x_range: tuple[float, float]
    extrapolation_limit: float = EXTRAPOLATION_LIMIT
    """How many times the largest fitted x `predict` goes to unasked."""

    def c_interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Student's t with num_points - 2 degrees of freedom: wide with three points; None with two."""
        _check_confidence(confidence)
        if self.c_error is None:
            return None
        half = float(stdtrit(self.num_points - 2, (1 + confidence) / 2)) * self.c_error
        return self.c - half, self.c + half

    def predict(self, x: ArrayLike, *, extrapolate: bool = False) -> Floats:
        """Error at x, of the shape of x; ConfigError beyond the limit unless told to `extrapolate`."""
        points = _positive("x", x)
        horizon = self.extrapolation_limit * self.x_range[1]
        if not extrapolate and points.size and points.max() > horizon:
            raise ConfigError(
                f"x: {points.max():g} is beyond {self.extrapolation_limit:g} times the largest fitted x "
                f"({self.x_range[1]:g}), where no backtest reaches; fit with larger runs, or ask for "
                f"extrapolate=True"
            )
        return np.asarray(self.b * points**-self.c, dtype=np.float64)


def fit_power_law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """Least squares of log(y) on log(x), both (n,), n >= 2; ConfigError for what has no logarithm.

    Errors of zero do not belong here: take each y from `error_rate`, which is never zero.
    """
    xs, ys = _positive("x", x), _positive("y", y)
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise ConfigError(f"x and y: shapes {xs.shape} and {ys.shape}; expected two lists of equal length")
    if len(xs) < 2:
        raise ConfigError(f"x: a power law needs at least 2 points, not {len(xs)}")
    log_x, log_y = np.log(xs), np.log(ys)
    # Centred, so that the exponent does not depend on the unit of x, not even in its rounding.
    centred = log_x - log_x.mean()
    squares = float(centred @ centred)
    if xs.min() == xs.max():
        raise ConfigError(f"x: all {len(xs)} points are at {xs[0]:g}; a power law needs two different ones")
    slope = float(centred @ (log_y - log_y.mean())) / squares
    intercept = float(log_y.mean() - slope * log_x.mean())
    residuals = log_y - log_y.mean() - slope * centred
    log_b_error, c_error = _standard_errors(residuals, squares, float(log_x.mean()))
    return PowerLaw(
        b=float(np.exp(intercept)),
        c=-slope,
        log_b_error=log_b_error,
        c_error=c_error,
        rmsle=float(np.sqrt(np.mean(residuals**2))),
        num_points=len(xs),
        x_range=(float(xs.min()), float(xs.max())),
    )


def _standard_errors(
    residuals: Floats, squares: float, mean_log_x: float
) -> tuple[float | None, float | None]:
    """(of log b, of c), from residuals (n,) with n - 2 degrees of freedom."""
    n = len(residuals)
    if n == 2:
        return None, None
    variance = float(residuals @ residuals) / (n - 2)
    return float(np.sqrt(variance * (1 / n + mean_log_x**2 / squares))), float(np.sqrt(variance / squares))


def _positive(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        where = f"{name}{''.join(f'[{i}]' for i in place)}"
        raise ConfigError(f"{where} is {array[place]:g}; a power law takes positive, finite numbers")
    return array


def _check_counts(errors: int, n: int) -> None:
    if n < 1:
        raise ConfigError(f"n is {n}; a share needs at least one image")
    if not 0 <= errors <= n:
        raise ConfigError(f"errors is {errors}, of n = {n} images; expected 0 to {n}")


def _check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95")
    return confidence
