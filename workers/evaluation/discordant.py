"""Where two models disagree about what is right: all that a paired test of accuracies looks at."""

from dataclasses import dataclass

import numpy as np

from workers.errors import DataError
from workers.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Discordant:
    total: int
    """Images that both judged."""
    gained: int
    """Right for the second model alone."""
    lost: int
    """Right for the first alone."""

    @property
    def difference(self) -> float:
        """Of accuracies: the second's minus the first's."""
        return (self.gained - self.lost) / self.total


def discordant(first: Predictions, second: Predictions) -> tuple[Discordant, list[Discordant]]:
    """Of all images and of each class, by its number; DataError if the labels are those of different data.

    Images that one model has no prediction of, because they were damaged, are left out.
    """
    _, at_first, at_second = np.intersect1d(
        first.ordinals, second.ordinals, assume_unique=True, return_indices=True
    )
    labels = first.labels[at_first]
    if not len(at_first) or (labels != second.labels[at_second]).any():
        raise DataError("predictions: the two models judged different images; evaluate both on one data set")
    one, other = first.correct[at_first], second.correct[at_second]
    totals = np.bincount(labels)
    gained = np.bincount(labels[other & ~one], minlength=len(totals))
    lost = np.bincount(labels[one & ~other], minlength=len(totals))
    by_class = [
        Discordant(*counts) for counts in zip(totals.tolist(), gained.tolist(), lost.tolist(), strict=True)
    ]
    return Discordant(len(labels), int(gained.sum()), int(lost.sum())), by_class
