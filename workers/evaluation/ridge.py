"""The linear classifier of few-shot accuracies, in closed form.

The details are those of big_vision's `evaluators/fewshot_lsr.py`: features are standardised by those of the
shots, the bias is a feature of constant 100, and all strengths of L2 share one eigendecomposition, of the
smaller of the two products of the features with themselves.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.evaluation.fewshot import L2S, FewShot, draw

BIAS = 100.0
"""So large that its weight is all but free of the penalty."""
EPSILON = 1e-5
"""Added to standard deviations."""
CHUNK = 8192
"""Validation images that are scored at a time."""


def few_shot(
    features_train: Tensor,
    labels_train: Tensor,
    features_val: Tensor,
    labels_val: Tensor,
    *,
    shots: int,
    seed: int,
    l2s: Sequence[float] = L2S,
) -> FewShot:
    """Features float (n, D) and labels int64 (n,) of training and validation images, on one device.

    `shots` of each class are drawn from the training images; a smaller number of the same seed draws some of
    the same. Computed in float64. A class without training images is never predicted right.
    """
    chosen = draw(labels_train.cpu().numpy(), shots, seed)
    rows = torch.from_numpy(chosen).to(features_train.device)
    x, labels = features_train[rows].double(), labels_train[rows]
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0) + EPSILON
    targets = 2.0 * F.one_hot(labels).double() - 1.0
    accuracies = {}
    for l2, weights in zip(l2s, ridge(_standardise(x, mean, deviation), targets, l2s), strict=True):
        right = 0
        for start in range(0, len(labels_val), CHUNK):
            some = features_val[start : start + CHUNK].double()
            scores = _standardise(some, mean, deviation) @ weights
            right += int((scores.argmax(dim=1) == labels_val[start : start + CHUNK]).sum())
        accuracies[l2] = right / len(labels_val)
    return FewShot(shots, seed, len(chosen), accuracies)


def ridge(x: Tensor, y: Tensor, l2s: Sequence[float]) -> Iterator[Tensor]:
    """(D, K) weights that minimise |x w - y|^2 + l2 |w|^2, for each strength; x (n, D), y (n, K), float64."""
    if x.shape[0] >= x.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        eigenvalues, vectors = torch.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    eigenvalues = eigenvalues.clamp(min=0)  # rounding takes some that are zero below it
    for l2 in l2s:
        yield (left / (eigenvalues + l2)) @ right


def _standardise(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """With the bias as one more feature."""
    return F.pad((x - mean) / deviation, (0, 1), value=BIAS)
