"""The figures of a study's report: each is a name, a chart as SVG, and what stands above and below it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.report.charts import MARKERS, Axis, Series, chart, count, legend, percent, scientific
from pipelines.report.markup import interval_text, share_text
from pipelines.scaling.analysis import (
    NAMES,
    Analysis,
    ModelCurve,
    Row,
    best_rows,
    forecast_run,
    frontier,
    rate,
)
from pipelines.scaling.curves import Floats
from pipelines.scaling.laws import wilson_interval

GRID = 40
"""Places at which a law is drawn."""
BAND_LIMIT = 3.0
"""Bands are cut at a third of the least error and three times the largest: the rest says as much."""
ERROR = Axis(label="error", format=percent, log=True)
IMAGES = Axis(label="distinct training images", format=count, log=True)
FLOPS = Axis(label="training FLOPs", format=scientific, log=True)
SEEN = Axis(label="images seen", format=count)


@dataclass(frozen=True, kw_only=True)
class Figure:
    name: str
    """Of its file."""
    title: str
    svg: str
    legend: str

    def html(self) -> str:
        return f"<div><h3>{self.title}</h3>{self.legend}{self.svg}</div>"


def scaling_figures(analysis: Analysis) -> list[Figure]:
    """Error over distinct images, one for each family: points, laws with bands, held-out points."""
    rows = [row for model in analysis.models for row in model.rows]
    reach = tuple(end for row in rows for end in shown_interval(row))
    y = Axis(label="error", format=percent, log=True, include=(min(reach), max(reach)))
    found = []
    for family, name in NAMES.items():
        models = [model for model in analysis.models if model.family == family]
        if models:
            series = [
                one
                for place, model in enumerate(models)
                for one in _model_series(models, place, y, analysis.confidence)
            ]
            title = f"{name}: error over distinct training images"
            found.append(_figure(f"scaling-{family}", name, series, IMAGES, y, title))
    return found


def _model_series(models: Sequence[ModelCurve], place: int, y: Axis, confidence: float) -> list[Series]:
    model = models[place]
    shade, marker = place / max(1, len(models) - 1), list(MARKERS)[place % len(MARKERS)]
    measured = Series(
        name=f"{model.size}" + ("" if model.law else ", no law"),
        x=[row["unique_images"] for row in model.rows],
        y=[rate(row) for row in model.rows],
        tone=model.family,
        shade=shade,
        marker=marker,
        intervals=[shown_interval(row) for row in model.rows],
        notes=[note(row) for row in model.rows],
    )
    if model.law is None or model.curve is None:
        return [measured]
    ends = model.curve.x[0], model.curve.x[-1] * max(1.0, min(2.0, model.curve.horizon))
    x = np.geomspace(*ends, GRID)
    forecast = forecast_run(model.law, x, model.rows[0]["total"], confidence)
    band = _clipped(forecast.low, forecast.high, y)
    law = Series(
        name="", x=x.tolist(), y=forecast.median.tolist(), tone=model.family, shade=shade, line="solid",
        band=band,
    )  # fmt: skip
    if model.held is None:
        return [law, measured]
    at, expected = model.held
    held = Series(
        name="",
        x=[at],
        y=expected.median.tolist(),
        tone=model.family,
        shade=shade,
        marker=marker,
        hollow=True,
        intervals=_clipped(expected.low, expected.high, y),
        notes=[f"{model.name}: forecast from the smaller sets alone, {share_text(expected.median[0])}"],
    )
    return [law, measured, held]


def _clipped(low: Floats, high: Floats, y: Axis) -> list[tuple[float, float]]:
    floor, ceiling = min(y.include) / BAND_LIMIT, max(y.include) * BAND_LIMIT
    return [
        (float(one), float(other))
        for one, other in zip(np.clip(low, floor, ceiling), np.clip(high, floor, ceiling), strict=True)
    ]


def frontier_figure(rows: Sequence[Row]) -> Figure:
    """Every rung over its compute, and the best so far of each family."""
    series = []
    for family, name in NAMES.items():
        same = [row for row in rows if row["family"] == family]
        if same:
            flops, errors = frontier(same)
            series.append(_stairs(flops, errors, max(row["total_flops"] for row in same), family))
            series.append(_dots(same, name, family))
    return _figure("frontier", "By compute", series, FLOPS, ERROR, "Error over training compute")


def _stairs(flops: Floats, errors: Floats, end: float, family: str) -> Series:
    x = np.repeat([*flops, end], 2)[1:-1]
    return Series(
        name="", x=x.tolist(), y=np.repeat(errors, 2).tolist(), tone=family, shade=0.6, line="solid"
    )


def _dots(rows: Sequence[Row], name: str, family: str) -> Series:
    return Series(
        name=name,
        x=[row["total_flops"] for row in rows],
        y=[rate(row) for row in rows],
        tone=family,
        shade=0.6,
        marker="circle" if family == "vit" else "square",
        notes=[note(row) for row in rows],
    )


def break_even_figure(rows: Sequence[Row]) -> Figure:
    """The best of each family at each number of images."""
    series = []
    for family, name in NAMES.items():
        best = best_rows([row for row in rows if row["family"] == family], "unique_images")
        if best:
            dots = _dots(best, f"the best {name}", family)
            x = [row["unique_images"] for row in best]
            intervals = [shown_interval(row) for row in best]
            series.append(Series(**{**vars(dots), "x": x, "intervals": intervals, "line": "thin"}))
    return _figure("break-even", "By data", series, IMAGES, ERROR, "The best of each family over data")


def learning_figures(points: Sequence[Row]) -> list[Figure]:
    """Error of every rung while it trained, a panel for each family; the more images, the stronger."""
    amounts = sorted({row["unique_images"] for row in points})
    found = []
    for family, name in NAMES.items():
        series = [
            Series(
                name="",
                x=[row["images_seen"] for row in curve],
                y=[rate(row) for row in curve],
                tone=family,
                shade=(amounts.index(curve[0]["unique_images"]) + 1) / len(amounts),
                line="thin",
                notes=[note(row) for row in curve],
            )
            for curve in _curves(row for row in points if row["family"] == family)
        ]
        if series:
            figure = _figure(f"learning-{family}", name, series, SEEN, ERROR, f"{name}: error while training")
            found.append(figure)
    return found


def _curves(points: Iterable[Row]) -> list[list[Row]]:
    curves: dict[str, list[Row]] = {}
    for row in points:
        curves.setdefault(row["rung"], []).append(row)
    return [sorted(rows, key=lambda row: int(row["images_seen"])) for rows in curves.values()]


def _figure(name: str, title: str, series: Sequence[Series], x: Axis, y: Axis, label: str) -> Figure:
    svg = chart(series, x=x, y=y, title=label)
    return Figure(name=name, title=title, svg=svg, legend=legend(one for one in series if one.name))


def shown_interval(row: Row) -> tuple[float, float]:
    """Wilson's, 95 %, cut below half of the point: zero has no logarithm."""
    low, high = wilson_interval(row["errors"], row["total"])
    return max(low, rate(row) / 2), high


def note(row: Row) -> str:
    interval = interval_text(wilson_interval(row["errors"], row["total"]))
    model = f"{NAMES[row['family']]} {row['size']}"
    return (
        f"{model}, {row['unique_images']:,} images, {row['images_seen']:,} seen: "
        f"{share_text(row['errors'] / row['total'])} error ({interval})"
    )
