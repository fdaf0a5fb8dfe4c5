"""`vitscale fit` of curves in one variable: laws, forecasts, backtests; as JSON and as tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from pipelines.scaling.backtest import (
    DEFAULT,
    ESTIMATORS,
    HELD,
    LAST,
    M4,
    QUICK,
    Law,
    Score,
    score_laws,
    tasks_of,
)
from pipelines.scaling.breakeven import BreakEven, break_even
from pipelines.scaling.curves import Curve
from pipelines.scaling.ensemble import Ensemble, fit_ensemble
from pipelines.scaling.fits import Fit, fit_form
from pipelines.scaling.forms import FORMS
from pipelines.scaling.frontier import FRONTIER, fit_frontier
from pipelines.scaling.intervals import Forecast
from pipelines.scaling.measured import Curves
from pipelines.scaling.released import fit_released
from workers.errors import ConfigError

LAWS = (DEFAULT, *FORMS, FRONTIER)
"""Laws in one variable that have intervals."""


@dataclass(frozen=True, kw_only=True)
class CurveFit:
    curve: Curve
    law: Ensemble | Fit
    at: tuple[float, ...]
    """x of the forecasts."""
    forecast: Forecast

    def parameters(self) -> dict[str, tuple[float, float]]:
        """Value and standard error by name; x counts in units of the curve's largest."""
        if isinstance(self.law, Ensemble):
            return self.law.parameters()
        values = zip(self.law.parameters.tolist(), self.law.errors.tolist(), strict=True)
        return dict(zip(self.law.form.parameters, values, strict=True))

    def is_beyond(self, x: float) -> bool:
        return x > self.curve.horizon * float(self.curve.x[-1]) * (1 + 1e-9)


@dataclass(frozen=True, kw_only=True)
class CurveReport:
    points: Curves
    law: str
    confidence: float
    fits: list[CurveFit]
    backtest: dict[str, list[Score]]
    """By cut; empty if none was asked for."""
    tasks: dict[str, int]
    """Of each cut."""
    break_even: list[BreakEven]


def report_curves(
    points: Curves,
    *,
    law: str,
    predict: Sequence[float],
    confidence: float,
    extrapolate: bool,
    backtest: bool,
    against: Sequence[str],
    families: tuple[str, str] | None = None,
) -> CurveReport:
    """ConfigError for a forecast beyond what backtests reach, unless told to `extrapolate`."""
    fits = [_fit(curve, law, predict, confidence) for curve in points.curves]
    beyond = [(fit, x) for fit in fits for x in fit.at if fit.is_beyond(x)]
    if beyond and not extrapolate:
        fit, x = beyond[0]
        raise ConfigError(
            f"--predict {x:g} is {x / fit.curve.x[-1]:.3g} times the largest x of {fit.curve.name}; "
            "backtests on it reach "
            f"{fit.curve.horizon:g} times, and nothing is known of what is farther. --extrapolate "
            "forecasts all the same"
        )
    scores: dict[str, list[Score]] = {}
    counts: dict[str, int] = {}
    if backtest:
        names = dict.fromkeys([law, *QUICK, *against])
        for cut, tasks in tasks_of(points.curves).items():
            laws: dict[str, Sequence[Law]] = {
                name: fit_released([(task.x, task.y) for task in tasks])
                if name == M4
                else [ESTIMATORS[name](task.x, task.y) for task in tasks]
                for name in names
            }
            scores[cut], counts[cut] = score_laws(tasks, laws, confidence), len(tasks)
    return CurveReport(
        points=points,
        law=law,
        confidence=confidence,
        fits=fits,
        backtest=scores,
        tasks=counts,
        break_even=_break_even(points.curves, families, confidence) if families else [],
    )


def _break_even(curves: Sequence[Curve], families: tuple[str, str], confidence: float) -> list[BreakEven]:
    """Of every two curves whose names differ in the two families alone."""
    first, second = families
    by_name = {curve.name: curve for curve in curves}
    pairs = [
        (curve, by_name[other])
        for name, curve in by_name.items()
        if first in name.split() and (other := _exchanged(name, first, second)) in by_name
    ]
    if not pairs:
        raise ConfigError(
            f"--break-even {first},{second}: no two curves differ in these words alone; there are "
            f"{', '.join(by_name)}"
        )
    return [break_even(one, other, confidence=confidence) for one, other in pairs]


def _exchanged(name: str, first: str, second: str) -> str:
    return " ".join(second if word == first else word for word in name.split())


def _fit(curve: Curve, law: str, predict: Sequence[float], confidence: float) -> CurveFit:
    fitted: Ensemble | Fit
    if law == DEFAULT:
        fitted = fit_ensemble(curve.x, curve.y, curve.seeds)
    elif law == FRONTIER:
        fitted = fit_frontier(curve.x, curve.y)
    else:
        fitted = fit_form(FORMS[law], curve.x, curve.y)
    at = tuple(predict) or tuple(
        float(curve.x[-1]) * times for times in (2.0, 4.0, 10.0) if times <= curve.horizon
    )
    return CurveFit(
        curve=curve, law=fitted, at=at, forecast=fitted.forecast(np.array(at, dtype=float), confidence)
    )


def curve_json(report: CurveReport) -> dict[str, Any]:
    """Plain values; NaN is None."""
    return {
        "law": report.law,
        "x": report.points.x,
        "y": report.points.y,
        "confidence": report.confidence,
        "curves": [_fit_json(fit) for fit in report.fits],
        "refused": report.points.refused,
        "backtest": {
            cut: {
                "tasks": report.tasks[cut],
                "estimators": [
                    {
                        "estimator": score.estimator,
                        "rmsle": score.mean,
                        "rmsle_geometric": score.geometric_mean,
                        "share_won": score.share,
                        "coverage": score.coverage,
                        "nominal": report.confidence if score.coverage is not None else None,
                    }
                    for score in scores
                ],
            }
            for cut, scores in report.backtest.items()
        },
        "break_even": [{**vars(one), "sentence": one.sentence()} for one in report.break_even],
        "notes": report.points.notes,
    }


def _fit_json(fit: CurveFit) -> dict[str, Any]:
    rows = zip(fit.at, fit.forecast.median, fit.forecast.low, fit.forecast.high, strict=True)
    return {
        "curve": fit.curve.name,
        "points": len(fit.curve.x),
        "x_range": [float(fit.curve.x[0]), float(fit.curve.x[-1])],
        "horizon": fit.curve.horizon,
        "noise": fit.law.noise,
        "parameters": {name: value for name, (value, _) in fit.parameters().items()},
        "standard_errors": {
            name: None if math.isnan(error) else error for name, (_, error) in fit.parameters().items()
        },
        "predictions": [
            {
                "x": x,
                "median": float(median),
                "low": float(low),
                "high": float(high),
                "beyond_backtests": fit.is_beyond(x),
            }
            for x, median, low, high in rows
        ],
        "notes": list(fit.curve.notes),
    }


def curve_tables(report: CurveReport) -> Group:
    nominal = f"{report.confidence:.0%}"
    table = Table("curve", "points", f"largest {report.points.x}", f"{report.points.y} there", box=None)
    times = max((len(fit.at) for fit in report.fits), default=0)
    for number in range(times):
        table.add_column(f"forecast {number + 1} ({nominal} interval)")
    for fit in report.fits:
        last = float(fit.curve.x[-1])
        table.add_row(
            fit.curve.name,
            f"{len(fit.curve.x)}",
            f"{last:.3g}",
            f"{float(fit.law.predict(np.array([last]))[0]):.4g}",
            *_forecasts(fit),
        )
    lines = [f"not fitted, {name}: {reason}" for name, reason in report.points.refused.items()]
    lines += [f"note: {note}" for note in report.points.notes]
    lines += [f"note, {fit.curve.name}: {note}" for fit in report.fits for note in fit.curve.notes]
    lines += [
        f"no forecast, {fit.curve.name}: too few points below x_max / 2 to backtest one"
        for fit in report.fits
        if not fit.at
    ]
    if any(fit.is_beyond(x) for fit in report.fits for x in fit.at):
        lines.append("* beyond what backtests reach: the interval was never tried so far out")
    lines += [f"break-even: {one.sentence()}" for one in report.break_even]
    return Group(table, *lines, *(_score_table(report, cut) for cut in report.backtest))


def _forecasts(fit: CurveFit) -> list[str]:
    rows = zip(fit.at, fit.forecast.median, fit.forecast.low, fit.forecast.high, strict=True)
    return [
        f"{median:.4g} ({low:.4g} to {high:.4g}) at {x:.3g}{'*' if fit.is_beyond(x) else ''}"
        for x, median, low, high in rows
    ]


def _score_table(report: CurveReport, cut: str) -> Table:
    what = {HELD: "held-out points", LAST: LAST}.get(cut, f"fitted to x <= {cut}")
    table = Table(
        "\nestimator",
        "\nRMSLE",
        "\ngeometric mean",
        "\nshare of tasks won",
        f"coverage\nof nominal {report.confidence:.0%}",
        box=None,
        title=f"\nBacktest, {what}: {report.tasks[cut]} curves",
        title_justify="left",
    )
    for score in sorted(report.backtest[cut], key=lambda score: score.mean):
        table.add_row(
            score.estimator,
            f"{score.mean:.4f}",
            f"{score.geometric_mean:.4f}",
            f"{score.share:.0%}",
            "" if score.coverage is None else f"{score.coverage:.0%}",
        )
    return table
