"""Is one model better than another, or not worse by more than a margin? Tests whose error rate holds at any
number of images.

Of n images b are right for the one model alone and c for the other alone; all others say nothing. The null
hypothesis is p_b - p_c <= delta. At delta = 0 it is tested by McNemar's exact test: given b + c, b is
binomial with 1/2. Otherwise by the exact unconditional test of the score statistic: how probable is a
statistic as large as this one at the worst discordance p_b + p_c that the data leave possible (Tango 1998,
Statistics in Medicine 17:891, for the statistic; Liu et al. 2002, ibid. 21:231, and Sidik 2003, ibid. 22:265,
for tests of this kind; Berger and Boos 1994, JASA 89:1012, for the limit to what is possible).
"""

import functools
import math

import numpy as np
import numpy.typing as npt

from workers.evaluation.intervals import COUNT_RESAMPLES, SEED

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DEVIATIONS = 7.0
"""Counts farther from their means than so many standard deviations have a probability of 1e-11."""
NUISANCES = 13
"""Discordances that are tried; the p value changes little between them."""
MAX_CELLS = 4_000_000
"""Pairs of counts that are added up; where there are more, at some 200,000 images, the normal limit is good
to four digits."""


def excess_p(more: int, fewer: int, total: int, delta: float, possible: float = 0.001) -> float:
    """One-sided p value of p_b - p_c <= delta, -1 < delta < 1, after b = `more` and c = `fewer` of `total`.

    Of a null hypothesis that is true, values of at most alpha come no more often than alpha. `possible`: the
    probability that the discordance is beyond what is thought possible; part of the p value, so a fiftieth
    of alpha is right.
    """
    if delta == 0:
        return binomial_tail(more, more + fewer, 0.5)
    statistic = _score(more, fewer, total, delta)
    if statistic <= 0:
        return 1.0  # it says nothing against the null hypothesis
    low = max(share_low(more + fewer, total, possible / 2), abs(delta))
    high = share_high(more + fewer, total, possible / 2)
    if high < low:
        return possible
    b, c = (_range(total, low, high, way) for way in (delta, -delta))
    if len(b) * len(c) > MAX_CELLS:
        return 0.5 * math.erfc(float(statistic) / math.sqrt(2))
    reached = _score(b[:, None], c[None, :], total, delta) >= statistic - 1e-9
    reached &= b[:, None] + c[None, :] <= total
    at_b, at_c = np.nonzero(reached)
    if not len(at_b):
        return possible
    b, c = b[at_b], c[at_c]
    logs = _log_factorials(total)
    ways = logs[total] - logs[b] - logs[c] - logs[total - b - c]
    worst = max(
        float(np.exp(ways + _log_power(b, c, total, discordance, delta)).sum())
        for discordance in np.linspace(low, high, NUISANCES)
    )
    return min(1.0, worst + possible)


def bootstrap_low(more: int, fewer: int, total: int, alpha: float) -> float:
    """Lower end of the one-sided percentile bootstrap interval of p_b - p_c; images are drawn anew."""
    shares = np.array([more, fewer, total - more - fewer]) / total
    draws = np.random.default_rng(SEED).multinomial(total, shares, COUNT_RESAMPLES)
    return float(np.quantile((draws[:, 0] - draws[:, 1]) / total, alpha))


def binomial_tail(count: int, total: int, share: float) -> float:
    """Of at least so many of a binomial's `total`."""
    if count <= 0:
        return 1.0
    if share in (0.0, 1.0):
        return share
    logs, k = _log_factorials(total), np.arange(count, total + 1)
    terms = logs[total] - logs[k] - logs[total - k] + k * math.log(share) + (total - k) * math.log1p(-share)
    return min(1.0, float(np.exp(terms).sum()))


def share_low(count: int, total: int, alpha: float) -> float:
    """Lower end of the exact one-sided interval of a share (Clopper and Pearson 1934): it is above the share
    itself with a probability of at most alpha."""
    if count == 0:
        return 0.0
    low, high = 0.0, count / total
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if binomial_tail(count, total, middle) > alpha else (middle, high)
    return low


def share_high(count: int, total: int, alpha: float) -> float:
    return 1.0 - share_low(total - count, total, alpha)


def _score(b: npt.ArrayLike, c: npt.ArrayLike, total: int, delta: float) -> Floats:
    """Tango's statistic: b - c - n delta over its standard deviation by the most likely p_c."""
    b, c = np.asarray(b, np.float64), np.asarray(c, np.float64)
    linear = -b - c + (2 * total - b + c) * delta
    constant = -c * delta * (1 - delta)
    root = np.sqrt(np.maximum(linear**2 - 8 * total * constant, 0))
    share = np.maximum((root - linear) / (4 * total), max(0.0, -delta))
    variance = total * (2 * share + delta * (1 - delta))
    score: Floats = (b - c - total * delta) / np.sqrt(np.maximum(variance, 1e-300))
    return score


def _range(total: int, low: float, high: float, difference: float) -> Counts:
    """Counts of p = (discordance + difference) / 2 that are not out of the question."""
    few, many = ((discordance + difference) / 2 for discordance in (low, high))
    spread = DEVIATIONS * math.sqrt(total * min(many, 0.5) * max(1 - few, 0.5)) + DEVIATIONS**2
    first = max(0, math.floor(total * few - spread))
    return np.arange(first, min(total, math.ceil(total * many + spread)) + 1)


def _log_power(b: Counts, c: Counts, total: int, discordance: float, delta: float) -> Floats:
    """Log probability of one arrangement with these counts."""
    tiny = 1e-300
    p_b, p_c = max((discordance + delta) / 2, tiny), max((discordance - delta) / 2, tiny)
    rest = math.log(max(1 - discordance, tiny))
    power: Floats = b * math.log(p_b) + c * math.log(p_c) + (total - b - c) * rest
    return power


@functools.lru_cache(maxsize=8)
def _log_factorials(total: int) -> Floats:
    """(total + 1,)"""
    logs: Floats = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    return logs
