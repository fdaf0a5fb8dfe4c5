"""Intervals of forecasts: what is added up, and the part for what no fit knows."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from pipelines.scaling.curves import Floats
from workers.errors import ConfigError

STRUCTURAL = 0.3
"""d of `sd = d * |end slope| * log(x / x_max)`, in log loss. Of the grid .1, .2, .3, .4: at the horizon that
goes worst in backtests inside the `fit` parts of 36 learning curves (from x_max / 8) nominal 90 % covered 67,
79, 89 and 94 %."""
CONFIDENCE = 0.9


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """At n places: median and the ends of the interval, (n,) each, for the loss of a single run."""

    median: Floats
    low: Floats
    high: Floats
    log_sd: Floats
    """Standard deviation of log loss."""


def forecast(
    median: Floats, log_variance: Floats, confidence: float = CONFIDENCE, freedom: int | None = None
) -> Forecast:
    """Log-normal about the median; with `freedom` Student's t in its place, as few points tell their own
    noise badly."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.9")
    sd = np.sqrt(log_variance)
    tail = (1 + confidence) / 2
    width = np.exp(float(ndtri(tail) if freedom is None else stdtrit(freedom, tail)) * sd)
    return Forecast(median=median, low=median / width, high=median * width, log_sd=sd)


def structural_variance(end_slope: float, x: Floats, x_max: float, share: float = STRUCTURAL) -> Floats:
    """Of log loss (n,) at x (n,): real curves bend away from every fitted form."""
    beyond = np.maximum(np.log(x / x_max), 0.0)
    return np.asarray((share * end_slope * beyond) ** 2)
