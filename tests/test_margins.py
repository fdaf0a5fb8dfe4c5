"""The tests of gates: their error rates, and known values."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from workers.evaluation.margins import (
    _score,
    binomial_tail,
    bootstrap_low,
    excess_p,
    share_high,
    share_low,
)

ALPHA = 0.05
TRIES = 2000
LUCK = 3 * math.sqrt(ALPHA * (1 - ALPHA) / TRIES)
"""Three standard deviations of a share of so many."""


def shares(discordance: float, delta: float) -> list[float]:
    """Of images right for the one alone, for the other alone, and of the rest."""
    b, c = (discordance + delta) / 2, (discordance - delta) / 2
    return [b, c, 1 - b - c]


def rejections(images: int, discordance: float, delta: float, alpha: float = ALPHA) -> dict[str, float]:
    """How often 2,000 challengers that are exactly at the margin pass each test."""
    counts = np.random.default_rng(7).multinomial(images, shares(discordance, delta), TRIES)
    pairs, which = np.unique(counts[:, :2], axis=0, return_inverse=True)
    exact = [excess_p(int(b), int(c), images, delta, alpha / 50) <= alpha for b, c in pairs]
    drawn = [bootstrap_low(int(b), int(c), images, alpha) > delta for b, c in pairs]
    both = np.array(exact) & np.array(drawn)
    found = {"mcnemar": np.array(exact), "bootstrap": both, "bootstrap alone": np.array(drawn)}
    return {name: float(passes[which.ravel()].mean()) for name, passes in found.items()}


@pytest.mark.parametrize(
    ("images", "discordance", "delta"),
    [
        (50, 0.1, 0.0),
        (50, 0.1, -0.05),
        (91, 0.02, -0.02),  # no image of the challenger's alone
        (91, 0.3, -0.01),
        (395, 0.03, 0.0),
        (395, 0.05, -0.02),
    ],
)
def test_who_is_exactly_at_the_margin_passes_no_more_often_than_alpha(
    images: int, discordance: float, delta: float
) -> None:
    found = rejections(images, discordance, delta)
    assert found["mcnemar"] <= ALPHA + LUCK
    assert found["bootstrap"] <= ALPHA + LUCK


@pytest.mark.parametrize(("images", "delta"), [(20, -0.1), (35, -0.05), (20, 0.1)])
@pytest.mark.parametrize("discordance", [0.12, 0.4])
def test_the_error_rate_of_all_outcomes_together(images: int, delta: float, discordance: float) -> None:
    """Not of some that were drawn: each outcome with its probability."""
    rate = sum(
        stats.multinomial.pmf([b, c, images - b - c], images, shares(discordance, delta))
        for b in range(images + 1)
        for c in range(images + 1 - b)
        if excess_p(b, c, images, delta) <= ALPHA
    )
    assert 0 < rate <= ALPHA


def test_the_bootstrap_alone_is_wrong_too_often_where_few_images_tell() -> None:
    """Which is why a gate does not let it decide alone."""
    assert bootstrap_low(4, 0, 91, ALPHA) > 0
    assert excess_p(4, 0, 91, 0.0) == 1 / 16
    assert rejections(91, 0.1, -0.005)["bootstrap alone"] > ALPHA + LUCK


def test_a_challenger_that_is_as_good_is_found_to_be() -> None:
    counts = np.random.default_rng(1).multinomial(2000, shares(0.04, 0.0), 60)
    assert np.mean([excess_p(int(b), int(c), 2000, -0.02) <= ALPHA for b, c, _ in counts]) > 0.9
    assert excess_p(0, 0, 2000, -0.02) <= ALPHA
    assert excess_p(0, 0, 10, -0.02) > ALPHA


def test_without_a_margin_it_is_mcnemars_exact_test() -> None:
    for b, c in ((5, 0), (12, 7), (3, 9), (0, 0)):
        expected = stats.binomtest(b, b + c, alternative="greater").pvalue if b + c else 1.0
        assert excess_p(b, c, 100, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize("delta", [-0.05, 0.03])
@pytest.mark.parametrize(("b", "c"), [(8, 3), (0, 6), (6, 0), (20, 20)])
def test_the_statistic_is_of_the_most_likely_shares_at_the_margin(b: int, c: int, delta: float) -> None:
    total = 200

    def negative(share: float) -> float:
        return -float(
            stats.multinomial.logpmf(
                [b, c, total - b - c], total, [share + delta, share, 1 - 2 * share - delta]
            )
        )

    found = optimize.minimize_scalar(
        negative, bounds=(max(1e-9, -delta + 1e-9), 0.5), method="bounded", options={"xatol": 1e-10}
    )
    deviation = math.sqrt(total * (2 * found.x + delta - delta**2))
    assert float(_score(b, c, total, delta)) == pytest.approx((b - c - total * delta) / deviation, rel=1e-3)


def test_many_images_agree_with_the_normal_limit() -> None:
    score = float(_score(2450, 2550, 50_000, -0.005))
    assert excess_p(2450, 2550, 50_000, -0.005) == pytest.approx(stats.norm.sf(score), abs=0.003)
    assert excess_p(100_000, 101_000, 2_000_000, -0.001) == pytest.approx(
        stats.norm.sf(float(_score(100_000, 101_000, 2_000_000, -0.001)))
    )


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (355, 395)])
def test_shares_have_clopper_and_pearsons_bounds(count: int, total: int) -> None:
    exact = stats.binomtest(count, total).proportion_ci(0.9)
    assert share_low(count, total, 0.05) == pytest.approx(exact.low, abs=1e-9)
    assert share_high(count, total, 0.05) == pytest.approx(exact.high, abs=1e-9)
    assert binomial_tail(count, total, 0.4) == pytest.approx(stats.binom.sf(count - 1, total, 0.4))
