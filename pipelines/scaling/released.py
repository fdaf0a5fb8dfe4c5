"""M4 as its authors released it: the baseline that other estimators are measured against.

`(y - e) / (e0 - y)**a = b x**c` (Alabdulmohsin, Neyshabur, Zhai 2022, arXiv 2209.06640), with the optimiser
of their `revisiting_neural_scaling_laws` written anew, step by step: non-negative least squares for (log b,
-c, a), its column log(e0 - y) frozen at the first e0; 1,000 steps of gradient descent at 1e-8 on (e, e0);
after 100 rounds of both, damped Newton steps. The start near the smallest loss and the tiny steps act as its
regulariser; the global minimum of the same objective extrapolates twice as badly, so nothing of it is
"improved" here.

Many curves go through the steps at once: rows of one array, padded, which takes seconds instead of minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from pipelines.scaling.curves import Floats

MARGIN = 1e-3
DESCENT_RATE, DESCENT_STEPS, DESCENT_ROUNDS = 1e-8, 1000, 100
NEWTON_RATE, NEWTON_STEPS = 0.1, 100
STOP = 1e-10
MAX_ROUNDS = 10_000
GRID = 10_000
"""Points between e and e0 that a prediction is searched among."""
FLAT = 1e-5


@dataclass(frozen=True, kw_only=True)
class ReleasedM4:
    e: float
    e0: float
    a: float
    log_b: float
    c: float

    def predict(self, x: Floats) -> Floats:
        """(n,) at x (n,): the point of the grid that fulfils the equation best."""
        power = np.exp(self.log_b) * x**self.c
        if abs(self.a) < FLAT:
            return np.asarray(self.e + power)
        excess = np.linspace(0, self.e0 - self.e, GRID)
        ceiling = (excess[-1] - excess) ** self.a
        best = [int(np.argmin(np.abs(excess - one * ceiling))) for one in power]
        return np.asarray(excess[best] + self.e)


class _Rows:
    """Curves as rows: `mask` is 1 where a row has a point, elsewhere its first point stands in."""

    def __init__(self, curves: Sequence[tuple[Floats, Floats]]) -> None:
        width = max(len(x) for x, _ in curves)
        self.count = np.array([len(x) for x, _ in curves])
        self.mask = (np.arange(width) < self.count[:, None]).astype(float)
        pad = [np.pad(np.arange(n), (0, width - n)) for n in self.count]
        self.log_x = np.array([np.log(x)[i] for (x, _), i in zip(curves, pad, strict=True)])
        self.y = np.array([y[i] for (_, y), i in zip(curves, pad, strict=True)])
        self.lowest, self.highest = self.y.min(axis=1) - MARGIN, self.y.max(axis=1) + MARGIN
        # Errors have the level of guessing, 1, as start and bound of e0; losses above 1 have none.
        bounded = self.y.max(axis=1) < 1
        self.ceiling = np.where(bounded, 1 + MARGIN, np.inf)
        self.e = self.lowest.copy()
        self.e0 = np.where(bounded, 1.0, self.highest)
        self.column = np.log(self.e0[:, None] - self.y)
        self.log_b, self.c, self.a = (np.zeros(len(curves)) for _ in range(3))

    def regress(self, rows: NDArray[np.int64]) -> None:
        """(log b, c, a) of the rows by non-negative least squares."""
        for row in rows:
            n = self.count[row]
            columns = np.stack([np.ones(n), -self.log_x[row, :n], self.column[row, :n]], axis=1)
            found, _ = nnls(columns, np.log(self.y[row, :n] - self.e[row]))
            self.log_b[row], self.c[row], self.a[row] = found[0], -found[1], found[2]

    def move(self, rows: NDArray[np.int64], steps: int, rate: float, *, newton: bool) -> None:
        """`steps` steps on (e, e0) of the rows, each projected to where the logarithms exist."""
        y, mask, count = self.y[rows], self.mask[rows], self.count[rows]
        a, lowest, highest, ceiling = self.a[rows], self.lowest[rows], self.highest[rows], self.ceiling[rows]
        log_f = self.log_b[rows, None] + self.c[rows, None] * self.log_x[rows]
        e, e0 = self.e[rows], self.e0[rows]
        for _ in range(steps):
            over, under = y - e[:, None], e0[:, None] - y
            residual = (np.log(over) - a[:, None] * np.log(under) - log_f) * mask
            step_e = -(residual / over).sum(axis=1) / count
            step_e0 = -a * (residual / under).sum(axis=1) / count
            if newton:
                bend_e = ((mask - residual) / over**2).sum(axis=1) / count
                bend_e0 = a * ((a[:, None] * mask + residual) / under**2).sum(axis=1) / count
                step_e = _divided(step_e, bend_e)
                step_e0 = _divided(step_e0, bend_e0)
            e = np.minimum(np.maximum(e - rate * step_e, 0.0), lowest)
            e0 = np.minimum(np.maximum(e0 - rate * step_e0, highest), ceiling)
        self.e[rows], self.e0[rows] = e, e0


def _divided(step: Floats, bend: Floats) -> Floats:
    """No step where the objective is flat."""
    flat = np.abs(bend) <= FLAT
    return np.where(flat, 0.0, step / np.where(flat, 1.0, bend))


def fit_released(curves: Sequence[tuple[Floats, Floats]]) -> list[ReleasedM4]:
    """Of each curve (x (n,), y (n,)), ascending x; a point per x, the last of equal ones, as released."""
    rows = _Rows([_distinct(x, y) for x, y in curves])
    active = np.arange(len(curves))
    before = np.ones(len(curves))
    for number in range(MAX_ROUNDS):
        rows.regress(active)
        if number < DESCENT_ROUNDS:
            rows.move(active, DESCENT_STEPS, DESCENT_RATE, newton=False)
        else:
            rows.move(active, NEWTON_STEPS, NEWTON_RATE, newton=True)
        b = np.exp(rows.log_b)
        if number > DESCENT_ROUNDS + 1:
            active = active[np.abs(b - before)[active] >= STOP]
        before = b
        if not len(active):
            break
    columns = zip(rows.e, rows.e0, rows.a, rows.log_b, rows.c, strict=True)
    return [
        ReleasedM4(e=float(e), e0=float(e0), a=float(a), log_b=float(log_b), c=float(c))
        for e, e0, a, log_b, c in columns
    ]


def _distinct(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    last = np.append(np.diff(x) > 0, True)
    return x[last], y[last]
