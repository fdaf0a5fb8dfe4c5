"""Is a prediction made with confidence p right in a share p of all cases? Guo et al. 2017 (1706.04599)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.evaluation.predictions import Predictions

NUM_BINS = 15
"""Of equal width, as in Guo et al., section 5 and table 1."""


@dataclass(frozen=True)
class Bin:
    """Images whose confidence is in (low, high]: a column of a reliability diagram."""

    low: float
    high: float
    images: int
    accuracy: float
    confidence: float
    """Mean."""


@dataclass(frozen=True)
class Calibration:
    error: float
    """ECE, equation 3: the bins' gaps between accuracy and mean confidence, weighted by images."""
    bins: tuple[Bin, ...]
    """From low to high, those with images in them."""

    @classmethod
    def of(cls, predictions: Predictions) -> "Calibration":
        numbers, correct, confidences = bin_numbers(predictions), predictions.correct, predictions.confidences
        images = np.bincount(numbers, minlength=NUM_BINS)
        right = np.bincount(numbers, weights=correct, minlength=NUM_BINS)
        sure = np.bincount(numbers, weights=confidences, minlength=NUM_BINS)
        bins = (
            Bin(
                low=number / NUM_BINS,
                high=(number + 1) / NUM_BINS,
                images=int(images[number]),
                accuracy=float(right[number] / images[number]),
                confidence=float(sure[number] / images[number]),
            )
            for number in np.flatnonzero(images).tolist()
        )
        return cls(error=float(np.abs(right - sure).sum() / len(predictions)), bins=tuple(bins))


def bin_numbers(predictions: Predictions) -> npt.NDArray[np.int64]:
    """(n,) 0 to 14. A confidence that is not a number, of a broken model, is in the lowest bin."""
    confidences = np.nan_to_num(predictions.confidences.astype(np.float64))
    return np.clip(np.ceil(confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
