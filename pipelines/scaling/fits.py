"""A form fitted to a curve: bounded least squares of log y from many starts.

Residuals are of log y, never of log(y - e): the latter makes the deepest minimum one with e = 0 or e at the
smallest loss, wherever the truth is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from pipelines.scaling.curves import Floats
from pipelines.scaling.forms import Form
from pipelines.scaling.intervals import CONFIDENCE, STRUCTURAL, Forecast, forecast, structural_variance

SEED = 0
STEP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Fit:
    form: Form
    parameters: Floats
    """(p,), as `form.parameters` names them; x counts in units of x_max."""
    covariance: Floats
    """(p, p); NaN where a bound holds a parameter or the points do not determine it."""
    noise: float
    """Standard deviation of the residuals of log y."""
    x_max: float
    structural: float = STRUCTURAL
    """d of the structural part of intervals."""

    @property
    def errors(self) -> Floats:
        """Standard errors (p,)."""
        return np.sqrt(np.diag(self.covariance))

    def predict(self, x: Floats) -> Floats:
        return np.exp(self.form.log_y(self.parameters, x / self.x_max))

    def forecast(self, x: Floats, confidence: float = CONFIDENCE) -> Forecast:
        """Parameters that a bound holds count as known, so only the structural part speaks for them."""
        u = x / self.x_max
        base = self.form.log_y(self.parameters, u)
        steps = STEP * np.maximum(np.abs(self.parameters), 1e-3)
        slopes = np.stack(
            [
                (self.form.log_y(moved, u) - base) / step
                for moved, step in zip(self.parameters + np.diag(steps), steps, strict=True)
            ],
            axis=1,
        )
        of_fit = np.einsum("np,pq,nq->n", slopes, np.nan_to_num(self.covariance), slopes)
        ends = self.form.log_y(self.parameters, np.exp([0.0, -STEP]))
        shape = structural_variance(float(ends[1] - ends[0]) / STEP, x, self.x_max, self.structural)
        return forecast(np.exp(base), of_fit + shape + self.noise**2, confidence)


def fit_form(form: Form, x: Floats, y: Floats) -> Fit:
    """The best of `form.starts` fits; the same points give the same fit."""
    u, log_y = x / x.max(), np.log(y)
    low, high = form.bounds(u, y)
    rng = np.random.default_rng(SEED)
    best = None
    for start in low + (high - low) * rng.uniform(0.02, 0.98, (form.starts, len(low))):
        found = least_squares(
            lambda p: form.log_y(p, u) - log_y, start, bounds=(low, high), x_scale=high - low, max_nfev=200
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    freedom = max(len(x) - len(low), 1)
    variance = 2 * float(best.cost) / freedom
    return Fit(
        form=form,
        parameters=best.x,
        covariance=_covariance(best.jac, best.active_mask != 0, variance),
        noise=float(np.sqrt(variance)),
        x_max=float(x.max()),
    )


def _covariance(jacobian: Floats, held: NDArray[np.bool_], variance: float) -> Floats:
    """From the Gauss-Newton Hessian of the parameters that no bound holds."""
    covariance = np.full((jacobian.shape[1],) * 2, np.nan)
    free = jacobian[:, ~held]
    if free.shape[1] and np.linalg.matrix_rank(free) == free.shape[1]:
        covariance[np.ix_(~held, ~held)] = variance * np.linalg.inv(free.T @ free)
    return covariance
