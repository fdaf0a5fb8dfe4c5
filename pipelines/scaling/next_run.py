"""Which run to do next: the one that says most about the target per FLOP.

The bootstrap's draws of a law in size and data are a sample of what may be true. If a run at candidate c
were done, the variance of the target's log loss would fall by cov(target, c)^2 / (var(c) + noise^2)
(Gaussian conditioning, as in Bayesian experimental design: Chaloner and Verdinelli 1995). The structural
part of a forecast belongs to both variances and to the covariance, and small runs have one of their own,
so that large runs are worth more than the fitted form alone would say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.scaling.curves import Floats
from pipelines.scaling.joint import JointFit
from workers.errors import ConfigError

SMALLEST = 0.1
"""Of the budget: a ratio per FLOP would else choose the tiniest run."""
CANDIDATES = 9
"""Of sizes and of amounts of data, each."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    size: float
    data: float
    flops: float
    target_sd: float
    """Standard deviation of the target's log loss after the run."""
    gain: float
    """By how much the run would reduce the variance."""
    reason: str

    @property
    def gain_per_flop(self) -> float:
        return self.gain / self.flops


def next_runs(
    fit: JointFit,
    target: tuple[float, float],
    candidates: Sequence[tuple[float, float]],
    *,
    flops_factor: float,
    budget: float,
) -> list[Candidate]:
    """Candidates (size, data) of a tenth of the budget to all of it, the best per FLOP first.

    ConfigError if there are none.
    """
    allowed = [(n, d) for n, d in candidates if SMALLEST * budget <= flops_factor * n * d <= budget]
    if not allowed:
        costs = [flops_factor * n * d for n, d in candidates]
        raise ConfigError(
            f"a next run for {budget:g} FLOPs: the candidates take {min(costs):.3g} to {max(costs):.3g}"
        )
    size, data = np.array([target, *allowed]).T
    logs = np.array([np.log(draw.predict(size, data)) for draw in fit.draws])
    covariance = np.cov(logs.T) + fit.structural(size, data)
    own = _far_below(fit, size, data) + fit.noise**2
    before = float(covariance[0, 0])
    ranked = []
    for row, (n, d) in enumerate(allowed, start=1):
        gain = float(covariance[0, row]) ** 2 / (float(covariance[row, row]) + float(own[row]))
        after, flops = float(np.sqrt(max(before - gain, 0.0))), flops_factor * n * d
        reason = (
            f"{n:.3g} x {d:.3g} takes {flops:.3g} FLOPs and brings the standard deviation of the target's "
            f"log loss from {np.sqrt(before):.4f} to {after:.4f}: of {len(allowed)} candidates within "
            f"{budget:.3g} FLOPs "
        )
        ranked.append(Candidate(size=n, data=d, flops=flops, target_sd=after, gain=gain, reason=reason))
    ranked.sort(key=lambda one: -one.gain_per_flop)
    places = ["the most per FLOP", *(f"number {place} per FLOP" for place in range(2, len(ranked) + 1))]
    return [
        Candidate(**{**vars(one), "reason": one.reason + place})
        for one, place in zip(ranked, places, strict=True)
    ]


def _far_below(fit: JointFit, size: Floats, data: Floats) -> Floats:
    """Variance (n,) of a small run's own: the form bends there, too, and so it tells less
    of the target. As much as as far beyond the largest run."""
    n_max, d_max = fit.end
    mirrored = n_max**2 / size, d_max**2 / data
    return np.diag(fit.structural(*mirrored))


def grid(sizes: Floats, data: Floats) -> list[tuple[float, float]]:
    """Candidates about the runs (n,) that there are: up to four times the largest size and amount of data."""
    steps = [np.geomspace(values.min(), 4 * values.max(), CANDIDATES) for values in (sizes, data)]
    return [(float(n), float(d)) for n in steps[0] for d in steps[1]]
