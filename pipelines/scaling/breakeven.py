"""Where one family of models overtakes another as data or compute grow: ViT and CNN, say.

Both curves are drawn together, many times. Where both were measured a draw is a falling curve through
resampled points; beyond that it follows a draw of the law's posterior and bends by the structural part, each
family by its own: between a ViT and a ResNet on the same task these errors were uncorrelated (-0.06, -0.15,
-0.18 at x_max / 2, / 4, / 8 inside the `fit` parts). Break-even is where the first family begins to stay
better up to the horizon. How many draws have none is told, and one-sided bounds; a bare point would mislead,
since the crossing of two flat curves is badly determined (docs/scaling-laws.md).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from pipelines.scaling.curves import Curve, Floats
from pipelines.scaling.ensemble import Ensemble, fit_ensemble
from pipelines.scaling.intervals import STRUCTURAL
from workers.errors import DataError

DRAWS = 1000
GRID = 400
HORIZON = 4.0
"""Times the shorter curve's x_max."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """In units of x. None: not within the range, for that share of draws."""

    first: str
    second: str
    start: float
    """Where both curves begin."""
    measured: float
    """Where the shorter one ends: what is beyond is forecast."""
    horizon: float
    """Up to where a crossing was looked for."""
    median: float | None
    low: float | None
    """Ends of the interval; None where that quantile is `never`."""
    high: float | None
    confidence: float
    not_before: float
    """With `confidence`, one-sided: the first is not better for good below this x."""
    not_after: float | None
    """With `confidence`, one-sided: the first is better from this x on; None: not within the horizon."""
    never: float
    """Share of draws in which the first is not better at the horizon."""
    always: float
    """Share of draws in which it is better from the start on."""

    def sentence(self) -> str:
        """What may be said of it."""
        if self.always > self.confidence:
            return f"{self.first} is better than {self.second} throughout, from {_number(self.start)} on"
        if self.never > self.confidence:
            return f"{self.first} does not overtake {self.second} up to {_number(self.horizon)}"
        centre = f"most likely near {_number(self.median)}, " if self.median is not None else ""
        low, high = _place(self.low, "the start"), _place(self.high, f"never up to {_number(self.horizon)}")
        return (
            f"{self.first} overtakes {self.second} {centre}between {low} and {high} ({self.confidence:.0%}); "
            f"no crossing up to {_number(self.horizon)}: {self.never:.0%}; "
            f"not before {_number(self.not_before)} ({self.confidence:.0%}, one-sided)"
        )


def _place(x: float | None, otherwise: str) -> str:
    return otherwise if x is None else _number(x)


def _number(x: float) -> str:
    return f"{x:,.0f}" if 100 <= x < 1e6 else f"{x:.3g}"


def break_even(
    first: Curve, second: Curve, *, confidence: float, horizon: float = HORIZON, draws: int = DRAWS
) -> BreakEven:
    """DataError if the curves share no range of x."""
    start = float(max(first.x[0], second.x[0]))
    measured = float(min(first.x[-1], second.x[-1]))
    if start >= measured:
        raise DataError(f"{first.name} and {second.name} share no range of x: nothing to compare")
    end = horizon * measured
    x = np.geomspace(start, end, GRID)
    rng = np.random.default_rng(SEED)
    gap = _draws(first, x, draws, rng) - _draws(second, x, draws, rng)
    crossing = _crossings(gap, x)
    tail = (1 - confidence) / 2
    median, low, high, not_before, not_after = (
        float(np.quantile(crossing, q, method="closest_observation"))
        for q in (0.5, tail, 1 - tail, 1 - confidence, confidence)
    )

    def inside(value: float) -> float | None:
        return value if np.isfinite(value) and value > start else None

    return BreakEven(
        first=first.name,
        second=second.name,
        start=start,
        measured=measured,
        horizon=end,
        median=inside(median),
        low=inside(low),
        high=inside(high),
        confidence=confidence,
        not_before=min(not_before, end),
        not_after=not_after if np.isfinite(not_after) else None,
        never=float(np.mean(np.isinf(crossing))),
        always=float(np.mean(crossing <= start)),
    )


def _crossings(gap: Floats, x: Floats) -> Floats:
    """Per draw (draws,) the x from which on the gap (draws, n) is negative; inf if it never is."""
    worse = gap >= 0
    last = worse.shape[1] - 1 - worse[:, ::-1].argmax(axis=1)  # the last place where the first is worse
    found = x[np.minimum(last + 1, len(x) - 1)]
    found = np.where(last == len(x) - 1, np.inf, found)
    return np.where(worse.any(axis=1), found, x[0])


def _draws(curve: Curve, x: Floats, count: int, rng: np.random.Generator) -> Floats:
    """log y (draws, n) at ascending x (n,)."""
    law = fit_ensemble(curve.x, curve.y, curve.seeds)
    logs = law.draw_logs(x, count, rng)
    beyond = np.maximum(np.log(x / law.x_max), 0.0)
    logs = logs + np.outer(rng.normal(0, STRUCTURAL, count), law.end_slope * beyond)
    if law.resampled:
        seeds = np.std([np.log(other.predict(x[-1:])) for other in law.resampled], ddof=1)
        logs = logs + rng.normal(0, seeds, (count, 1))
    measured = x <= curve.x[-1]
    logs[:, measured] = _measured(curve, law, x[measured], count, rng)
    return np.asarray(logs)


def _measured(curve: Curve, law: Ensemble, x: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Falling curves through the points with noise added anew, log y (count, n) at x (n,)."""
    scales, places = np.unique(curve.x, return_inverse=True)
    level = np.bincount(places, np.log(curve.y)) / np.bincount(places)
    fallen = isotonic_regression(level, increasing=False).x
    noise = max(float(np.std(level - fallen)), law.noise / 2)
    found = np.empty((count, len(x)))
    for row in range(count):
        again = isotonic_regression(fallen + rng.normal(0, noise, len(scales)), increasing=False).x
        found[row] = np.interp(np.log(x), np.log(scales), again)
    return found
