"""Forecasts as a table: a row per curve and x."""

from pathlib import Path

import pyarrow
from pyarrow import csv, parquet

from pipelines.scaling.curve_report import CurveReport, curve_json


def write_forecasts(report: CurveReport, path: Path) -> None:
    """To a .csv or .parquet file."""
    rows = [
        {
            "curve": fit["curve"],
            "law": report.law,
            report.points.x: forecast["x"],
            report.points.y: forecast["median"],
            "low": forecast["low"],
            "high": forecast["high"],
            "confidence": report.confidence,
            "beyond_backtests": forecast["beyond_backtests"],
        }
        for fit in curve_json(report)["curves"]
        for forecast in fit["predictions"]
    ]
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
