"""The loss of each image."""

import math

from torch import Tensor
from torch.nn import functional as F

from workers.config import OptimConfig


def per_image_loss(logits: Tensor, targets: Tensor, config: OptimConfig) -> Tensor:
    """(n,) float32 of logits (n, K) of any float dtype and targets: classes (n,), or their shares (n, K).

    softmax: cross-entropy. sigmoid: binary cross-entropies, summed over classes (Beyer et al. 2020, arXiv
    2006.07159; big_vision's `sigmoid_xent`). Label smoothing s, in both: targets become (1 - s) of themselves
    plus s / K for each class (Szegedy et al. 2016, section 7; timm's BinaryCrossEntropy).
    """
    logits, smoothing, num_classes = logits.float(), config.label_smoothing, logits.shape[1]
    if targets.ndim == 2:
        targets = targets.float()
    if config.loss == "softmax":
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    shares = targets if targets.ndim == 2 else F.one_hot(targets, num_classes).float()
    smoothed = (1 - smoothing) * shares + smoothing / num_classes
    return F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").sum(dim=1)


def initial_head_bias(config: OptimConfig, num_classes: int) -> float:
    """Of all classes: one of them is right, so for sigmoids each begins at about 1 / K (big_vision's
    `init_head_bias`); otherwise the first steps do nothing but push them all down."""
    return -math.log(num_classes) if config.loss == "sigmoid" else 0.0
