"""What a model said of each image of a validation set, and whether that was right."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOP_K = 5


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per image, in the order of the index; damaged images have none. 25 bytes an image."""

    ordinals: npt.NDArray[np.int64]
    """Of the images in their data set: what pairs the predictions of two models."""
    labels: npt.NDArray[np.int32]
    classes: npt.NDArray[np.int32]
    """Predicted; the lowest number of several that are equally likely."""
    confidences: npt.NDArray[np.float32]
    """Probability of the predicted class by softmax."""
    in_top5: npt.NDArray[np.bool_]
    """Fewer than min(5, K) classes are more likely than the true one, or as likely and of a lower number."""
    losses: npt.NDArray[np.float32]
    """Cross-entropy of the softmax, in nats."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        correct: npt.NDArray[np.bool_] = self.labels == self.classes
        return correct
