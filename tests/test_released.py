"""M4 as released: its steps, and that padding changes nothing."""

import numpy as np

from pipelines.scaling import released
from pipelines.scaling.released import ReleasedM4, fit_released


def test_curves_of_other_lengths_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(released, "DESCENT_STEPS", 20)
    monkeypatch.setattr(released, "DESCENT_ROUNDS", 3)
    monkeypatch.setattr(released, "MAX_ROUNDS", 8)
    x = np.geomspace(1e6, 1e9, 30)
    y = 0.1 + 0.4 * (x / 1e6) ** -0.3
    together = fit_released([(x, y), (x[:9], y[:9])])
    for one, alone in zip(together, [fit_released([(x, y)]), fit_released([(x[:9], y[:9])])], strict=True):
        np.testing.assert_allclose(one.predict(x), alone[0].predict(x), rtol=1e-9)


def test_first_round_is_least_squares_of_the_transformed_equation(monkeypatch):
    monkeypatch.setattr(released, "DESCENT_STEPS", 0)
    monkeypatch.setattr(released, "MAX_ROUNDS", 1)
    x = np.geomspace(10, 1e4, 20)
    law = fit_released([(x, 0.2 + 0.5 * x**-0.5)])[0]
    assert law.e0 == 1.0
    assert law.e == 0.2 + 0.5 * 1e4**-0.5 - 1e-3  # as released: it starts just below the smallest loss
    assert law.c < 0 and law.a >= 0


def test_predictions_solve_the_equation():
    law = ReleasedM4(e=0.1, e0=1.0, a=0.7, log_b=1.0, c=-0.3)
    x = np.array([1e3, 1e5])
    y = law.predict(x)
    np.testing.assert_allclose((y - 0.1) / (1 - y) ** 0.7, np.e * x**-0.3, rtol=2e-3)
