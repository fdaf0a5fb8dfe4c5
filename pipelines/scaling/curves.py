"""A scaling curve: losses at ascending scales, checked before anything is fitted to them.

What no law of this package can describe is refused here with the reason, rather than fitted to a confident
number: too few scales, values without a logarithm, accuracy in place of error, curves that rise again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from workers.errors import DataError

Floats = NDArray[np.float64]

MIN_SCALES = 4
"""Distinct x: three parameters and one degree of freedom."""
RISE = 0.03
"""A rise of log loss below this is never called one: seeds differ by as much."""
RISE_SIGMAS = 4.0
SHORT = 12
"""Scales. Of fewer, second differences are mostly the curve's bend, which would pass for noise."""
CLIMB = 0.1
"""A rise of log loss, in two steps or more at a short curve's end, that is not taken for chance."""
RECENT = 8.0
"""A rise matters where x is more than x_max / 8: recency weights leave nothing of what is before."""
MAX_CUT = 4.0
"""Backtests go to x_max / 4 at most, so forecasts do not reach farther than 4 x_max unasked."""


def _nothing() -> Floats:
    return np.empty(0)


@dataclass(frozen=True, kw_only=True)
class Curve:
    name: str
    x: Floats
    """(n,), ascending; equal ones are repeated runs."""
    y: Floats
    """(n,), error or loss, positive."""
    seeds: NDArray[np.int64] | None = None
    """(n,), a number for each run's seed, where several are known."""
    held_x: Floats = field(default_factory=_nothing)
    """(m,), of points that no fit sees."""
    held_y: Floats = field(default_factory=_nothing)
    max_cut: float = MAX_CUT
    notes: tuple[str, ...] = ()
    """What a reader of the fit should know of its data."""

    @property
    def horizon(self) -> float:
        """Times x_max to which forecasts can be tried on the curve's beginning: 4, 2, or 1 (not at all)."""
        for cut in (self.max_cut, MAX_CUT, 2.0):
            if len(np.unique(self.x[self.x <= self.x[-1] / cut])) >= MIN_SCALES:
                return cut
        return 1.0


def make_curve(
    name: str,
    x: ArrayLike,
    y: ArrayLike,
    *,
    seeds: Sequence[str] | None = None,
    held_x: ArrayLike = (),
    held_y: ArrayLike = (),
    falls: bool = True,
) -> Curve:
    """Sorted and checked; DataError names what is wrong with it and what to do.

    `falls`: refused if it rises where it counts; many models' points together may.
    """
    xs, ys = _checked(name, "x", x), _checked(name, "loss", y)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise DataError(f"{name}: {xs.shape} scales and {ys.shape} losses; expected two lists of one length")
    if not len(xs):
        raise DataError(f"{name}: no points to fit to")
    numbers = np.unique(seeds, return_inverse=True)[1] if seeds is not None else np.zeros(len(xs), dtype=int)
    xs, ys, numbers, notes = _without_copies(xs, ys, numbers)
    held_xs, held_ys = _checked(name, "x", held_x), _checked(name, "loss", held_y)
    scales = len(np.unique(xs))
    if scales == 1:
        raise DataError(f"{name}: all points are at x = {xs[0]:g}; a law needs at least {MIN_SCALES} scales")
    if scales < MIN_SCALES:
        raise DataError(f"{name}: {scales} different x; a law needs at least {MIN_SCALES}")
    order = np.argsort(held_xs, kind="stable")
    curve = Curve(
        name=name,
        x=xs,
        y=ys,
        seeds=numbers if len(np.unique(numbers)) > 1 else None,
        held_x=held_xs[order],
        held_y=held_ys[order],
        notes=tuple(notes),
    )
    return _checked_shape(curve) if falls else curve


def _checked(name: str, what: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        hint = "leave out runs that failed; an error of 0 needs more validation images"
        raise DataError(
            f"{name}: {what} of point {at + 1} is {array[at]:g}; laws take positive, finite numbers ({hint})"
        )
    return array


def _without_copies(
    x: Floats, y: Floats, seeds: NDArray[np.int64]
) -> tuple[Floats, Floats, NDArray[np.int64], list[str]]:
    """Sorted by x, each point once: the same run exported twice is no second observation."""
    points = np.unique(np.stack([x, y, seeds], axis=1), axis=0)
    notes = []
    if copies := len(x) - len(points):
        notes.append(f"{copies} exact copies of points left out")
    xs, ys = points[:, 0], points[:, 1]
    if repeated := len(xs) - len(np.unique(xs)):
        notes.append(f"{repeated} points share their x with another: taken as repeated runs")
    return xs, ys, points[:, 2].astype(np.int64), notes


def _checked_shape(curve: Curve) -> Curve:
    """Refused if the loss rises where it counts; noted if it did so long before."""
    scales = np.unique(curve.x)
    level = np.array([np.log(curve.y[curve.x == x]).mean() for x in scales])
    if np.corrcoef(np.log(scales), level)[0, 1] > 0.5 and level[-1] > level[0]:
        raise DataError(
            f"{curve.name}: the values rise with x, as accuracy does; laws take error or loss "
            f"(--accuracy turns accuracy into error)"
        )
    peak = _rise(level)
    if peak is None:
        return curve
    if scales[peak] > scales[-1] / RECENT:
        raise DataError(
            f"{curve.name}: the loss rises again before x = {scales[peak]:.3g} (overfitting, or double "
            f"descent); every law here falls throughout, so none can say what comes next. "
            f"Fit a part that falls, or the best loss so far; if it is chance, more seeds"
        )
    note = f"the loss rose before x = {scales[peak]:.3g}, far from the end"
    return replace(curve, notes=(*curve.notes, note))


def _climb(level: Floats) -> float:
    """How far log losses (n,) rise at their end, step by step; 0 if the last step alone does, or none."""
    steps = np.diff(level)
    falls = np.flatnonzero(steps <= 0)
    rising = steps[falls[-1] + 1 :] if len(falls) else steps
    return float(rising.sum()) if len(rising) > 1 else 0.0


def _rise(level: Floats) -> int | None:
    """Where log losses (n,) are most above the best falling curve, if that is more than noise."""
    if len(level) < MIN_SCALES:
        return None
    falling = isotonic_regression(level, increasing=False).x
    # A mean over neighbours, so that one unlucky run is no rise.
    smooth = np.convolve(level - falling, np.ones(3) / 3, mode="same") if len(level) > 6 else level - falling
    if len(level) <= SHORT and _climb(level) > CLIMB:
        return len(level) - 1
    peak = int(np.argmax(smooth))
    # Second differences of a smooth curve vanish, so what is left of them is noise.
    noise = 1.4826 * float(np.median(np.abs(np.diff(level, 2)))) / np.sqrt(6)
    return peak if smooth[peak] > max(RISE, RISE_SIGMAS * noise) else None
