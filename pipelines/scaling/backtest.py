"""Backtests: laws fitted to the beginning of curves and held against their ends.

A forecast is believed as far as such forecasts were right before. Every curve is cut before its largest x, at
x_max / 2 and at x_max / 4; points that the data themselves hold out (a column `split`) are a test on which
nothing was ever chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.scaling.curves import MIN_SCALES, Curve, Floats
from pipelines.scaling.ensemble import Ensemble, fit_ensemble
from pipelines.scaling.fits import Fit, fit_form
from pipelines.scaling.forms import FORMS
from pipelines.scaling.frontier import FRONTIER, fit_frontier
from pipelines.scaling.intervals import CONFIDENCE
from pipelines.scaling.posterior import Family, fit_posterior

LAST = "largest x left out"
CUTS = {LAST: 1.0, "x_max/2": 2.0, "x_max/4": 4.0, "x_max/10": 10.0}
"""The last of frontiers alone."""
HELD = "held out"
DECIMALS = 1000
"""Shares of tasks won: errors are truncated to three decimals, so that hair's breadths are ties."""


class Law(Protocol):
    def predict(self, x: Floats) -> Floats:
        """Loss (n,) at x (n,)."""
        ...


Estimator = Callable[[Floats, Floats], Law]
"""From points (n,), (n,) to a law."""


@dataclass(frozen=True, kw_only=True)
class Task:
    curve: str
    x: Floats
    y: Floats
    later_x: Floats
    later_y: Floats


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one estimator on the tasks of one cut."""

    estimator: str
    rmsle: Floats
    """(tasks,): root mean square of log(predicted / measured); NaN where the fit failed."""
    share: float
    """Of tasks won; those who tie share."""
    coverage: float | None
    """Share of later points within the nominal interval, pooled; None without intervals."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.rmsle))

    @property
    def geometric_mean(self) -> float:
        return float(np.exp(np.mean(np.log(np.maximum(self.rmsle, 1e-6)))))


class _Flat:
    """As low as it got: the naive baseline that a law must beat."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self._level = float(np.exp(np.log(y[x >= x.max() / 1.25]).mean()))

    def predict(self, x: Floats) -> Floats:
        return np.full(len(x), self._level)


class _Octave:
    """The straight line in log-log through the last octave; through everything if few points are there."""

    def __init__(self, x: Floats, y: Floats) -> None:
        last = x >= x.max() / 2
        if len(np.unique(x[last])) < MIN_SCALES:
            last = np.full(len(x), True)
        self._slope, self._level = np.polyfit(np.log(x[last]), np.log(y[last]), 1)

    def predict(self, x: Floats) -> Floats:
        return np.asarray(np.exp(self._level + self._slope * np.log(x)))


class _One:
    """One of the default's two families."""

    def __init__(self, family: Family, x: Floats, y: Floats) -> None:
        self._posterior = fit_posterior(family, x, y)

    def predict(self, x: Floats) -> Floats:
        return np.exp(self._posterior.log_moments(x)[0])


def _form(name: str) -> Estimator:
    return lambda x, y: fit_form(FORMS[name], x, y)


DEFAULT = "ensemble"
M4 = "m4"
"""As released (released.py), fitted to all curves at once."""
NAIVE: dict[str, Estimator] = {"last value": _Flat, "last octave": _Octave}
ESTIMATORS: dict[str, Estimator] = {
    DEFAULT: fit_ensemble,
    "P": lambda x, y: _One("P", x, y),
    "L": lambda x, y: _One("L", x, y),
    **{name: _form(name) for name in FORMS},
    FRONTIER: fit_frontier,
    **NAIVE,
}
QUICK = (DEFAULT, "P", "L", "m1", *NAIVE)
"""Estimators that take milliseconds; the others search from many starts."""


def tasks_of(curves: Sequence[Curve]) -> dict[str, list[Task]]:
    """By cut; curves that are too short for one are not among its tasks."""
    found: dict[str, list[Task]] = {}
    for name, times in CUTS.items():
        found[name] = [task for curve in curves if (task := _cut(curve, times)) is not None]
    found[HELD] = [
        Task(curve=curve.name, x=curve.x, y=curve.y, later_x=curve.held_x, later_y=curve.held_y)
        for curve in curves
        if len(curve.held_x)
    ]
    return {name: tasks for name, tasks in found.items() if tasks}


def _cut(curve: Curve, times: float) -> Task | None:
    early = (curve.x < curve.x[-1]) & (curve.x <= curve.x[-1] / times)
    if times > curve.max_cut or len(np.unique(curve.x[early])) < MIN_SCALES:
        return None
    return Task(
        curve=curve.name,
        x=curve.x[early],
        y=curve.y[early],
        later_x=curve.x[~early],
        later_y=curve.y[~early],
    )


def score(
    tasks: Sequence[Task], estimators: Mapping[str, Estimator], confidence: float = CONFIDENCE
) -> list[Score]:
    """Every estimator on every task."""
    laws = {name: [estimator(task.x, task.y) for task in tasks] for name, estimator in estimators.items()}
    return score_laws(tasks, laws, confidence)


def score_laws(
    tasks: Sequence[Task], laws: Mapping[str, Sequence[Law]], confidence: float = CONFIDENCE
) -> list[Score]:
    """Laws that were fitted already, one for each task."""
    errors = {
        name: np.array(
            [rmsle(law.predict(task.later_x), task.later_y) for law, task in zip(fitted, tasks, strict=True)]
        )
        for name, fitted in laws.items()
    }
    won = dict(zip(errors, shares(np.array(list(errors.values()))), strict=True))
    return [
        Score(
            estimator=name,
            rmsle=errors[name],
            share=float(won[name]),
            coverage=_coverage(tasks, fitted, confidence),
        )
        for name, fitted in laws.items()
    ]


def rmsle(predicted: Floats, measured: Floats) -> float:
    return float(np.sqrt(np.mean((np.log(predicted) - np.log(measured)) ** 2)))


def shares(errors: Floats) -> Floats:
    """Share of tasks that each estimator wins, (estimators,), from errors (estimators, tasks).

    The rule of the notebook of Alabdulmohsin et al. 2022: truncated to three decimals, ties share, NaN counts
    as 1.
    """
    truncated = np.floor(np.nan_to_num(errors, nan=1.0) * DECIMALS)
    best = truncated == truncated.min(axis=0)
    return np.asarray((best / best.sum(axis=0)).mean(axis=1))


def _coverage(tasks: Sequence[Task], laws: Sequence[Law], confidence: float) -> float | None:
    inside = [
        within(law, task, confidence)
        for law, task in zip(laws, tasks, strict=True)
        if isinstance(law, Ensemble | Fit)
    ]
    return float(np.mean(np.concatenate(inside))) if inside else None


def within(law: Ensemble | Fit, task: Task, confidence: float) -> Floats:
    """1 for each later point of the task in its interval, else 0."""
    forecast = law.forecast(task.later_x, confidence)
    return ((forecast.low <= task.later_y) & (task.later_y <= forecast.high)).astype(float)
