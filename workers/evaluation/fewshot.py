"""How good frozen features are: a linear classifier fitted to a few images of each class.

Dosovitskiy et al. 2021 (2010.11929), section 4.1: "few-shot accuracies are obtained by solving a regularized
least-squares regression problem that maps the (frozen) representation of a subset of training images to
{-1, 1}^K target vectors". The classifier is in `ridge.py`.
"""

from dataclasses import dataclass

import numpy as np

L2 = 2.0**10
"""The strength whose accuracy counts: that of big_vision's `configs/common_fewshot.py`."""
L2S = tuple(2.0**power for power in range(-10, 21))


@dataclass(frozen=True)
class FewShot:
    shots: int
    """Images per class that the classifier was fitted to; all there are, of a class that has fewer."""
    seed: int
    num_train: int
    """Images in all."""
    accuracies: dict[float, float]
    """Top-1 on the validation images by strength of L2. The best of them was chosen on those very images and
    flatters the features."""


def draw(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Ascending places, int64, of up to `count` of each label; those of a smaller count are among them."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    sorted_labels = labels[by_class]
    within = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(by_class[within < count])
