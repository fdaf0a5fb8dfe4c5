import numpy as np

from pipelines.scaling.frontier import fit_frontier, is_best


def test_a_run_is_on_the_frontier_if_every_cheaper_one_is_worse():
    compute, loss = np.array([4.0, 1, 2, 2, 3, 8]), np.array([0.5, 0.9, 0.8, 0.7, 0.75, 0.4])
    assert is_best(compute, loss).tolist() == [True, True, False, True, False, True]


def test_a_frontier_of_the_form_is_forecast_within_its_interval():
    compute = np.geomspace(1e17, 6e21, 27)

    def truth(c):
        return 0.1 + 0.6 * (c / 1e18 + 0.5) ** -0.25

    noise = np.random.default_rng(0).normal(0, 0.02, len(compute))
    law = fit_frontier(compute, truth(compute) * np.exp(noise))
    later = np.array([2e22, 6e22])
    found = law.forecast(later)
    assert (found.low < truth(later)).all() and (truth(later) < found.high).all()
    assert ((found.high - found.low) / found.median < 0.4).all()
