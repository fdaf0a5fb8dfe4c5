"""How a law that was fitted to smaller runs forecast larger ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from pipelines.scaling.curves import Floats
from pipelines.scaling.intervals import Forecast

BOOTSTRAPS = 100
"""Of a law that is only held against later runs."""


@dataclass(frozen=True, kw_only=True)
class LaterScore:
    test: str
    """Which runs were left out."""
    runs: int
    later: int
    rmsle: float
    naive: float
    """RMSLE of the smallest loss that was fitted, as a forecast of every later run."""
    coverage: float


def score_later(test: str, fitted: Floats, forecast: Forecast, later: Floats) -> LaterScore:
    """From the losses that were fitted (n,), and a forecast of those that were left out (m,)."""
    inside = (forecast.low <= later) & (later <= forecast.high)
    return LaterScore(
        test=test,
        runs=len(fitted),
        later=len(later),
        rmsle=float(np.sqrt(np.mean((np.log(forecast.median) - np.log(later)) ** 2))),
        naive=float(np.sqrt(np.mean((np.log(fitted.min()) - np.log(later)) ** 2))),
        coverage=float(inside.mean()),
    )


def later_table(scores: Sequence[LaterScore], confidence: float) -> Table:
    table = Table(
        "\nbacktest",
        "\nfitted",
        "\nlater",
        "\nRMSLE",
        "RMSLE of the\nlowest loss",
        f"coverage\nof nominal {confidence:.0%}",
        box=None,
    )
    for score in scores:
        table.add_row(
            score.test,
            str(score.runs),
            str(score.later),
            f"{score.rmsle:.4f}",
            f"{score.naive:.4f}",
            f"{score.coverage:.0%}",
        )
    return table
