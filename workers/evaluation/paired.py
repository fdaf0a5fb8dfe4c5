"""Two models on the same images: how much better is one, and could that be chance?

What makes an image easy or hard for both cancels in their difference, so its interval is far narrower than
those of the two accuracies.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.errors import DataError
from workers.evaluation.intervals import IMAGE_RESAMPLES, QUANTILES, SEED, Interval
from workers.evaluation.predictions import Predictions

Correct = npt.NDArray[np.bool_]
"""(runs, images) or (images,): was the image classified right?"""


@dataclass(frozen=True)
class Difference:
    """Of accuracies: that of the second minus that of the first."""

    value: float
    interval: Interval
    """95 %."""
    by_run: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class McNemar:
    only_first: int
    """Images that only the first model classifies right."""
    only_second: int
    p_value: float
    """Two-sided: of a split as uneven as this, or more so, if each were as likely to be the right one."""


def pair(first: Predictions, second: Predictions) -> tuple[Correct, Correct]:
    """Of the images that both judged, in order, each (n,); DataError if they are of different data."""
    _, at_first, at_second = np.intersect1d(
        first.ordinals, second.ordinals, assume_unique=True, return_indices=True
    )
    if not len(at_first):
        raise DataError("predictions: the two models have no image in common")
    if (first.labels[at_first] != second.labels[at_second]).any():
        raise DataError("predictions: the same images have different labels; both must be of one data set")
    return first.correct[at_first], second.correct[at_second]


def difference(first: Correct, second: Correct) -> Difference:
    """With the percentile interval of a bootstrap over runs and images.

    Row r of each, (runs, images), is a run of the one kind and of the other that share what can be shared,
    such as the seed. Each draw takes runs and, apart from them, images, both with replacement and with the
    pairing kept (Efron and Tibshirani 1993, chapter 13; both crossed: the pigeonhole bootstrap of Owen 2007,
    arXiv 0712.1111, which errs to the wide side). But draws from very few runs vary less than runs do, by a
    factor of (runs - 1) / runs in variance. Of one run, (images,), it says nothing of other runs.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"expected two equal shapes (runs, images), got {first.shape} and {second.shape}")
    gains = second.astype(np.float64) - first
    num_runs, num_images = gains.shape
    generator = np.random.default_rng(SEED)
    draws = np.empty(IMAGE_RESAMPLES)
    for draw in range(IMAGE_RESAMPLES):
        runs = gains[generator.integers(0, num_runs, num_runs)].mean(axis=0)
        draws[draw] = runs[generator.integers(0, num_images, num_images, dtype=np.int32)].mean()
    low, high = np.quantile(draws, QUANTILES).tolist()
    return Difference(float(gains.mean()), Interval(low, high), tuple(gains.mean(axis=1).tolist()))


def mcnemar(first: Correct, second: Correct) -> McNemar:
    """The exact test (McNemar 1947; binomial form) of two models on the same images, each (images,)."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return McNemar(only_first, only_second, _binomial_p(only_first, only_second))


def _binomial_p(count: int, other: int) -> float:
    """Two-sided, of a fair coin that shows so many heads and tails."""
    total, fewer = count + other, min(count, other)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)
    ]
    tail = math.fsum(math.exp(log - total * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)
