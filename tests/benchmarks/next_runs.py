"""Which strategy of choosing runs forecasts a large run best? Simulated laws with noise."""

import numpy as np

from pipelines.scaling.allocate import optimum
from pipelines.scaling.joint import JointLaw, Runs, fit_joint
from pipelines.scaling.next_run import grid, next_runs

TRIALS = 8
FIRST = 3
"""Sizes and amounts of data of the runs that are there before, each."""
BUDGET = 40.0
"""Times the largest of these runs, for all that follow together."""
TARGET = 300.0
"""Times the largest of these runs: the best size and data for that compute."""
BOOTSTRAPS = 20
NOISE = 0.01


def compare_strategies() -> str:
    """A table; the error is |log(forecast / truth)| of the target's loss."""
    errors: dict[str, list[float]] = {
        "next run": [],
        "star sweep": [],
        "successive halving": [],
        "largest run": [],
    }
    for trial in range(TRIALS):
        for name, error in _trial(trial).items():
            errors[name].append(error)
    lines = [
        f"## Which runs to do next: {TRIALS} simulated laws\n",
        f"{FIRST**2} small runs, then {BUDGET:g} times the FLOPs of the largest; forecast of the best run of "
        f"{TARGET:g} times: |log(forecast / truth)|\n",
        "| strategy | median | mean | worst |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {np.median(values):.4f} | {np.mean(values):.4f} | {np.max(values):.4f} |"
        for name, values in errors.items()
    ]
    return "\n".join(lines) + "\n"


def _trial(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    truth = JointLaw(
        A=float(np.exp(rng.uniform(3, 5))),
        B=float(np.exp(rng.uniform(3, 5))),
        E=float(rng.uniform(0.1, 0.6)),
        alpha=float(rng.uniform(0.25, 0.45)),
        beta=float(rng.uniform(0.25, 0.45)),
    )
    size, data = (
        part.ravel() for part in np.meshgrid(np.geomspace(1e5, 1e6, FIRST), np.geomspace(1e6, 1e7, FIRST))
    )
    largest = 6 * size.max() * data.max()
    target = optimum(truth, TARGET * largest / 6)
    expected = float(np.log(truth.predict(np.array([target[0]]), np.array([target[1]])))[0])

    def measure(n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return truth.predict(n, d) * np.exp(rng.normal(0, NOISE, len(n)))

    start = Runs(size=size, data=data, loss=measure(size, data))

    def error(runs: Runs) -> float:
        law = fit_joint(runs, bootstraps=0).law
        return abs(float(np.log(law.predict(np.array([target[0]]), np.array([target[1]])))[0]) - expected)

    def extended(runs: Runs, n: list[float], d: list[float]) -> Runs:
        more = np.array(n), np.array(d)
        return Runs(
            size=np.append(runs.size, more[0]),
            data=np.append(runs.data, more[1]),
            loss=np.append(runs.loss, measure(*more)),
        )

    return {
        "next run": error(_by_next_run(start, target, BUDGET * largest, extended)),
        "star sweep": error(extended(start, *_star(start, BUDGET * largest))),
        "successive halving": error(_halving(start, BUDGET * largest, extended)),
        "largest run": error(extended(start, *_largest(start, BUDGET * largest))),
    }


def _by_next_run(runs: Runs, target: tuple[float, float], budget: float, extended) -> Runs:
    """One run at a time, each of at most a third of the budget."""
    left = budget
    while left > budget / 20:
        fit = fit_joint(runs, bootstraps=BOOTSTRAPS)
        wish = min(left, budget / 3)
        best = next_runs(fit, target, grid(runs.size, runs.data), flops_factor=6, budget=wish)[0]
        runs = extended(runs, [best.size], [best.data])
        left -= best.flops
    return runs


def _star(runs: Runs, budget: float) -> tuple[list[float], list[float]]:
    """From the largest run along size and along data by 2, 4, 8, ..., while the budget lasts."""
    n, d = float(runs.size.max()), float(runs.data.max())
    sizes, amounts, left, step = [], [], budget, 2.0
    while True:
        for size, data in ((n * step, d), (n, d * step)):
            if 6 * size * data > left:
                return sizes, amounts
            sizes.append(size)
            amounts.append(data)
            left -= 6 * size * data
        step *= 2


def _halving(runs: Runs, budget: float, extended) -> Runs:
    """Eight sizes at little data; the better half goes on with twice the data, until one is left."""
    sizes = np.geomspace(runs.size.min(), 8 * runs.size.max(), 8)
    rounds = 4
    data = budget / rounds / (6 * sizes.sum())
    for _ in range(rounds):
        before = len(runs)
        runs = extended(runs, sizes.tolist(), [data] * len(sizes))
        best = np.argsort(runs.loss[before:])[: max(len(sizes) // 2, 1)]
        sizes = sizes[np.sort(best)]
        data = budget / rounds / (6 * sizes.sum())
    return runs


def _largest(runs: Runs, budget: float) -> tuple[list[float], list[float]]:
    """All in one run, grown evenly."""
    grown = float(np.sqrt(budget / (6 * runs.size.max() * runs.data.max())))
    return [float(runs.size.max()) * grown], [float(runs.data.max()) * grown]
