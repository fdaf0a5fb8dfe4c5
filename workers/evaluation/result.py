"""The result of an evaluation: metrics with intervals, per class, by confidence, per image."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.data.quarantine import BadSample
from workers.evaluation.calibration import Calibration
from workers.evaluation.intervals import Interval, loss_and_ece_intervals, share_interval
from workers.evaluation.predictions import TOP_K, Predictions

CONFUSION_CLASSES = 200
"""Up to so many classes the confusion matrix is recorded; beyond, nobody reads it."""


@dataclass(frozen=True)
class Evaluation:
    """All of it is a function of the predictions, and the same on every rank."""

    num_classes: int
    loss: float
    """Mean cross-entropy of the softmax, in nats."""
    accuracy: float
    """Top-1."""
    top5: float
    """Share of images whose class is among the five most likely ones; 1 for up to five classes."""
    calibration: Calibration
    num_images: int
    bad_samples: list[BadSample]
    """Left out, because they are damaged."""
    predictions: Predictions = field(compare=False, repr=False)

    @classmethod
    def of(cls, predictions: Predictions, num_classes: int, bad_samples: list[BadSample]) -> "Evaluation":
        total = len(predictions)
        return cls(
            num_classes=num_classes,
            loss=float(predictions.losses.sum(dtype=np.float64)) / total,
            accuracy=int(predictions.correct.sum()) / total,
            top5=int(predictions.in_top5.sum()) / total,
            calibration=Calibration.of(predictions),
            num_images=total,
            bad_samples=bad_samples,
            predictions=predictions,
        )

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 %, of val_loss, val_accuracy, val_top5 and val_ece; seconds for a large set, once."""
        loss, ece = loss_and_ece_intervals(self.predictions, self.calibration.error)
        return {
            "val_loss": loss,
            "val_accuracy": share_interval(int(self.predictions.correct.sum()), self.num_images),
            "val_top5": share_interval(int(self.predictions.in_top5.sum()), self.num_images),
            "val_ece": ece,
        }

    def metrics(self) -> dict[str, float]:
        """By the names that points, gates and reports use; each with the ends of its interval."""
        values = {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_ece": self.calibration.error}
        if self.num_classes > TOP_K:
            values["val_top5"] = self.top5
        ends = {
            f"{name}_{end}": value
            for name in values
            for end, value in zip(("low", "high"), self.intervals[name], strict=True)
        }
        return values | ends | {"val_images": self.num_images}

    @property
    def confusion(self) -> list[list[int]]:
        """(K, K) counts; row = true class, column = predicted class."""
        cells = self.predictions.labels.astype(np.int64) * self.num_classes + self.predictions.classes
        counts = np.bincount(cells, minlength=self.num_classes**2)
        table: list[list[int]] = counts.reshape(self.num_classes, self.num_classes).tolist()
        return table

    @property
    def class_counts(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Images and correct ones of each class, (K,) each."""
        labels, correct = self.predictions.labels, self.predictions.correct
        images = np.bincount(labels, minlength=self.num_classes)
        return images, np.bincount(labels[correct], minlength=self.num_classes)

    def details(self) -> dict[str, Any]:
        """What does not fit into metrics, as JSON: the values of an `evaluation` event."""
        images, correct = self.class_counts
        values: dict[str, Any] = {
            "metrics": self.metrics(),
            "class_images": images.tolist(),
            "class_correct": correct.tolist(),
            "calibration": [dataclasses.asdict(column) for column in self.calibration.bins],
        }
        if self.num_classes <= CONFUSION_CLASSES:
            values["confusion"] = self.confusion
        return values
