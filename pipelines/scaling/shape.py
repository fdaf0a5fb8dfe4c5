"""Loss in one dimension of a model's shape and in compute: how deep or wide a budget wants it.

`f(x, t) = alpha x^-a + (beta x^b + xi) t^-c + eps` for a dimension x and training FLOPs t, all else as at the
centre of a star sweep (Alabdulmohsin et al. 2023, SoViT, arXiv 2305.13035, section 3). More of the dimension
helps without end but for what it takes from the images that t pays for, so every t has a best x, and that
grows as t^s, s = c / (a + b).

Given the exponents the law is linear, so least squares of relative residuals search in three dimensions.
Standard errors: residuals are drawn anew.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from pipelines.scaling.curves import Floats
from pipelines.scaling.intervals import CONFIDENCE, STRUCTURAL, Forecast, forecast
from workers.errors import DataError

NAMES = ("alpha", "a", "beta", "b", "xi", "c", "eps", "s")
MIN_RUNS = 10
"""Seven parameters and some runs that judge them."""
MIN_SHAPES, MIN_COMPUTE = 4, 3
"""Distinct values: a curve with a minimum in x, one with a floor in t."""
EXPONENTS = (0.1, 0.3, 0.7, 1.3)
"""Starts of a, b and c."""
BOUNDS = (np.log(0.02), np.log(3.0))
"""Of log exponents."""
POLISHED = 4
"""Best starts that are optimised."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class ShapeRuns:
    """(n,) each."""

    shape: Floats
    """The dimension x."""
    flops: Floats
    """Of training."""
    loss: Floats

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, rows: np.ndarray) -> "ShapeRuns":
        return ShapeRuns(shape=self.shape[rows], flops=self.flops[rows], loss=self.loss[rows])


@dataclass(frozen=True, kw_only=True)
class ShapeLaw:
    """x and t count in units of the runs' geometric means."""

    alpha: float
    a: float
    beta: float
    b: float
    xi: float
    c: float
    eps: float
    unit_shape: float
    unit_flops: float

    @property
    def s(self) -> float:
        """The best x grows as t^s."""
        return self.c / (self.a + self.b)

    def predict(self, shape: Floats, flops: Floats) -> Floats:
        """Loss (n,) at n shapes and FLOPs."""
        x, t = shape / self.unit_shape, flops / self.unit_flops
        return np.asarray(self.alpha * x**-self.a + (self.beta * x**self.b + self.xi) * t**-self.c + self.eps)

    def best(self, flops: float) -> float:
        """The x of least loss; inf or 0 where the loss falls or rises with x throughout."""
        up, down = self.b * self.beta, self.a * self.alpha
        if up == 0 or down == 0:
            return float("inf") if down > 0 else 0.0
        grown = down / up * (flops / self.unit_flops) ** self.c
        return float(self.unit_shape * grown ** (1 / (self.a + self.b)))

    def values(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in NAMES}


@dataclass(frozen=True, kw_only=True)
class ShapeFit:
    law: ShapeLaw
    draws: tuple[ShapeLaw, ...]
    """Of the bootstrap."""
    noise: float
    """Root mean square of the relative residuals."""
    end: float
    """The most FLOPs of a run."""

    def errors(self) -> dict[str, float]:
        """Standard errors by name."""
        return {name: float(np.std([getattr(law, name) for law in self.draws], ddof=1)) for name in NAMES}

    def forecast(self, shape: Floats, flops: Floats, confidence: float = CONFIDENCE) -> Forecast:
        """Of runs (n,): the draws' spread, noise, and the structural part."""
        spread = np.var([np.log(law.predict(shape, flops)) for law in self.draws], axis=0, ddof=1)
        median = self.law.predict(shape, flops)
        return forecast(median, spread + self._structural(shape, flops) + self.noise**2, confidence)

    def _structural(self, shape: Floats, flops: Floats) -> Floats:
        """Variance of log loss (n,) for what the form does not know, beyond the most FLOPs of a run."""
        law, end = self.law, self.end / self.law.unit_flops
        falling = (law.beta * (shape / law.unit_shape) ** law.b + law.xi) * end**-law.c
        slope = law.c * falling / law.predict(shape, np.full(len(shape), self.end))
        beyond = np.maximum(np.log(flops / self.end), 0.0)
        return np.asarray((STRUCTURAL * slope * beyond) ** 2)


def check_shapes(runs: ShapeRuns) -> None:
    """DataError if the runs cannot determine such a law."""
    for name in ("shape", "flops", "loss"):
        values = getattr(runs, name)
        if bad := np.flatnonzero(~(np.isfinite(values) & (values > 0))).tolist():
            raise DataError(
                f"{name} of run {bad[0] + 1} is {values[bad[0]]:g}; laws take positive, finite numbers"
            )
    if len(runs) < MIN_RUNS:
        raise DataError(f"{len(runs)} runs; a law in shape and compute needs at least {MIN_RUNS}")
    for name, fewest in (("shape", MIN_SHAPES), ("flops", MIN_COMPUTE)):
        count = len(np.unique(getattr(runs, name)))
        if count < fewest:
            raise DataError(
                f"{name}: {count} different value{'s' * (count > 1)} in {len(runs)} runs; a law in shape "
                f"and compute needs at least {fewest}"
            )


def fit_shape(
    runs: ShapeRuns, *, bootstraps: int, progress: Callable[[int, int], None] | None = None
) -> ShapeFit:
    """The best law, and `bootstraps` of its residuals drawn anew. The same runs give the same result."""
    check_shapes(runs)
    problem = _Problem(runs)
    grid = [np.log(np.array(start)) for start in itertools.product(EXPONENTS, repeat=3)]
    starts = sorted(grid, key=lambda start: problem.cost(start, runs.loss))[:POLISHED]
    found = [problem.polish(start, runs.loss) for start in starts]
    best = min(found, key=lambda exponents: problem.cost(exponents, runs.loss))
    law = problem.law(best, runs.loss)
    fitted = law.predict(runs.shape, runs.flops)
    residuals = runs.loss / fitted - 1
    freedom = max(1, len(runs) - 7)
    widened = residuals * np.sqrt(len(runs) / freedom)  # seven parameters took their share of the noise
    rng = np.random.default_rng(SEED)
    draws = []
    for number in range(bootstraps):
        again = fitted * (1 + rng.choice(widened, size=len(runs)))
        draws.append(problem.law(problem.polish(best, again), again))
        if progress is not None:
            progress(number + 1, bootstraps)
    noise = float(np.sqrt(np.sum(residuals**2) / freedom))
    return ShapeFit(law=law, draws=tuple(draws), noise=noise, end=float(runs.flops.max()))


class _Problem:
    """Least squares of relative residuals, given log exponents (a, b, c)."""

    def __init__(self, runs: ShapeRuns) -> None:
        self._units = tuple(float(np.exp(np.log(v).mean())) for v in (runs.shape, runs.flops))
        self._x, self._t = np.log(runs.shape / self._units[0]), np.log(runs.flops / self._units[1])

    def solve(self, logs: Floats, loss: Floats) -> tuple[Floats, Floats]:
        """(alpha, beta, xi, eps), none below 0, and the relative residuals (n,)."""
        a, b, c = np.exp(logs)
        falling = np.exp(-c * self._t)
        columns = [np.exp(-a * self._x), np.exp(b * self._x) * falling, falling, np.ones(len(falling))]
        matrix = np.stack(columns, axis=1) / loss[:, None]
        factors, _ = nnls(matrix, np.ones(len(loss)))
        return factors, np.asarray(matrix @ factors - 1)

    def cost(self, logs: Floats, loss: Floats) -> float:
        residuals = self.solve(logs, loss)[1]
        return float(residuals @ residuals)

    def polish(self, start: Floats, loss: Floats) -> Floats:
        found = least_squares(lambda logs: self.solve(logs, loss)[1], start, bounds=BOUNDS, x_scale=1.0)
        return np.asarray(found.x)

    def law(self, logs: Floats, loss: Floats) -> ShapeLaw:
        alpha, beta, xi, eps = self.solve(logs, loss)[0].tolist()
        a, b, c = np.exp(logs).tolist()
        return ShapeLaw(
            alpha=alpha, a=a, beta=beta, b=b, xi=xi, c=c, eps=eps,
            unit_shape=self._units[0], unit_flops=self._units[1],
        )  # fmt: skip
