import dataclasses

import numpy as np
import pytest

from pipelines.scaling.ensemble import fit_ensemble
from pipelines.scaling.fits import fit_form
from pipelines.scaling.forms import FORMS
from pipelines.scaling.posterior import fit_posterior

X = np.geomspace(1e6, 1e9, 40)
LATER = np.array([2e9, 4e9])


def test_each_family_gives_its_own_curves_back():
    p = fit_posterior("P", X, 0.1 + 0.3 * (X / 1e9) ** -0.8)
    assert p.parameters()["k"][0] == pytest.approx(0.8, abs=0.06)
    log_y, variance = p.log_moments(LATER)
    np.testing.assert_allclose(np.exp(log_y), 0.1 + 0.3 * (LATER / 1e9) ** -0.8, rtol=5e-3)
    assert (variance < 1e-4).all()
    level = fit_posterior("L", X, np.exp(-2 + 0.4 * (X / 1e9) ** -0.3))
    np.testing.assert_allclose(level.log_moments(LATER)[0], -2 + 0.4 * (LATER / 1e9) ** -0.3, atol=5e-3)


def test_the_unit_of_x_does_not_matter():
    y = 0.2 + 0.3 * (X / 1e9) ** -0.5
    one, other = fit_ensemble(X, y), fit_ensemble(X / 1e6, y)
    np.testing.assert_allclose(one.predict(LATER), other.predict(LATER / 1e6), rtol=1e-9)


def test_curves_fall_and_stay_positive_whatever_the_points():
    rng = np.random.default_rng(3)
    for _ in range(50):
        law = fit_ensemble(X, rng.uniform(0.1, 1, len(X)))
        found = law.predict(np.geomspace(1e9, 1e10, 20))
        assert (np.diff(found) <= 1e-12).all() and (found > 0).all()


def test_intervals_widen_with_distance_and_cover_what_comes():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        e, b, k = rng.uniform(0, 0.3), rng.uniform(0.1, 0.5), rng.uniform(0.2, 1.2)
        y = (e + b * (X / 1e9) ** -k) * np.exp(rng.normal(0, 0.01, len(X)))
        found = fit_ensemble(X, y).forecast(LATER)
        assert found.log_sd[1] > found.log_sd[0]
        truth = (e + b * (LATER / 1e9) ** -k) * np.exp(rng.normal(0, 0.01, 2))
        inside.append((found.low <= truth) & (truth <= found.high))
    assert np.mean(inside) > 0.85


def test_seeds_that_differ_widen_the_interval():
    x, seeds = np.tile(X, 3), np.repeat([0, 1, 2], len(X))
    y = (0.1 + 0.3 * (x / 1e9) ** -0.5) * np.array([0.9, 1.0, 1.1])[seeds]
    alone, known = fit_ensemble(x, y), fit_ensemble(x, y, seeds)
    assert (known.curve_variance(LATER) > alone.curve_variance(LATER)).all()


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("m1", lambda u: 0.2 * u**-0.4),
        ("m2", lambda u: 0.1 + 0.2 * u**-0.4),
        ("m3", lambda u: 0.2 * (1 / u + 0.5) ** 0.4),
        ("zhai", lambda u: 0.1 + 0.2 * (u + 0.05) ** -0.6),
        ("bnsl1", lambda u: 0.1 + 0.2 * u**-0.2 * (1 + (u / 0.1) ** 2) ** -0.15),
    ],
)
def test_forms_give_their_own_curves_back(name, curve):
    law = fit_form(dataclasses.replace(FORMS[name], starts=6), X, curve(X / 1e9))
    np.testing.assert_allclose(law.predict(LATER), curve(LATER / 1e9), rtol=2e-2)
    found = law.forecast(LATER)
    assert (found.low < found.median).all() and (found.median < found.high).all()


def test_few_points_are_trusted_less_than_their_own_spread_says():
    y = 0.1 + 0.3 * (X / 1e9) ** -0.5
    few, many = fit_ensemble(X[::10], y[::10]), fit_ensemble(X, y)
    assert (few.freedom, many.freedom) == (1, 37)
    for law, least, most in ((few, 3.5, 4.0), (many, 1.02, 1.04)):  # Student's t over the normal, at 90 %
        found = law.forecast(LATER, 0.9)
        width = np.log(found.high / found.median) / (1.645 * found.log_sd)
        assert (width > least).all() and (width < most).all()
