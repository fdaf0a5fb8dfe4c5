"""Loss in model size and data together: `L = E + A N^-alpha + B D^-beta` (Hoffmann et al. 2022, equation 2).

Size N is parameters, or forward GFLOPs per image, which holds across patch sizes; data D is tokens or images
seen. Where images repeat, D is what they are worth: `U + U r (1 - exp(-R / r))` for U unique images and R
repetitions (Muennighoff et al. 2023, equation 5), with r fitted.

Fitted as Hoffmann et al. and Besiroglu et al. 2024 (arXiv 2404.10102): Huber loss (1e-3) of log-sum-exp
residuals of log L, here with analytic gradients on centred logarithms, from many starts. Standard errors: the
runs are drawn anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from pipelines.scaling.curves import Floats
from pipelines.scaling.intervals import CONFIDENCE, STRUCTURAL, Forecast, forecast
from workers.errors import DataError

DELTA = 1e-3
"""Where Huber's loss turns from square to straight, in log L."""
NAMES = ("A", "B", "E", "alpha", "beta")
REPEAT = "r"
MIN_RUNS = 8
"""Five parameters and some runs that judge them."""
EXPONENTS = (0.15, 0.3, 0.5, 0.8)
FLOORS = (0.3, 0.6, 0.85)
"""Starts of E, of the smallest loss."""
POLISHED = 8
"""Best starts that are optimised."""
REPEATS = (2.0, 10.0)
"""Starts of r."""
BOUNDS = np.array(
    [[-np.inf, -np.inf, -np.inf, 0.01, 0.01, np.log(0.05)], [np.inf, np.inf, np.inf, 2.0, 2.0, np.log(500)]]
)
"""Of (a, b, e, alpha, beta, log r): loss falls with size and data; few runs send no parameter to infinity."""
WALL = 1e6
"""Slope of what it costs to be outside; inside nothing changes."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Runs:
    """(n,) each; checked."""

    size: Floats
    data: Floats
    loss: Floats
    unique: Floats | None = None
    """Distinct images, where some repeat."""

    def __len__(self) -> int:
        return len(self.size)

    def take(self, rows: np.ndarray) -> "Runs":
        unique = None if self.unique is None else self.unique[rows]
        return Runs(size=self.size[rows], data=self.data[rows], loss=self.loss[rows], unique=unique)


@dataclass(frozen=True, kw_only=True)
class JointLaw:
    A: float
    B: float
    E: float
    alpha: float
    beta: float
    r: float | None = None
    """Of repeated data; None: every image counts as new."""
    objective: float = 0.0
    """Sum of Huber losses of log L."""
    rmsle: float = 0.0

    def predict(self, size: Floats, data: Floats, unique: Floats | None = None) -> Floats:
        """Loss (n,), at what n sizes and amounts of data."""
        worth = data if unique is None or self.r is None else effective_data(data, unique, self.r)
        return np.asarray(self.E + self.A * size**-self.alpha + self.B * worth**-self.beta)

    def values(self) -> dict[str, float]:
        found = {name: float(getattr(self, name)) for name in NAMES}
        return found if self.r is None else {**found, REPEAT: self.r}


def effective_data(data: Floats, unique: Floats, r: float) -> Floats:
    """What `data` images seen are worth when only `unique` of them are distinct."""
    repeats = np.maximum(data / unique - 1, 0.0)
    return np.asarray(np.minimum(data, unique) + unique * r * -np.expm1(-repeats / r))


def check_runs(runs: Runs) -> None:
    """DataError if the runs cannot determine a law in size and data."""
    for name in ("size", "data", "loss"):
        values = getattr(runs, name)
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"{name} of run {at + 1} is {values[at]:g}; laws take positive, finite numbers (leave "
                "out runs "
                f"that failed)"
            )
    if len(runs) < MIN_RUNS:
        raise DataError(f"{len(runs)} runs; a law in size and data needs at least {MIN_RUNS}")
    for name in ("size", "data"):
        count = len(np.unique(getattr(runs, name)))
        if count < 3:
            raise DataError(
                f"{name}: {count} different value{'s' * (count > 1)} in {len(runs)} runs; the law's "
                "dependence on it needs at least 3"
            )
    if rises(runs) == ["size", "data"]:
        raise DataError(
            "the losses rise with size and with data, as accuracy does; laws take error or loss "
            "(--accuracy turns accuracy into error)"
        )


def rises(runs: Runs) -> list[str]:
    """Of "size" and "data" those with which the losses rise on the whole, the other being the same."""
    columns = np.column_stack([np.ones(len(runs)), np.log(runs.size), np.log(runs.data)])
    slopes = np.linalg.lstsq(columns, np.log(runs.loss))[0][1:]
    return [name for name, slope in zip(("size", "data"), slopes, strict=True) if slope > 0]


class _Problem:
    """The objective on parameters (a, b, e, alpha, beta[, log r]); a and b at the geometric mean size and
    data.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.n = np.log(runs.size)
        self.centre_n = float(self.n.mean())
        self.d = np.log(runs.data)
        self.centre_d = float(self.d.mean())
        self.target = np.log(runs.loss)
        self.repeats = runs.unique is not None

    def data(self, p: Floats) -> tuple[Floats, Floats]:
        """Centred log of the effective data (n,), and its derivative by log r."""
        if not self.repeats:
            return self.d - self.centre_d, np.zeros(len(self.d))
        unique, r = self.runs.unique, np.exp(p[5])
        assert unique is not None
        worth = effective_data(self.runs.data, unique, r)
        decay = np.maximum(self.runs.data / unique - 1, 0.0) / r
        slope = unique * r * (-np.expm1(-decay) - decay * np.exp(-decay)) / worth
        return np.log(worth) - self.centre_d, slope

    def residuals(self, p: Floats) -> tuple[Floats, Floats]:
        """log prediction - log L, (n,), and its derivatives (n, parameters)."""
        d, slope = self.data(p)
        n = self.n - self.centre_n
        terms = np.stack([p[0] - p[3] * n, p[1] - p[4] * d, np.full(len(n), p[2])])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        sums = shares.sum(axis=0)
        total = top + np.log(sums)
        of_a, of_b, of_e = shares / sums
        columns = [of_a, of_b, of_e, -n * of_a, -d * of_b]
        if self.repeats:
            columns.append(-p[4] * slope * of_b)
        return total - self.target, np.stack(columns, axis=1)

    def objective(self, p: Floats, counts: Floats) -> tuple[float, Floats]:
        """Sum of Huber losses over DELTA**2, and its gradient; runs count as often as `counts` (n,) says."""
        residuals, jacobian = self.residuals(p)
        scaled = np.clip(residuals / DELTA, -1, 1)
        losses = np.where(
            np.abs(residuals) <= DELTA, 0.5 * residuals**2, DELTA * (np.abs(residuals) - DELTA / 2)
        )
        low, high = BOUNDS[:, : len(p)]
        outside = p - np.clip(p, low, high)
        value = float(counts @ losses) / DELTA**2 + WALL * float(outside @ outside)
        return value, (counts * scaled) @ jacobian / DELTA + 2 * WALL * outside

    def starts(self) -> list[Floats]:
        """For exponents and floors of a grid the best A and B, found linearly; best first."""
        found: list[tuple[float, int, Floats]] = []
        ones = np.ones(len(self.runs))
        for r in REPEATS if self.repeats else (None,):
            for alpha in EXPONENTS:
                for beta in EXPONENTS:
                    for floor in FLOORS:
                        p = np.array([0.0, 0.0, 0.0, alpha, beta, *([] if r is None else [np.log(r)])])
                        d, _ = self.data(p)
                        level = floor * self.runs.loss.min()
                        columns = np.stack(
                            [np.exp(-alpha * (self.n - self.centre_n)), np.exp(-beta * d)], axis=1
                        )
                        scale = 1 / self.runs.loss
                        best, _ = nnls(columns * scale[:, None], (self.runs.loss - level) * scale)
                        p[:3] = np.log(np.maximum([*best, level], 1e-6))
                        found.append((self.objective(p, ones)[0], len(found), p))
        return [p for _, _, p in sorted(found)[:POLISHED]]

    def polish(
        self, start: Floats, counts: Floats, bend: Floats | None = None
    ) -> tuple[float, Floats, Floats]:
        """The minimum near `start`, where it is, and the inverse Hessian there; `bend`: one to begin with."""
        options = {"gtol": 1e-4, "maxiter": 200, "hess_inv0": bend}
        done = minimize(self.objective, start, args=(counts,), jac=True, method="BFGS", options=options)
        return float(done.fun), np.asarray(done.x), np.asarray(done.hess_inv)

    def law(self, p: Floats) -> JointLaw:
        residuals, _ = self.residuals(p)
        value, _ = self.objective(p, np.ones(len(residuals)))
        return JointLaw(
            A=float(np.exp(p[0] + p[3] * self.centre_n)),
            B=float(np.exp(p[1] + p[4] * self.centre_d)),
            E=float(np.exp(p[2])),
            alpha=float(p[3]),
            beta=float(p[4]),
            r=float(np.exp(p[5])) if self.repeats else None,
            objective=value * DELTA**2,
            rmsle=float(np.sqrt(np.mean(residuals**2))),
        )


@dataclass(frozen=True, kw_only=True)
class JointFit:
    law: JointLaw
    draws: tuple[JointLaw, ...]
    """Of the bootstrap."""
    noise: float
    """Root mean square of the residuals of log L, outliers included: runs to come have them, too."""
    end: tuple[float, float]
    """Size and data of the run that took most compute."""

    def errors(self) -> dict[str, float]:
        """Standard errors by name."""
        names = self.law.values()
        return {name: float(np.std([draw.values()[name] for draw in self.draws], ddof=1)) for name in names}

    def forecast(
        self, size: Floats, data: Floats, unique: Floats | None = None, confidence: float = CONFIDENCE
    ) -> Forecast:
        """Of runs (n,): the draws' spread, noise, and the structural part."""
        median = self.law.predict(size, data, unique)
        spread = np.var([np.log(draw.predict(size, data, unique)) for draw in self.draws], axis=0, ddof=1)
        spread = spread + np.diag(self.structural(size, data))
        return forecast(median, spread + self.noise**2, confidence)

    def structural(self, size: Floats, data: Floats) -> Floats:
        """Covariance (n, n) of log L at n runs for what the form does not know, beyond the largest compute.

        The slope is that of the frontier: there the reducible loss falls as C^-(alpha beta / (alpha + beta)).
        """
        law = self.law
        exponent = law.alpha * law.beta / (law.alpha + law.beta)
        reducible = 1 - law.E / law.predict(*(np.array([value]) for value in self.end))[0]
        beyond = np.maximum(np.log(size * data / (self.end[0] * self.end[1])), 0.0)
        return np.asarray((STRUCTURAL * exponent * reducible) ** 2 * np.outer(beyond, beyond))


def fit_joint(
    runs: Runs,
    *,
    bootstraps: int,
    clusters: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> JointFit:
    """The best law, and `bootstraps` of runs drawn with replacement; whole `clusters` (n,) if given.

    Every bootstrap starts at the best law. The same runs give the same result.
    """
    check_runs(runs)
    problem = _Problem(runs)
    ones = np.ones(len(runs))
    polished = [problem.polish(start, ones) for start in problem.starts()]
    _, best, bend = min(polished, key=lambda found: found[0])
    bend = (bend + bend.T) / 2  # symmetric but for rounding
    rng = np.random.default_rng(SEED)
    draws = []
    for number in range(bootstraps):
        counts = _resampled(len(runs), clusters, rng)
        draws.append(problem.law(problem.polish(best, counts, bend)[1]))
        if progress is not None:
            progress(number + 1, bootstraps)
    law = problem.law(best)
    last = int(np.argmax(runs.size * runs.data))
    return JointFit(
        law=law,
        draws=tuple(draws),
        noise=law.rmsle,
        end=(float(runs.size[last]), float(runs.data[last])),
    )


def _resampled(count: int, clusters: np.ndarray | None, rng: np.random.Generator) -> Floats:
    """How often each run was drawn, (n,)."""
    if clusters is None:
        return np.bincount(rng.integers(count, size=count), minlength=count).astype(float)
    names, which = np.unique(clusters, return_inverse=True)
    drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
    return np.asarray(drawn[which], dtype=float)
