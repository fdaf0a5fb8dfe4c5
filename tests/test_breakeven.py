import numpy as np
import pytest

from pipelines.scaling.breakeven import break_even
from pipelines.scaling.curves import make_curve
from workers.errors import DataError

X = np.geomspace(1e6, 1e9, 40)


def curve(name, e, b, k, x=X, seed=0, noise=0.005):
    y = (e + b * (x / 1e9) ** -k) * np.exp(np.random.default_rng(seed).normal(0, noise, len(x)))
    return make_curve(name, x, y)


def test_a_crossing_between_measured_points_is_found():
    vit, cnn = curve("vit", 0, 0.1, 0.5), curve("cnn", 0, 0.15, 0.3, seed=1)
    truth = 1e9 * (0.1 / 0.15) ** (1 / 0.2)
    found = break_even(vit, cnn, confidence=0.9)
    assert found.low < truth < found.high and found.low < found.median < found.high
    assert found.median == pytest.approx(truth, rel=0.15)
    assert found.never < 0.05 and found.not_before <= truth <= found.not_after
    assert "overtakes" in found.sentence()


def test_a_crossing_that_must_be_forecast_has_a_wide_interval_and_a_chance_of_none():
    early = X[X < 2e8]
    vit, cnn = curve("vit", 0, 0.1, 0.5, early), curve("cnn", 0, 0.11, 0.4, early, seed=1)
    found = break_even(vit, cnn, confidence=0.9)
    truth = 1e9 * (0.1 / 0.11) ** (1 / 0.1)
    assert found.low < truth and (found.high is None or found.high > truth)
    assert 0 < found.never < 1
    assert "no crossing up to" in found.sentence()


def test_families_that_never_or_always_win_are_said_to():
    vit, cnn = curve("vit", 0.1, 0.3, 0.4), curve("cnn", 0.05, 0.2, 0.4, seed=1)
    found = break_even(vit, cnn, confidence=0.9)
    assert found.never > 0.99 and found.median is None and found.not_after is None
    assert found.sentence() == "vit does not overtake cnn up to 4e+09"
    found = break_even(cnn, vit, confidence=0.9)
    assert found.always > 0.99 and "throughout" in found.sentence()


def test_curves_without_a_common_range_are_refused():
    with pytest.raises(DataError, match="share no range"):
        break_even(curve("a", 0, 1, 1, X[:10]), curve("b", 0, 1, 1, X[20:]), confidence=0.9)
