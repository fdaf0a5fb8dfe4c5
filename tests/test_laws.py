import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.scaling.laws import PowerLaw, error_rate, fit_power_law, wilson_interval
from workers.errors import ConfigError

SIZES = [100, 200, 400, 800, 1437]


def noisy(seed, n=6, c=0.4):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(10, 10_000, n))
    return x, 2.0 * x**-c * np.exp(rng.normal(0, 0.1, n))


@given(
    st.floats(1e-3, 1e3),
    st.floats(-2, 2),
    st.lists(st.floats(1e-2, 1e8), min_size=2, max_size=12, unique=True).filter(
        lambda x: max(x) > 2 * min(x)
    ),
)
def test_noiseless_points_give_the_law_back(b, c, x):
    law = fit_power_law(x, b * np.array(x) ** -c)
    assert law.c == pytest.approx(c, abs=1e-9)
    assert law.b == pytest.approx(b, rel=1e-7)
    assert law.rmsle < 1e-10
    assert law.num_points == len(x)
    assert law.x_range == (min(x), max(x))
    np.testing.assert_allclose(law.predict(x), b * np.array(x) ** -c, rtol=1e-8)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e9), st.integers(3, 12))
def test_unit_of_x_changes_b_alone(seed, unit, n):
    x, y = noisy(seed, n)
    law, other = fit_power_law(x, y), fit_power_law(x * unit, y)
    assert other.c == pytest.approx(law.c, rel=1e-9)
    assert other.c_interval() == pytest.approx(law.c_interval(), rel=1e-6)
    assert other.rmsle == pytest.approx(law.rmsle, rel=1e-6)
    assert other.b == pytest.approx(law.b * unit**law.c, rel=1e-7)
    np.testing.assert_allclose(other.predict(x * unit), law.predict(x), rtol=1e-9)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_unit_of_y_changes_b_alone(seed, unit):
    x, y = noisy(seed)
    law, other = fit_power_law(x, y), fit_power_law(x, y * unit)
    assert (other.c, other.b) == pytest.approx((law.c, law.b * unit), rel=1e-9)


def test_agrees_with_scipy_linregress():
    x, y = noisy(7)
    law, reference = fit_power_law(x, y), stats.linregress(np.log(x), np.log(y))
    assert (-law.c, np.log(law.b)) == pytest.approx((reference.slope, reference.intercept))
    assert (law.c_error, law.log_b_error) == pytest.approx((reference.stderr, reference.intercept_stderr))
    half = stats.t.ppf(0.95, df=4) * reference.stderr
    assert law.c_interval(0.9) == pytest.approx((law.c - half, law.c + half))


def test_interval_covers_as_often_as_it_says():
    x = np.geomspace(100, 1600, 5)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = fit_power_law(x, x**-0.5 * np.exp(rng.normal(0, 0.2, 5))).c_interval(0.9)
        hits += low <= 0.5 <= high
    assert hits / 2000 == pytest.approx(0.9, abs=0.02)


def test_three_points_have_one_degree_of_freedom():
    x, y = noisy(3, n=3)
    law = fit_power_law(x, y)
    low, high = law.c_interval()
    assert (high - low) / 2 == pytest.approx(12.706204736 * law.c_error)


def test_two_points_have_no_interval():
    law = fit_power_law([100, 400], [0.2, 0.1])
    assert (law.c, law.b) == pytest.approx((0.5, 2.0))
    assert (law.c_error, law.log_b_error, law.c_interval()) == (None, None, None)


def test_forecasts_stop_where_backtests_do():
    law = fit_power_law([100, 200, 400], [0.4, 0.2, 0.1])
    assert law.predict([1, 800]) == pytest.approx([40, 0.05])
    assert law.predict(800).shape == ()
    with pytest.raises(ConfigError, match=r"801 is beyond 2 times the largest fitted x \(400\)"):
        law.predict([100, 801])
    assert law.predict(4000, extrapolate=True) == pytest.approx(0.01)


def test_limit_of_a_law_is_its_own():
    law = PowerLaw(
        b=1,
        c=1,
        log_b_error=None,
        c_error=None,
        rmsle=0,
        num_points=2,
        x_range=(1, 10),
        extrapolation_limit=4,
    )
    assert law.predict(40) == pytest.approx(1 / 40)
    with pytest.raises(ConfigError, match="beyond 4 times"):
        law.predict(41)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1], [1], "at least 2 points, not 1"),
        ([], [], "at least 2 points, not 0"),
        ([1, 2], [0.1, 0], r"y\[1\] is 0;"),
        ([1, 2, 3], [0.1, 0.1, -0.5], r"y\[2\] is -0.5;"),
        ([float("nan"), 2], [0.1, 0.1], r"x\[0\] is nan;"),
        ([1, float("inf")], [0.1, 0.1], r"x\[1\] is inf;"),
        ([5, 5, 5], [0.1, 0.2, 0.3], "all 3 points are at 5;"),
        ([1, 2], [0.1], r"shapes \(2,\) and \(1,\)"),
        ([[1, 2]], [[0.1, 0.2]], r"shapes \(1, 2\) and"),
    ],
)
def test_refuses_by_name(x, y, message):
    with pytest.raises(ConfigError, match=message):
        fit_power_law(x, y)


def test_predict_refuses_what_has_no_logarithm():
    with pytest.raises(ConfigError, match="x is 0;"):
        fit_power_law([1, 2], [1, 2]).predict(0)


@given(st.integers(1, 100_000), st.data())
def test_error_rate_lies_strictly_inside_and_near_the_share(n, data):
    errors = data.draw(st.integers(0, n))
    rate = error_rate(errors, n)
    assert 0 < rate < 1
    assert abs(rate - errors / n) <= 0.5 / (n + 1) + 1e-15
    assert rate == pytest.approx(1 - error_rate(n - errors, n))


def test_error_rate_by_hand():
    assert [error_rate(e, 9) for e in (0, 1, 9)] == pytest.approx([0.05, 0.15, 0.95])


def test_no_errors_at_all_can_be_fitted():
    law = fit_power_law(SIZES, [error_rate(errors, 360) for errors in (90, 40, 15, 4, 0)])
    assert law.c > 1
    assert np.isfinite(law.b)


@given(st.integers(1, 5000), st.floats(0.5, 0.999), st.data())
def test_wilson_agrees_with_scipy(n, confidence, data):
    errors = data.draw(st.integers(0, n))
    expected = stats.binomtest(errors, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(errors, n, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= errors / n + 1e-15 and errors / n - 1e-15 <= high <= 1


def test_wilson_is_exact_at_both_ends():
    assert wilson_interval(0, 360)[0] == 0.0
    assert wilson_interval(360, 360)[1] == 1.0
    assert wilson_interval(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "n is 0"),
        ((-1, 5), "errors is -1, of n = 5"),
        ((6, 5), "errors is 6"),
        ((1, 5, 1.0), "confidence is 1.0"),
    ],
)
def test_wilson_refuses_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        wilson_interval(*arguments)
