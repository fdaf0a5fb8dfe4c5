import numpy as np
import pytest

from pipelines.scaling.curves import make_curve
from workers.errors import DataError

X = np.geomspace(1e5, 1e8, 24)
Y = 0.1 + 0.5 * (X / 1e5) ** -0.4


def noisy(seed, sigma):
    return Y * np.exp(np.random.default_rng(seed).normal(0, sigma, len(X)))


def test_points_are_sorted_and_copies_left_out():
    order = np.random.default_rng(0).permutation(len(X))
    curve = make_curve("a", [*X[order], X[0]], [*Y[order], Y[0]])
    np.testing.assert_array_equal(curve.x, X)
    assert curve.notes == ("1 exact copies of points left out",)


def test_runs_that_share_their_x_are_kept_and_told():
    curve = make_curve("a", [*X, X[3]], [*Y, Y[3] * 1.01], seeds=["0"] * len(X) + ["1"])
    assert len(curve.x) == len(X) + 1 and curve.seeds is not None
    assert "repeated runs" in curve.notes[0]


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2, 3], [3, 2, 1], "at least 4"),
        ([7, 7, 7, 7], [3, 2, 1, 1.5], "all points are at x = 7"),
        ([1, 2, 3, 4], [3, 2, np.nan, 1], "loss of point 3 is nan"),
        ([1, 2, 3, 4], [3, 2, -1, 1], "loss of point 3 is -1"),
        ([1, 2, 3, 4], [3, 2, 0, 1], "more validation images"),
        ([0, 2, 3, 4], [3, 2, 1, 1], "x of point 1 is 0"),
        ([1, 2, 3, 4], [0.2, 0.5, 0.7, 0.8], "as accuracy does"),
        ([], [], "no points"),
    ],
)
def test_what_no_law_describes_is_refused_with_the_reason(x, y, said):
    with pytest.raises(DataError, match=said):
        make_curve("a", x, y)


def test_double_descent_is_refused_near_the_end_and_told_at_the_beginning():
    def bump(at):
        return np.exp(0.8 * np.exp(-(np.log(X / at) ** 2) / 0.5))

    with pytest.raises(DataError, match="rises again"):
        make_curve("a", X, Y * bump(3e7))
    assert "rose before" in make_curve("a", X, Y * bump(4e6)).notes[0]


@pytest.mark.parametrize("losses", [[2, 1, 0.8, 1.1, 1.4, 1.5], [2, 1, 0.8, 1.1, 1.4], [2, 1, 1.1, 1.4]])
def test_so_is_a_short_curve_that_climbs_at_its_end(losses):
    with pytest.raises(DataError, match="rises again"):
        make_curve("a", 2.0 ** np.arange(len(losses)), losses)


@pytest.mark.parametrize("losses", [[2, 1, 0.8, 1.1], [2, 1, 0.8, 0.82, 0.83], [2, 1, 1.1, 1.2, 0.9, 0.8]])
def test_a_last_step_or_little_may_be_chance(losses):
    assert make_curve("a", 2.0 ** np.arange(len(losses)), losses).notes == ()


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_rise(seed):
    assert make_curve("a", X, noisy(seed, 0.02)).notes == ()


def test_forecasts_reach_as_far_as_backtests():
    assert make_curve("a", X, Y).horizon == 4
    assert make_curve("a", X[-10:], Y[-10:]).horizon == 4
    assert make_curve("a", [1, 2, 4, 8, 16], [5, 4, 3, 2.5, 2]).horizon == 2
    assert make_curve("a", [1, 2, 3, 4], [5, 4, 3, 2.5]).horizon == 1
