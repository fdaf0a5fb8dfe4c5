import numpy as np
import pytest

from pipelines.scaling.joint import JointLaw, Runs, fit_joint
from pipelines.scaling.next_run import grid, next_runs
from workers.errors import ConfigError


@pytest.fixture(scope="module")
def fit():
    size, data = (part.ravel() for part in np.meshgrid(np.geomspace(1e5, 1e6, 4), np.geomspace(1e6, 1e7, 4)))
    law = JointLaw(A=60, B=90, E=0.4, alpha=0.35, beta=0.35)
    loss = law.predict(size, data) * np.exp(np.random.default_rng(0).normal(0, 0.01, 16))
    return fit_joint(Runs(size=size, data=data, loss=loss), bootstraps=20)


def test_the_best_candidate_is_within_the_budget_and_says_why(fit):
    target, budget = (1e7, 1e8), 1e15
    found = next_runs(
        fit, target, grid(np.array([1e5, 1e6]), np.array([1e6, 1e7])), flops_factor=6, budget=budget
    )
    assert all(1e14 <= one.flops <= budget for one in found)
    assert [one.gain_per_flop for one in found] == sorted((one.gain_per_flop for one in found), reverse=True)
    assert "the most per FLOP" in found[0].reason and "number 2 per FLOP" in found[1].reason


def test_a_run_near_the_target_tells_more_of_it_than_one_far_below(fit):
    target = (1e7, 1e8)
    found = next_runs(fit, target, [(5e6, 5e7), (2e5, 3e6)], flops_factor=1, budget=1e15)
    assert [one.size for one in found] == [5e6]  # the other is too small for this budget
    near, far = (
        next_runs(fit, target, [place], flops_factor=1, budget=place[0] * place[1] * 2)[0]
        for place in [(5e6, 5e7), (2e5, 3e6)]
    )
    assert near.gain > far.gain and near.target_sd < far.target_sd


def test_a_budget_that_no_candidate_fits_is_refused(fit):
    with pytest.raises(ConfigError, match="the candidates take"):
        next_runs(fit, (1e7, 1e8), [(1e6, 1e7)], flops_factor=6, budget=1e9)
