"""Laws drawn: curves with bands and held-out points, sizes at equal compute."""

import functools
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.figures import BLUE, GREY, STYLE, VERMILION, to_png, to_svg
from pipelines.scaling.allocate import isoflop, optimum
from pipelines.scaling.breakeven import BreakEven
from pipelines.scaling.curve_report import CurveFit, CurveReport
from pipelines.scaling.curves import RECENT
from pipelines.scaling.ensemble import Ensemble
from pipelines.scaling.joint_report import JointReport
from pipelines.scaling.shape_report import ShapeReport

COLUMNS = 4
PANEL = (3.3, 2.6)
"""Inches of a curve's panel."""
POINTS = 200
BUDGETS = 6
"""Curves of equal compute."""


def write_figure(figure: Figure, path: Path) -> None:
    path.write_bytes(to_svg(figure) if path.suffix == ".svg" else to_png(figure))


@functools.singledispatch
def draw(report: object) -> Figure:
    """What a `fit` found."""
    raise TypeError(type(report))


@draw.register
def draw_curves(report: CurveReport) -> Figure:
    """A panel per curve: points, law, band to the last forecast; points that no fit saw are hollow. And one
    per break-even: both families, and where the first overtakes the second."""
    with matplotlib.rc_context(STYLE):
        count = len(report.fits) + len(report.break_even)
        columns = min(COLUMNS, count)
        rows = -(-count // columns)
        size = (max(PANEL[0] * columns, 4.5), max(PANEL[1] * rows, 3.2))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, fit in zip(panels, report.fits, strict=False):
            _draw_curve(panel, fit, report)
        for panel, one in zip(panels[len(report.fits) :], report.break_even, strict=False):
            _draw_break_even(panel, one, report)
        for panel in panels[count:]:
            panel.set_visible(False)
        figure.supxlabel(report.points.x)
        figure.supylabel(report.points.y)
        return figure


def _draw_curve(panel: Axes, fit: CurveFit, report: CurveReport) -> None:
    curve = fit.curve
    end = max([*fit.at, float(curve.x[-1]), *curve.held_x.tolist()])
    x = np.geomspace(_begin(fit), end, POINTS)
    found = fit.law.forecast(x, report.confidence)
    panel.fill_between(x, found.low, found.high, color=BLUE, alpha=0.18, linewidth=0)
    panel.plot(x, found.median, color=BLUE)
    panel.plot(curve.x, curve.y, ".", color=GREY, markersize=5)
    if len(curve.held_x):
        panel.plot(curve.held_x, curve.held_y, "o", mfc="none", mec=VERMILION, markersize=3, mew=0.7)
    panel.axvline(curve.x[-1], color=GREY, linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", title=curve.name)


def _begin(fit: CurveFit) -> float:
    """Where a law is drawn from: by its recency weights an ensemble has not looked at what is before."""
    first, last = float(fit.curve.x[0]), float(fit.curve.x[-1])
    return max(first, last / RECENT) if isinstance(fit.law, Ensemble) else first


def _draw_break_even(panel: Axes, one: BreakEven, report: CurveReport) -> None:
    """Its interval is shaded; it reaches the right edge where `never` may be true."""
    fits = {fit.curve.name: fit for fit in report.fits}
    for name, colour in ((one.first, BLUE), (one.second, VERMILION)):
        x = np.geomspace(_begin(fits[name]), one.horizon, POINTS)
        found = fits[name].law.forecast(x, report.confidence)
        panel.fill_between(x, found.low, found.high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(x, found.median, color=colour, label=name)
        curve = fits[name].curve
        panel.plot(curve.x, curve.y, ".", color=colour, markersize=3)
    low, high = one.low or one.start, one.high or one.horizon
    if one.never <= one.confidence:
        panel.axvspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    if one.median is not None:
        panel.axvline(one.median, color=GREY, linewidth=1.2)
    panel.axvline(one.measured, color=GREY, linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", title=f"break-even; none: {one.never:.0%}")
    panel.legend(fontsize="small")


@draw.register
def draw_runs(report: JointReport) -> Figure:
    """Loss against size at several budgets, with the best size of each."""
    points, law = report.points, report.fit.law
    compute = points.flops_factor * points.runs.size * points.runs.data
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        panel = figure.subplots()
        sizes = np.geomspace(points.runs.size.min() / 2, points.runs.size.max() * 2, POINTS)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, BUDGETS))
        budgets = np.geomspace(compute.min(), compute.max(), BUDGETS)
        nearest = np.abs(np.log(compute)[:, None] - np.log(budgets)).argmin(axis=1)
        for number, (budget, colour) in enumerate(zip(budgets, colours, strict=True)):
            panel.plot(
                sizes,
                isoflop(law, budget, sizes, points.flops_factor),
                color=colour,
                label=f"{budget:.1e} FLOPs",
            )
            own = nearest == number
            panel.plot(points.runs.size[own], points.runs.loss[own], ".", color=colour, markersize=4)
            best, data = optimum(law, budget / points.flops_factor)
            panel.plot(
                best, law.predict(np.array([best]), np.array([data])), "*", color=VERMILION, markersize=9
            )
        panel.set(xscale="log", yscale="log", xlabel=points.size, ylabel=points.y)
        panel.set_ylim(points.runs.loss.min() / 1.05, points.runs.loss.max() * 1.05)
        panel.legend(title="lines: the law; stars: best size")
        return figure


@draw.register
def draw_shapes(report: ShapeReport) -> Figure:
    """Loss against the dimension at what was paid, with the best of each budget."""
    points, law = report.points, report.fit.law
    runs = points.runs
    paid = np.unique(runs.flops)
    budgets = paid[np.unique(np.linspace(0, len(paid) - 1, BUDGETS).round().astype(int))]
    nearest = np.abs(np.log(runs.flops)[:, None] - np.log(budgets)).argmin(axis=1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        panel = figure.subplots()
        shapes = np.geomspace(runs.shape.min() / 1.5, runs.shape.max() * 1.5, POINTS)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(budgets)))
        for number, (budget, colour) in enumerate(zip(budgets, colours, strict=True)):
            line = law.predict(shapes, np.full(POINTS, budget))
            panel.plot(shapes, line, color=colour, label=f"{budget:.1e} FLOPs")
            own = nearest == number
            panel.plot(runs.shape[own], runs.loss[own], ".", color=colour, markersize=4)
            best = law.best(float(budget))
            if shapes[0] <= best <= shapes[-1]:
                lowest = law.predict(np.array([best]), np.array([budget]))
                panel.plot(best, lowest, "*", color=VERMILION, markersize=9)
        panel.set(xscale="log", yscale="log", xlabel=points.shape, ylabel=points.y)
        panel.set_ylim(runs.loss.min() / 1.05, runs.loss.max() * 1.05)
        figure.legend(title="lines: the law\nstars: best value", loc="outside right upper")
        return figure
