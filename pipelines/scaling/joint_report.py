"""`vitscale fit --law chinchilla`: a law in size and data, backtests, what budgets buy; as JSON and as
tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from pipelines.scaling.allocate import HORIZON, Allocation, allocate, optimum
from pipelines.scaling.curves import Floats
from pipelines.scaling.joint import MIN_RUNS, JointFit, Runs, fit_joint, rises
from pipelines.scaling.later_runs import BOOTSTRAPS, LaterScore, later_table, score_later
from pipelines.scaling.measured import JointPoints
from pipelines.scaling.next_run import Candidate, grid, next_runs

SHOWN = 5
"""Candidates for the next run."""


@dataclass(frozen=True, kw_only=True)
class JointReport:
    points: JointPoints
    fit: JointFit
    confidence: float
    bootstraps: int
    allocations: list[Allocation]
    next: list[Candidate]
    """The best candidates for the next run; empty if none was asked for."""
    backtest: list[LaterScore]
    skipped: list[str]
    """Backtests that the runs do not allow, and why."""


def report_runs(
    points: JointPoints,
    *,
    bootstraps: int,
    clusters: bool,
    budgets: Sequence[float],
    confidence: float,
    extrapolate: bool,
    backtest: bool,
    next_budget: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> JointReport:
    """`clusters`: whole models are drawn, rather than runs."""
    labels = np.array(points.labels) if clusters else None
    fit = fit_joint(points.runs, bootstraps=bootstraps, clusters=labels, progress=progress)
    for name in rises(points.runs):
        said = f"the losses rise with {name}, where this law falls: its {name} term says nothing"
        points = replace(points, notes=[*points.notes, said])
    compute = points.flops_factor * points.runs.size * points.runs.data
    allocations = [
        allocate(
            fit,
            budget,
            flops_factor=points.flops_factor,
            largest=float(compute.max()),
            confidence=confidence,
            extrapolate=extrapolate,
        )
        for budget in budgets
    ]
    ranked: list[Candidate] = []
    if next_budget is not None:
        product = max([*budgets, float(compute.max()) * HORIZON]) / points.flops_factor
        ranked = next_runs(
            fit,
            optimum(fit.law, product),
            grid(points.runs.size, points.runs.data),
            flops_factor=points.flops_factor,
            budget=next_budget,
        )[:SHOWN]
    scores, skipped = _backtest(points, compute, confidence) if backtest else ([], [])
    return JointReport(
        points=points,
        fit=fit,
        confidence=confidence,
        bootstraps=bootstraps,
        allocations=allocations,
        next=ranked,
        backtest=scores,
        skipped=skipped,
    )


def _backtest(points: JointPoints, compute: Floats, confidence: float) -> tuple[list[LaterScore], list[str]]:
    runs = points.runs
    tests = {
        "largest size left out": runs.size < runs.size.max() * (1 - 1e-3),
        "compute <= C_max/2": compute <= compute.max() / 2,
        "compute <= C_max/4": compute <= compute.max() / 4,
        "compute <= C_max/10": compute <= compute.max() / 10,
    }
    scores, skipped = [], []
    for name, early in tests.items():
        fewest = min(len(np.unique(values[early])) for values in (runs.size, runs.data))
        if early.sum() < MIN_RUNS or fewest < 3 or early.all():
            skipped.append(f"no backtest with {name}: {early.sum()} runs would be left to fit")
            continue
        scores.append(_score(name, runs, early, confidence))
    return scores, skipped


def _score(name: str, runs: Runs, early: np.ndarray, confidence: float) -> LaterScore:
    before, later = runs.take(early), runs.take(~early)
    fit = fit_joint(before, bootstraps=BOOTSTRAPS)
    found = fit.forecast(later.size, later.data, later.unique, confidence)
    return score_later(name, before.loss, found, later.loss)


def joint_json(report: JointReport) -> dict[str, Any]:
    points = report.points
    return {
        "law": "chinchilla",
        "size": points.size,
        "data": points.data,
        "y": points.y,
        "rows": points.rows,
        "runs": len(points.runs),
        "excluded": points.excluded,
        "parameters": report.fit.law.values(),
        "standard_errors": report.fit.errors(),
        "bootstraps": report.bootstraps,
        "objective": report.fit.law.objective,
        "rmsle": report.fit.law.rmsle,
        "noise": report.fit.noise,
        "confidence": report.confidence,
        "predictions": [vars(allocation) for allocation in report.allocations],
        "next_run": [{**vars(one), "gain_per_flop": one.gain_per_flop} for one in report.next],
        "backtest": [{**vars(score), "nominal": report.confidence} for score in report.backtest],
        "notes": [*points.notes, *report.skipped],
    }


def joint_tables(report: JointReport) -> Group:
    errors = report.fit.errors()
    table = Table("parameter", "value", f"standard error ({report.bootstraps} bootstraps)", box=None)
    for name, value in report.fit.law.values().items():
        table.add_row(name, f"{value:.5g}", f"{errors[name]:.3g}")
    points = report.points
    head = (
        f"{points.y} = E + A size^-alpha + B data^-beta; size: {points.size}, data: {points.data}; "
        f"{len(points.runs)} runs of {points.rows} rows, RMSLE {report.fit.law.rmsle:.4f}"
    )
    parts: list[Any] = [head, *(f"note: {note}" for note in points.notes), table]
    if report.allocations:
        parts.append(_allocation_table(report))
    parts += [f"next run: {report.next[0].reason}"] if report.next else []
    if report.backtest:
        parts.append(later_table(report.backtest, report.confidence))
    return Group(*parts, *report.skipped)


def _allocation_table(report: JointReport) -> Table:
    nominal = f"{report.confidence:.0%} interval"
    table = Table(
        "\nFLOPs",
        "\nbest size",
        f"\n{nominal}",
        "\ndata",
        f"\n{nominal}",
        f"\n{report.points.y}",
        f"\n{nominal}",
        box=None,
    )
    for one in report.allocations:
        table.add_row(
            f"{one.flops:.3g}{'*' if one.beyond_backtests else ''}",
            f"{one.size:.3g}",
            f"{one.size_low:.3g} to {one.size_high:.3g}",
            f"{one.data:.3g}",
            f"{one.data_low:.3g} to {one.data_high:.3g}",
            f"{one.loss:.4g}",
            f"{one.loss_low:.4g} to {one.loss_high:.4g}",
        )
    if any(one.beyond_backtests for one in report.allocations):
        table.caption = "* beyond what backtests reach: the intervals were never tried so far out"
    return table
