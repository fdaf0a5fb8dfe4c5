"""Logits to what is kept of them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.evaluation.predictions import TOP_K, Predictions


def judge(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Logits (B, K) of any float dtype and labels, int64 (B,), to int32 (5, B) on their device: label or,
    where the weight is 0, -1; predicted class; in the top 5; bits of confidence and loss.

    A model trained with a sigmoid loss is judged by the softmax of its logits like any other. What is not a
    number counts as more likely than the true class, so a broken model is never right.
    """
    logits = logits.float()
    own = logits.gather(1, labels[:, None])
    numbers = torch.arange(logits.shape[1], device=logits.device)
    beaten = (logits < own) | ((logits == own) & (numbers >= labels[:, None]))
    rank = logits.shape[1] - beaten.sum(dim=1)
    log_probabilities = F.log_softmax(logits, dim=1)
    confidences = log_probabilities.amax(dim=1).exp()
    losses = -log_probabilities.gather(1, labels[:, None])[:, 0]
    columns = (
        torch.where(weights > 0, labels, -1).int(),
        logits.argmax(dim=1).int(),  # the first of several: torch promises that
        (rank < min(TOP_K, logits.shape[1])).int(),
        confidences.view(torch.int32),
        losses.view(torch.int32),
    )
    return torch.stack(columns)


def collect(shares: Sequence[Tensor], firsts: Sequence[int]) -> Predictions:
    """Each rank's judgements, int32 (5, n) on the CPU, of the images from ordinal `firsts[rank]` on."""
    rows = np.concatenate([share.numpy() for share in shares], axis=1)
    ordinals = np.concatenate(
        [first + np.arange(share.shape[1]) for share, first in zip(shares, firsts, strict=True)]
    )
    used = rows[0] >= 0
    labels, classes, in_top5, confidences, losses = np.ascontiguousarray(rows[:, used])
    return Predictions(
        ordinals=ordinals[used].astype(np.int64),
        labels=labels,
        classes=classes,
        confidences=confidences.view(np.float32),
        in_top5=in_top5.astype(bool),
        losses=losses.view(np.float32),
    )
