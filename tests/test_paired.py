"""Paired comparisons against scipy, closed forms and simulated experiments."""

import math

import numpy as np
import pytest
from scipy import stats

from workers.errors import DataError
from workers.evaluation.paired import difference, mcnemar, pair
from workers.evaluation.predictions import Predictions


def made(ordinals, labels, classes):
    size = len(ordinals)
    return Predictions(
        ordinals=np.array(ordinals, np.int64),
        labels=np.array(labels, np.int32),
        classes=np.array(classes, np.int32),
        confidences=np.ones(size, np.float32),
        in_top5=np.ones(size, bool),
        losses=np.zeros(size, np.float32),
    )


def discordant(only_first, only_second, both=5):
    first = [True] * only_first + [False] * only_second + [True] * both
    second = [False] * only_first + [True] * only_second + [True] * both
    return np.array(first), np.array(second)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (2, 11), (40, 71), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    result = mcnemar(*discordant(b, c))
    assert (result.only_first, result.only_second) == (b, c)
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_does_not_depend_on_who_is_first():
    first, second = discordant(4, 17)
    assert mcnemar(first, second).p_value == mcnemar(second, first).p_value


def test_the_interval_of_one_run_is_that_of_a_paired_mean():
    """With 4,000 images the bootstrap's ends are those of the normal approximation."""
    generator = np.random.default_rng(1)
    first = generator.random(4000) < 0.6
    second = np.where(generator.random(4000) < 0.2, generator.random(4000) < 0.8, first)
    found = difference(first, second)
    gains = second.astype(float) - first
    error = gains.std() / math.sqrt(gains.size)
    assert found.value == found.by_run[0] == pytest.approx(gains.mean(), abs=1e-12)
    assert found.interval.low == pytest.approx(gains.mean() - 1.96 * error, abs=0.15 * error)
    assert found.interval.high == pytest.approx(gains.mean() + 1.96 * error, abs=0.15 * error)
    unpaired = math.sqrt((first.var() + second.var()) / gains.size)
    assert error < 0.7 * unpaired  # what pairing is for
    assert found.excludes_zero


def test_swapped_models_mirror_the_difference():
    generator = np.random.default_rng(2)
    first, second = generator.random((2, 3, 300)) < [[[0.5]], [[0.6]]]
    there, back = difference(first, second), difference(second, first)
    assert back.value == -there.value
    assert back.interval.low == pytest.approx(-there.interval.high, abs=1e-12)
    assert back.by_run == tuple(-value for value in there.by_run)


def test_equal_models_differ_by_nothing():
    same = np.random.default_rng(3).random((3, 50)) < 0.5
    found = difference(same, same)
    assert (found.value, *found.interval) == (0, 0, 0)
    assert not found.excludes_zero


def test_runs_that_disagree_widen_the_interval():
    """Two seeds better by 0.2, two worse by 0.2: images alone would call the mean difference exact."""
    size = 400
    base = np.zeros((4, size), bool)
    base[:, : size // 2] = True
    other = base.copy()
    other[:2, size // 2 : size // 2 + 80] = True
    other[2:, :80] = False
    found = difference(base, other)
    assert found.value == 0 and found.by_run == pytest.approx((0.2, 0.2, -0.2, -0.2))
    assert found.interval.low == pytest.approx(-0.2, abs=0.05)
    assert found.interval.high == pytest.approx(0.2, abs=0.05)


def test_the_interval_covers_the_truth():
    """Of 15 experiments of 6 seeds and 60 images, with effects of both: 14 are to be expected."""
    generator = np.random.default_rng(4)
    covered = 0
    truth = 0.1
    for _ in range(15):
        easy = generator.random((1, 60))
        luck = generator.normal(0, 0.05, (6, 1))
        noise = generator.random((6, 60))
        first = 0.5 * (easy + noise) < 0.5
        second = first | (generator.random((6, 60)) < 2 * (truth + luck))
        found = difference(first, second)
        covered += found.interval.low <= truth <= found.interval.high
    assert covered >= 12


def test_images_are_paired_by_their_ordinals():
    first = made([0, 1, 2, 4], [5, 6, 7, 8], [5, 0, 7, 8])
    second = made([1, 2, 3, 4], [6, 7, 9, 8], [6, 7, 9, 0])
    a, b = pair(first, second)
    assert a.tolist() == [False, True, True]
    assert b.tolist() == [True, True, False]


def test_predictions_of_different_data_are_refused():
    first = made([0, 1], [5, 6], [5, 6])
    with pytest.raises(DataError, match="no image in common"):
        pair(first, made([7, 8], [5, 6], [5, 6]))
    with pytest.raises(DataError, match="different labels"):
        pair(first, made([0, 1], [5, 7], [5, 6]))


def test_shapes_must_fit():
    with pytest.raises(ValueError, match="equal shapes"):
        difference(np.zeros((2, 5), bool), np.zeros((3, 5), bool))
