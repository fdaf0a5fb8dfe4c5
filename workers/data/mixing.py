"""Mixup and cutmix of a batch on its device, the same for every world size.

What is drawn depends on seed and step alone, and partners are of one slot, all of which is on one rank.
"""

import hashlib
import math

import numpy as np
import torch

from workers.config import AugmentConfig

_ONE = 256
"""Shares are whole 256ths, so that mixed uint8 pixels are exact on every device."""


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    slots: torch.Tensor,
    *,
    augment: AugmentConfig,
    seed: int,
    step: int,
    num_classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed `images` (n, C, H, W), uint8 as given or float, and targets (n, num_classes) float32.

    Each row's partner is the next row of its slot, the last row's the first; a slot of one row stays as it
    is. So padding needs a slot that no sample has, such as -1. Which of a slot's samples follow each other
    is random by the order of the data. Per global batch, one share (the paper's lambda) and one box:
    mixup (arXiv 1710.09412) adds share x row + (1 - share) x partner, cutmix (arXiv 1905.04899) puts a box
    of the partner, of 1 - share of the area, around a random point into the row. Nothing waits for the
    device.
    """
    if not augment.mixes:
        return images, _one_hot(labels, num_classes)
    rng = _rng(seed, step)
    use_cutmix = augment.cutmix > 0 and (not augment.mixup or rng.random() < 0.5)
    alpha = augment.cutmix if use_cutmix else augment.mixup
    share = float(rng.beta(alpha, alpha))
    partner = _partners(slots)
    if use_cutmix:
        rows, columns, share = _box(images.shape[2], images.shape[3], share, rng)
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[partner][:, :, rows, columns]
    else:
        part = round(share * _ONE)
        share = part / _ONE
        mixed = _blend(images, images[partner], part)
    hot = _one_hot(labels, num_classes)
    return mixed, share * hot + (1 - share) * hot[partner]


def _rng(seed: int, step: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"mix {seed} {step}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def _partners(slots: torch.Tensor) -> torch.Tensor:
    """(n,) int64: the next row of the same slot, cyclically."""
    order = torch.argsort(slots, stable=True)
    ordered = slots[order]
    first = torch.searchsorted(ordered, ordered)
    after = torch.searchsorted(ordered, ordered, right=True)
    at = torch.arange(1, len(slots) + 1, device=slots.device)
    partner = torch.empty_like(order)
    partner[order] = order[torch.where(at < after, at, first)]
    return partner


def _blend(images: torch.Tensor, others: torch.Tensor, part: int) -> torch.Tensor:
    if images.dtype == torch.uint8:
        total = part * images.int() + (_ONE - part) * others.int()
        return ((total + _ONE // 2) >> 8).to(torch.uint8)
    return torch.lerp(others, images, part / _ONE)


def _box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[slice, slice, float]:
    """Rows, columns, and the share of the area that is left when the picture's edge has cut off some."""
    side = math.sqrt(1 - share)
    ranges = []
    for length in (height, width):
        centre, half = rng.integers(length), round(length * side) // 2
        ranges.append(slice(max(0, int(centre) - half), min(length, int(centre) + half)))
    rows, columns = ranges
    left = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return rows, columns, left


def _one_hot(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
