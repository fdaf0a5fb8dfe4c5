"""`vitscale fit --law shape`: a law in a dimension of the shape and compute, and what budgets want; as JSON
and as tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from pipelines.scaling.allocate import HORIZON
from pipelines.scaling.later_runs import BOOTSTRAPS, LaterScore, later_table, score_later
from pipelines.scaling.measured import ShapePoints
from pipelines.scaling.shape import ShapeFit, ShapeRuns, check_shapes, fit_shape
from workers.errors import ConfigError, DataError

SHARES = {"FLOPs <= t_max/2": 2.0, "FLOPs <= t_max/4": 4.0, "FLOPs <= t_max/10": 10.0}


@dataclass(frozen=True, kw_only=True)
class BestShape:
    """What a budget wants."""

    flops: float
    best: float | None
    """None: the loss falls or rises with the dimension throughout."""
    low: float
    high: float
    """Ends of the interval, of a bootstrap."""
    inside: float
    """Share of draws whose best lies between the smallest and the largest that was measured."""
    beyond_backtests: bool


@dataclass(frozen=True, kw_only=True)
class ShapeReport:
    points: ShapePoints
    fit: ShapeFit
    confidence: float
    bootstraps: int
    best: list[BestShape]
    backtest: list[LaterScore]
    skipped: list[str]
    """Backtests that the runs do not allow, and why."""


def report_shapes(
    points: ShapePoints,
    *,
    bootstraps: int,
    budgets: Sequence[float],
    confidence: float,
    extrapolate: bool,
    backtest: bool,
    progress: Callable[[int, int], None] | None = None,
) -> ShapeReport:
    """Without budgets that of the largest run and twice, four and ten times it. ConfigError for one beyond
    what backtests reach, unless told to `extrapolate`."""
    runs = points.runs
    largest = float(runs.flops.max())
    far = [budget for budget in budgets if budget > HORIZON * largest * (1 + 1e-9)]
    if far and not extrapolate:
        raise ConfigError(
            f"--budget {far[0]:g} is {far[0] / largest:.3g} times the largest run's FLOPs; backtests reach "
            f"{HORIZON:g} times. --extrapolate forecasts all the same"
        )
    fit = fit_shape(runs, bootstraps=bootstraps, progress=progress)
    wanted = list(budgets) or [largest * times for times in (1.0, 2.0, 4.0, 10.0)]
    scores, skipped = _backtest(runs, confidence) if backtest else ([], [])
    return ShapeReport(
        points=points,
        fit=fit,
        confidence=confidence,
        bootstraps=bootstraps,
        best=[_best(fit, runs, budget, confidence) for budget in wanted],
        backtest=scores,
        skipped=skipped,
    )


def _best(fit: ShapeFit, runs: ShapeRuns, budget: float, confidence: float) -> BestShape:
    draws = np.array([law.best(budget) for law in fit.draws])
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="closest_observation").tolist()
    best = fit.law.best(budget)
    inside = (draws >= runs.shape.min()) & (draws <= runs.shape.max())
    return BestShape(
        flops=budget,
        best=best if np.isfinite(best) and best > 0 else None,
        low=low,
        high=high,
        inside=float(inside.mean()),
        beyond_backtests=budget > HORIZON * float(runs.flops.max()) * (1 + 1e-9),
    )


def _backtest(runs: ShapeRuns, confidence: float) -> tuple[list[LaterScore], list[str]]:
    scores, skipped = [], []
    for name, times in SHARES.items():
        early = runs.flops <= runs.flops.max() / times
        try:
            check_shapes(runs.take(early))
        except DataError as error:
            skipped.append(f"no backtest with {name}: {error}")
            continue
        scores.append(_score(name, runs, early, confidence))
    return scores, skipped


def _score(name: str, runs: ShapeRuns, early: np.ndarray, confidence: float) -> LaterScore:
    before, later = runs.take(early), runs.take(~early)
    found = fit_shape(before, bootstraps=BOOTSTRAPS).forecast(later.shape, later.flops, confidence)
    return score_later(name, before.loss, found, later.loss)


def shape_json(report: ShapeReport) -> dict[str, Any]:
    points = report.points
    return {
        "law": "shape",
        "shape": points.shape,
        "flops": points.flops,
        "y": points.y,
        "runs": len(points.runs),
        "units": {"shape": report.fit.law.unit_shape, "flops": report.fit.law.unit_flops},
        "parameters": report.fit.law.values(),
        "standard_errors": report.fit.errors(),
        "bootstraps": report.bootstraps,
        "noise": report.fit.noise,
        "confidence": report.confidence,
        "predictions": [
            {**vars(one), "low": _finite(one.low), "high": _finite(one.high)} for one in report.best
        ],
        "backtest": [{**vars(score), "nominal": report.confidence} for score in report.backtest],
        "notes": [*points.notes, *report.skipped],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def shape_tables(report: ShapeReport) -> Group:
    points, errors = report.points, report.fit.errors()
    head = (
        f"{points.y} = alpha x^-a + (beta x^b + xi) t^-c + eps; x: {points.shape} in units of "
        f"{report.fit.law.unit_shape:.4g}, t: {points.flops} in units of {report.fit.law.unit_flops:.4g}; "
        f"{len(points.runs)} runs, noise {report.fit.noise:.2%}. The best {points.shape} grows as t^s"
    )
    table = Table("parameter", "value", f"standard error ({report.bootstraps} bootstraps)", box=None)
    for name, value in report.fit.law.values().items():
        table.add_row(name, f"{value:.4g}", f"{errors[name]:.2g}")
    parts: list[Any] = [head, *(f"note: {note}" for note in points.notes), table, _best_table(report)]
    if report.backtest:
        parts.append(later_table(report.backtest, report.confidence))
    return Group(*parts, *report.skipped)


def _best_table(report: ShapeReport) -> Table:
    shape, measured = report.points.shape, report.points.runs.shape
    table = Table(
        "\nFLOPs",
        f"\nbest {shape}",
        f"\n{report.confidence:.0%} interval",
        f"best lies in what was\nmeasured, {measured.min():.4g} to {measured.max():.4g}",
        box=None,
    )
    for one in report.best:
        table.add_row(
            f"{one.flops:.3g}{'*' if one.beyond_backtests else ''}",
            "none: it falls or rises throughout" if one.best is None else f"{one.best:.4g}",
            f"{one.low:.4g} to {one.high:.4g}",
            f"{one.inside:.0%}",
        )
    if any(one.beyond_backtests for one in report.best):
        table.caption = "* beyond what backtests reach: the intervals were never tried so far out"
    return table
