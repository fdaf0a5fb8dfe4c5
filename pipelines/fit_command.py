"""The command `vitscale fit`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipelines.terminal import AsJson, SiteFile, bar, console, open_site
from workers.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group

    from pipelines.scaling.measured import Columns
    from pipelines.scaling.table import Table

MLFLOW = "mlflow:"
JOINT = "chinchilla"
SHAPE = "shape"
Report = TypeVar("Report")
"""Of curves, of runs in size and data, or in shape and FLOPs."""


def fit(
    source: Annotated[
        str, typer.Argument(help="A .csv or .parquet file, or mlflow:EXPERIMENT of the site's MLflow.")
    ],
    law: Annotated[
        str,
        typer.Option(
            help="In one variable: ensemble, m1, m2, m3, zhai, bnsl1, bnsl2. Best loss by compute: frontier. "
            "In size and data: chinchilla. In a dimension of the shape (--size) and FLOPs: shape."
        ),
    ] = "ensemble",
    x: Annotated[str | None, typer.Option(help="Column of images seen, tokens or compute.")] = None,
    y: Annotated[str | None, typer.Option(help="Column of loss or error.")] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="--y is accuracy, 0 to 1 or per cent; its error is fitted.")
    ] = False,
    curve: Annotated[
        str | None, typer.Option(help="Columns that together name a curve, with commas between.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Column whose values fit, train or 1 mark points that laws may see.")
    ] = None,
    seed: Annotated[str | None, typer.Option(help="Column of the seed; whole seeds are resampled.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Column of parameters, GFLOPs per image, or a dimension of the shape.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Column of tokens or images seen.")] = None,
    flops: Annotated[
        str | None, typer.Option(help="Column of training FLOPs, where none says how much data.")
    ] = None,
    unique: Annotated[
        str | None, typer.Option(help="Column of distinct images, where images were repeated.")
    ] = None,
    exclude_largest: Annotated[
        int, typer.Option(min=0, help="Leave out so many of the largest losses; which ones is printed.")
    ] = 0,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out rows, such as model=G/14. Repeatable; printed.")
    ] = None,
    predict: Annotated[
        list[float] | None,
        typer.Option(help="Forecast at this x. Repeatable. Default: 2 and 4 times the largest."),
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="FLOPs to divide among size and data. Repeatable.")
    ] = None,
    next_run: Annotated[
        float | None, typer.Option("--next", help="FLOPs for one more run: which tells most of the target?")
    ] = None,
    break_even: Annotated[
        str | None, typer.Option(help="Two families: where does the first overtake? Such as vit,resnet.")
    ] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Forecast also beyond what backtests reach.")
    ] = False,
    confidence: Annotated[float, typer.Option(min=0.01, max=0.999, help="Of the intervals.")] = 0.9,
    backtest: Annotated[
        bool, typer.Option("--backtest", help="Fit beginnings, measure on ends: error, coverage, baselines.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="More estimators for --backtest: m2, m3, m4, zhai, bnsl1. Minutes.")
    ] = None,
    bootstraps: Annotated[int, typer.Option(min=20, help="Of a law in two variables.")] = 1000,
    by_model: Annotated[
        bool,
        typer.Option(
            "--by-model", help="Draw whole models (--curve, else --size) in the bootstrap, not runs."
        ),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw curves and laws to this .svg or .png.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the forecasts to this .csv or .parquet.")] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Fit scaling laws with honest intervals to measured points, and say how such forecasts fared before.

    Example: vitscale fit points.csv --x images_seen --y error --curve model --backtest

    Example: vitscale fit runs.csv --law chinchilla --exclude-largest 5 --budget 1e21 --json
    """
    from pipelines.scaling.measured import Columns

    columns = Columns(
        x=x,
        y=y,
        curve=tuple(curve.split(",")) if curve else (),
        split=split,
        seed=seed,
        size=size,
        data=data,
        flops=flops,
        unique=unique,
        accuracy=accuracy,
    )
    _check_files(plot, out)
    table = _read(source, site)
    for rule in exclude or []:
        table = table.without_rows(rule)
    if law == JOINT:
        _fit_runs(
            table, columns, exclude_largest, bootstraps, by_model, budget or [], confidence, extrapolate,
            backtest, next_run, plot, as_json,
        )  # fmt: skip
        return
    if law == SHAPE:
        _fit_shapes(
            table, columns, exclude_largest, bootstraps, budget or [], confidence, extrapolate, backtest,
            plot, as_json,
        )  # fmt: skip
        return
    _fit_curves(
        table, columns, exclude_largest, law, predict or [], confidence, extrapolate, backtest, against,
        break_even, plot, out, as_json,
    )  # fmt: skip


def _fit_curves(
    table: "Table",
    columns: "Columns",
    exclude_largest: int,
    law: str,
    predict: list[float],
    confidence: float,
    extrapolate: bool,
    backtest: bool,
    against: str | None,
    break_even: str | None,
    plot: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from pipelines.scaling.backtest import ESTIMATORS, M4
    from pipelines.scaling.curve_report import LAWS, curve_json, curve_tables, report_curves
    from pipelines.scaling.frontier import FRONTIER
    from pipelines.scaling.measured import curves_of, frontier_of

    if law not in LAWS:
        raise ConfigError(f"--law {law}: expected one of {', '.join((*LAWS, JOINT, SHAPE))}")
    others = against.split(",") if against else []
    for name in others:
        if name not in (*ESTIMATORS, M4):
            raise ConfigError(f"--against {name}: expected some of {', '.join((*ESTIMATORS, M4))}")
    report = report_curves(
        (frontier_of if law == FRONTIER else curves_of)(table, columns, exclude_largest),
        law=law,
        predict=predict,
        confidence=confidence,
        extrapolate=extrapolate,
        backtest=backtest,
        against=others,
        families=_families(break_even) if break_even else None,
    )
    if out is not None:
        from pipelines.scaling.tidy import write_forecasts

        write_forecasts(report, out)
    _show(report, curve_json, curve_tables, plot, as_json)


def _fit_runs(
    table: "Table",
    columns: "Columns",
    exclude_largest: int,
    bootstraps: int,
    by_model: bool,
    budgets: list[float],
    confidence: float,
    extrapolate: bool,
    backtest: bool,
    next_run: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from pipelines.scaling.joint_report import joint_json, joint_tables, report_runs
    from pipelines.scaling.measured import joint_of

    points = joint_of(table, columns, exclude_largest)
    with bar("bootstrap") as progress:
        report = report_runs(
            points,
            bootstraps=bootstraps,
            clusters=by_model,
            budgets=budgets,
            confidence=confidence,
            extrapolate=extrapolate,
            backtest=backtest,
            next_budget=next_run,
            progress=progress,
        )
    _show(report, joint_json, joint_tables, plot, as_json)


def _fit_shapes(
    table: "Table",
    columns: "Columns",
    exclude_largest: int,
    bootstraps: int,
    budgets: list[float],
    confidence: float,
    extrapolate: bool,
    backtest: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    from pipelines.scaling.measured import shape_of
    from pipelines.scaling.shape_report import report_shapes, shape_json, shape_tables

    points = shape_of(table, columns, exclude_largest)
    with bar("bootstrap") as progress:
        report = report_shapes(
            points,
            bootstraps=bootstraps,
            budgets=budgets,
            confidence=confidence,
            extrapolate=extrapolate,
            backtest=backtest,
            progress=progress,
        )
    _show(report, shape_json, shape_tables, plot, as_json)


def _show(
    report: Report,
    values: Callable[[Report], dict[str, Any]],
    tables: Callable[[Report], "Group"],
    plot: Path | None,
    as_json: bool,
) -> None:
    if plot is not None:
        from pipelines.scaling.plots import draw, write_figure

        write_figure(draw(report), plot)
    if as_json:
        typer.echo(json.dumps(values(report), allow_nan=False))
        return
    console.print(tables(report), markup=False)


def _families(text: str) -> tuple[str, str]:
    first, _, second = text.partition(",")
    if not first or not second or "," in second:
        raise ConfigError(f"--break-even {text}: expected two families, such as vit,resnet")
    return first, second


def _read(source: str, site: Path | None) -> "Table":
    from pipelines.scaling.table import read_table, table_of_rows

    if not source.startswith(MLFLOW):
        return read_table(Path(source))
    from orchestrator.experiment_rows import experiment_rows

    where = open_site(site)
    return table_of_rows(source, experiment_rows(where.mlflow, source.removeprefix(MLFLOW)))


def _check_files(plot: Path | None, out: Path | None) -> None:
    """Before minutes of work."""
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise ConfigError(f"--plot {plot}: expected a name that ends in .svg or .png")
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"--out {out}: expected a name that ends in .csv or .parquet")
    for path in (plot, out):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
