import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.data.mixture import share_out
from workers.errors import ConfigError


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 16), st.integers(6, 200))
def test_shares_are_whole_lanes_near_the_weights(weights, lanes, units):
    try:
        counts = share_out(weights, units * lanes, lanes)
    except ConfigError:
        assert min(weights) / sum(weights) * units < 1
        return
    assert sum(counts) == units * lanes
    for weight, count in zip(weights, counts, strict=True):
        assert count % lanes == 0
        assert abs(count / lanes - weight / sum(weights) * units) < 1


def test_one_source_gets_all():
    assert share_out([0.3], 64, 8) == [64]


def test_three_to_one():
    assert share_out([3, 1], 64, 8) == [48, 16]
    assert share_out([1, 1, 1], 64, 8) == [24, 24, 16]


def test_a_source_that_would_get_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"data\.mix: source 1 .* gets no sample of a global batch of 64"):
        share_out([100, 1], 64, 8)
