"""What a study's points say: laws with intervals, held-out runs, break-even, and what to do next.

From the tidy table alone (points.py). What the points cannot carry is refused with the reason, which a
report shows where the number would be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.scaling.backtest import Score
from pipelines.scaling.breakeven import BreakEven, break_even
from pipelines.scaling.curve_report import report_curves
from pipelines.scaling.curves import MIN_SCALES, Curve, Floats, make_curve
from pipelines.scaling.ensemble import Ensemble, fit_ensemble
from pipelines.scaling.frontier import is_best
from pipelines.scaling.intervals import CONFIDENCE, Forecast, forecast
from pipelines.scaling.joint import JointFit, Runs
from pipelines.scaling.joint_report import JointReport, report_runs
from pipelines.scaling.laws import error_rate
from pipelines.scaling.measured import FLOPS_OF_GFLOPS, Curves, JointPoints
from workers.errors import ConfigError, DataError

Row = Mapping[str, Any]
NAMES = {"vit": "ViT", "resnet": "ResNet"}
BOOTSTRAPS = 300
LENGTHS = 3
"""Numbers of images seen from which on a study tells what longer training buys."""


@dataclass(frozen=True, kw_only=True)
class ModelCurve:
    """Error of one model over distinct training images, at the most images seen."""

    family: str
    size: str
    parameters: int
    rows: list[Row]
    """One for each number of images and seed."""
    curve: Curve | None
    law: Ensemble | None
    """Of all points."""
    held: tuple[float, Forecast] | None
    """The largest number of images, and what a law of the others forecasts there."""
    refused: str
    """Why there is no law."""

    @property
    def name(self) -> str:
        return f"{NAMES[self.family]} {self.size}"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much error is forecast to fall at the largest model and data if something is doubled."""

    what: str
    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class FamilyLaw:
    family: str
    report: JointReport | None
    refused: str
    gains: list[Gain]

    @property
    def best(self) -> float:
        """Forecast error at its largest model and data; infinite without a law."""
        if self.report is None:
            return float("inf")
        runs = self.report.points.runs
        corner = np.array([runs.size.max()]), np.array([runs.data.max()])
        return float(self.report.fit.law.predict(*corner)[0])


@dataclass(frozen=True, kw_only=True)
class Analysis:
    confidence: float
    models: list[ModelCurve]
    families: list[FamilyLaw]
    data_is_seen: bool
    """The laws' data are images seen; else distinct images, as all rungs see about the same number."""
    break_evens: dict[str, BreakEven | str]
    """By what grows (training images, training FLOPs): ViT against ResNet, or why it cannot be said."""
    backtest: dict[str, list[Score]]
    tasks: dict[str, int]
    recommendation: str


def analyse(points: Sequence[Row], confidence: float = CONFIDENCE) -> Analysis:
    """`points`: rows of a study's table. DataError if no rung has come to its end."""
    rows = finished(points)
    if not rows:
        raise DataError("no rung of the study has come to its end; `vitscale scale` goes on with it")
    models = _models(rows, confidence)
    # Where length is tied to the data (epochs, or the same for all) it is no variable of its own.
    lengths = {row["images_seen"] for row in rows if row["unique_images"] == rows[-1]["unique_images"]}
    seen = len(lengths) >= LENGTHS
    families = [
        _family(family, [row for row in rows if row["family"] == family], seen, confidence)
        for family in NAMES
        if any(row["family"] == family for row in rows)
    ]
    scores, tasks = _backtest(models, confidence)
    return Analysis(
        confidence=confidence,
        models=models,
        families=families,
        data_is_seen=seen,
        break_evens={
            "training images": _break_even(rows, "unique_images", confidence),
            "training FLOPs": _break_even(rows, "total_flops", confidence),
        },
        backtest=scores,
        tasks=tasks,
        recommendation=_recommend(families, seen, confidence),
    )


def finished(points: Sequence[Row]) -> list[Row]:
    """Ends of schedules; of a sweep the rate of the smallest loss among those that came to their end."""
    best: dict[str, Row] = {}
    for row in points:
        if row["end"] and (row["group"] not in best or row["loss"] < best[row["group"]]["loss"]):
            best[row["group"]] = row
    return list(best.values())


def rate(row: Row) -> float:
    """Error, never 0 (laws.error_rate)."""
    return error_rate(row["errors"], row["total"])


def _models(rows: Sequence[Row], confidence: float) -> list[ModelCurve]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["family"] != "vit", row["parameters"])):
        groups.setdefault((row["family"], row["size"]), []).append(row)
    return [_model(group, confidence) for group in groups.values()]


def _model(rows: Sequence[Row], confidence: float) -> ModelCurve:
    longest: dict[int, int] = {}
    for row in rows:
        longest[row["unique_images"]] = max(longest.get(row["unique_images"], 0), row["images_seen"])
    kept = sorted(
        (row for row in rows if row["images_seen"] == longest[row["unique_images"]]),
        key=lambda row: (row["unique_images"], row["seed"]),
    )
    curve, law, held, refused = None, None, None, ""
    name = f"{NAMES[rows[0]['family']]} {rows[0]['size']}"
    try:
        curve = _curve(name, kept, "unique_images")
        law = fit_ensemble(curve.x, curve.y, curve.seeds)
        held = _held(curve, kept[0]["total"], confidence)
    except DataError as error:
        refused = str(error).removeprefix(f"{name}: ")
    return ModelCurve(
        family=rows[0]["family"],
        size=rows[0]["size"],
        parameters=rows[0]["parameters"],
        rows=kept,
        curve=curve,
        law=law,
        held=held,
        refused=refused,
    )


def _curve(name: str, rows: Sequence[Row], x: str) -> Curve:
    seeds = [str(row["seed"]) for row in rows]
    return make_curve(name, [row[x] for row in rows], [rate(row) for row in rows], seeds=seeds)


def forecast_run(law: Ensemble, x: Floats, images: int, confidence: float) -> Forecast:
    """Of the error that one more run shows on so many validation images, (n,) at x (n,): few points may lie
    closer to their law than chance among the images allows to expect."""
    median = law.predict(x)
    chance = np.maximum(1 - median, 0.0) / (median * images)
    return forecast(median, law.curve_variance(x) + np.maximum(law.noise**2, chance), confidence, law.freedom)


def _held(curve: Curve, images: int, confidence: float) -> tuple[float, Forecast] | None:
    """Where a scale can be spared."""
    largest = float(curve.x[-1])
    early = curve.x < largest
    if len(np.unique(curve.x[early])) < MIN_SCALES:
        return None
    seeds = None if curve.seeds is None else curve.seeds[early]
    law = fit_ensemble(curve.x[early], curve.y[early], seeds)
    return largest, forecast_run(law, np.array([largest]), images, confidence)


def _family(family: str, rows: Sequence[Row], seen: bool, confidence: float) -> FamilyLaw:
    points = _joint_points(rows, seen)
    compute = points.flops_factor * points.runs.size * points.runs.data
    try:
        report = report_runs(
            points,
            bootstraps=BOOTSTRAPS,
            clusters=False,
            budgets=[float(compute.max()), 4 * float(compute.max())] if seen else [],
            confidence=confidence,
            extrapolate=False,
            backtest=True,
            next_budget=float(compute.max()) if seen else None,
        )
    except (ConfigError, DataError) as error:
        return FamilyLaw(family=family, report=None, refused=str(error), gains=[])
    gains = [
        _gain("the model's FLOPs", report.fit, points.runs, (2.0, 1.0), confidence),
        _gain(_data_name(seen), report.fit, points.runs, (1.0, 2.0), confidence),
    ]
    return FamilyLaw(family=family, report=report, refused="", gains=gains)


def _data_name(seen: bool) -> str:
    return "the images seen" if seen else "the distinct training images"


def _joint_points(rows: Sequence[Row], seen: bool) -> JointPoints:
    unique = np.array([row["unique_images"] for row in rows], dtype=float)
    data = np.array([row["images_seen"] for row in rows], dtype=float) if seen else unique
    runs = Runs(
        size=np.array([row["flops_per_image"] / 1e9 for row in rows]),
        data=data,
        loss=np.array([rate(row) for row in rows]),
        unique=unique if seen and bool((data > unique).any()) else None,
    )
    return JointPoints(
        runs=runs,
        labels=[row["size"] for row in rows],
        size="forward GFLOPs per image",
        data="images seen" if seen else "distinct training images",
        y="error",
        rows=len(rows),
        excluded=[],
        flops_factor=FLOPS_OF_GFLOPS,
        notes=[],
    )


def _gain(what: str, fit: JointFit, runs: Runs, factors: tuple[float, float], confidence: float) -> Gain:
    at = np.array([runs.size.max()]), np.array([runs.data.max()])
    beyond = at[0] * factors[0], at[1] * factors[1]
    falls = np.array([1 - float((law.predict(*beyond) / law.predict(*at))[0]) for law in fit.draws])
    tail = (1 - confidence) / 2
    low, median, high = np.quantile(falls, [tail, 0.5, 1 - tail])
    return Gain(what=what, median=float(median), low=float(low), high=float(high))


def best_rows(rows: Sequence[Row], x: str) -> list[Row]:
    """Of one family: the least error at each number of images, or as compute grows."""
    if x == "total_flops":
        flops = np.array([row[x] for row in rows], dtype=float)
        best = is_best(flops, np.array([rate(row) for row in rows]))
        return sorted((row for row, keep in zip(rows, best, strict=True) if keep), key=lambda row: row[x])
    found: dict[int, Row] = {}
    for row in rows:
        if row[x] not in found or rate(row) < rate(found[row[x]]):
            found[row[x]] = row
    return [found[at] for at in sorted(found)]


def _break_even(rows: Sequence[Row], x: str, confidence: float) -> BreakEven | str:
    curves = []
    try:
        for family, name in NAMES.items():
            same = [row for row in rows if row["family"] == family]
            if not same:
                return f"no {name} was trained"
            curve = _curve(f"the best {name}", best_rows(same, x), x)
            curves.append(replace(curve, seeds=None))
        return break_even(curves[0], curves[1], confidence=confidence)
    except DataError as error:
        return str(error)


def _backtest(
    models: Sequence[ModelCurve], confidence: float
) -> tuple[dict[str, list[Score]], dict[str, int]]:
    """Of all models' curves; the largest number of images is held out where one can be spared."""
    curves = []
    for model in models:
        if model.curve is None or model.held is None:
            continue
        early = model.curve.x < model.held[0]
        curves.append(
            replace(
                model.curve,
                x=model.curve.x[early],
                y=model.curve.y[early],
                seeds=None,
                held_x=model.curve.x[~early],
                held_y=model.curve.y[~early],
            )
        )
    if not curves:
        return {}, {}
    points = Curves(curves=curves, refused={}, x="training images", y="error", notes=[])
    report = report_curves(
        points,
        law="ensemble",
        predict=(),
        confidence=confidence,
        extrapolate=False,
        backtest=True,
        against=(),
    )
    return report.backtest, report.tasks


def _recommend(families: Sequence[FamilyLaw], seen: bool, confidence: float) -> str:
    """One sentence."""
    best = min(families, key=lambda one: one.best)
    if best.report is None:
        return f"No law can be fitted to these runs, so none says what to do next: {best.refused}."
    model, data = best.gains
    name, nominal = NAMES[best.family], f"{confidence:.0%}"
    said = (
        f"doubling {data.what} is forecast to take {_share(data)} of the error away, doubling {model.what} "
        f"{_share(model)} ({nominal} intervals)"
    )
    if data.low > model.high:
        return f"Next, {_more(seen)} for the {name}: {said}."
    if model.low > data.high:
        return f"Next, a larger {name}: {said}."
    return f"These runs cannot tell whether a larger {name} or {_more(seen)} buys more: {said}."


def _more(seen: bool) -> str:
    return "longer training" if seen else "more distinct images"


def _share(gain: Gain) -> str:
    return f"{gain.median:.0%} ({gain.low:.0%} to {gain.high:.0%})".replace("-", "\N{MINUS SIGN}")


def frontier(rows: Sequence[Row]) -> tuple[Floats, Floats]:
    """(FLOPs, error) of one family's best runs so far, as compute grows."""
    best = best_rows(rows, "total_flops")
    return np.array([row["total_flops"] for row in best], dtype=float), np.array([rate(r) for r in best])
