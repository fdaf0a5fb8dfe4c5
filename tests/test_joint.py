import numpy as np
import pytest
from scipy.optimize import check_grad

from pipelines.scaling.allocate import allocate, isoflop, optimum
from pipelines.scaling.joint import JointLaw, Runs, _Problem, effective_data, fit_joint
from workers.errors import ConfigError, DataError

TRUTH = JointLaw(A=477.8, B=2143.9, E=1.8172, alpha=0.3473, beta=0.3672)


def simulated(seed=0, noise=0.004, repeated=False):
    """Sizes at nine budgets, as Hoffmann et al. laid them out: 57 M to 16 B parameters."""
    rng = np.random.default_rng(seed)
    compute = np.repeat(np.geomspace(6e18, 3e21, 9), 26)
    best = np.sqrt(compute / 6 / 20)
    size = best * np.exp(rng.uniform(-1.5, 1.5, len(compute)))
    data = compute / 6 / size
    unique = np.minimum(data, 2e9) if repeated else None
    law = JointLaw(**{**TRUTH.values(), "r": 5.0}) if repeated else TRUTH
    loss = law.predict(size, data, unique) * np.exp(rng.laplace(0, noise, len(size)))
    return Runs(size=size, data=data, loss=loss, unique=unique)


def test_noiseless_runs_give_the_law_back():
    law = fit_joint(simulated(noise=0), bootstraps=0).law
    for name, value in TRUTH.values().items():
        assert law.values()[name] == pytest.approx(value, rel=1e-3)


def test_outliers_hardly_move_it():
    runs = simulated()
    loss = runs.loss.copy()
    loss[::20] *= 1.5
    law = fit_joint(Runs(size=runs.size, data=runs.data, loss=loss), bootstraps=0).law
    clean = fit_joint(runs, bootstraps=0).law
    assert law.alpha == pytest.approx(clean.alpha, abs=0.02) and pytest.approx(clean.E, abs=0.04) == law.E


@pytest.mark.parametrize("repeated", [False, True])
def test_gradients_are_those_of_the_objective(repeated):
    runs = simulated(repeated=repeated)
    problem = _Problem(runs)
    counts = np.random.default_rng(1).integers(0, 3, len(runs)).astype(float)
    p = np.array([-1.2, -1.4, 0.5, 0.3, 0.4, 1.0][: 5 + repeated])
    _, gradient = problem.objective(p, counts)
    off = check_grad(lambda q: problem.objective(q, counts)[0], lambda q: problem.objective(q, counts)[1], p)
    assert off < 1e-3 * np.linalg.norm(gradient)


def test_repeated_data_are_worth_less_and_that_is_found():
    assert effective_data(np.array([5.0]), np.array([10.0]), 3.0)[0] == 5
    worth = effective_data(np.array([10.0, 20.0, 1e9]), np.array([10.0, 10.0, 10.0]), 3.0)
    assert worth[0] == 10 and 10 < worth[1] < 20 and worth[2] == pytest.approx(40)
    law = fit_joint(simulated(repeated=True, noise=0.001), bootstraps=0).law
    assert law.r == pytest.approx(5.0, rel=0.3)


def test_standard_errors_are_the_spread_over_fresh_data():
    laws = [fit_joint(simulated(seed), bootstraps=0).law for seed in range(6)]
    errors = fit_joint(simulated(0), bootstraps=25).errors()
    for name in ("E", "alpha", "beta"):
        spread = np.std([law.values()[name] for law in laws])
        assert 0.3 < errors[name] / spread < 3


def test_allocation_is_the_minimum_of_the_isoflop_curve():
    sizes = np.geomspace(1e8, 1e12, 4001)
    size, data = optimum(TRUTH, 1e21 / 6)
    assert size * data == pytest.approx(1e21 / 6)
    assert size == pytest.approx(sizes[isoflop(TRUTH, 1e21, sizes, 6).argmin()], rel=3e-3)
    fit = fit_joint(simulated(), bootstraps=20)
    found = allocate(fit, 1e21, flops_factor=6, largest=3e21, confidence=0.9)
    assert found.size_low < found.size < found.size_high and found.loss_low < found.loss < found.loss_high
    with pytest.raises(ConfigError, match="333 times the largest run"):
        allocate(fit, 1e24, flops_factor=6, largest=3e21, confidence=0.9)
    assert allocate(
        fit, 1e24, flops_factor=6, largest=3e21, confidence=0.9, extrapolate=True
    ).beyond_backtests


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": np.full(234, 1e9)}, "size: 1 different value in"),
        ({"loss": np.full(234, np.nan)}, "loss of run 1 is nan"),
        ({"loss": 1 / simulated().loss}, "rise with size and with data, as accuracy does"),
    ],
)
def test_runs_that_determine_no_law_are_refused(change, said):
    runs = simulated()
    with pytest.raises(DataError, match=said):
        fit_joint(Runs(**{"size": runs.size, "data": runs.data, "loss": runs.loss, **change}), bootstraps=0)
    with pytest.raises(DataError, match="5 runs"):
        fit_joint(runs.take(np.arange(5)), bootstraps=0)
