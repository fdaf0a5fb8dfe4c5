"""Where and how sharply each head looks: all measures of attention in one pass over the images.

Shape suffixes as in `workers/models/vit.py`; P patch tokens, the last of the N.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.models.vit import Block, VisionTransformer
from workers.probes.result import Floats

ROLLOUT_IMAGES = 12
"""Of the first so many images: what a figure shows. Each costs N x N floats for as long as the pass takes."""
LOGIT_BYTES = 128 << 20
"""Images go through in groups whose attention logits in one block are at most this; about four arrays of that
size live at a time."""


@dataclass(frozen=True)
class AttentionMeasures:
    """As `Probes` describes them."""

    distance: Floats
    entropy: Floats
    logit_max: Floats
    logit_rms: Floats
    residual_norm: Floats
    rollout: Floats


def walk_blocks(model: VisionTransformer, images_BCHW: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each block in turn: what its softmax sees (B, A, N, N), and its output (B, N, D); float32.

    Queries and keys are computed beside the block, which keeps its fused attention; nothing of one block is
    kept for the next but its output.
    """
    x_BND = model.embed(images_BCHW)
    rotary = model.rotary(x_BND)
    for block in model.blocks:
        assert isinstance(block, Block)
        q_BANE, k_BANE, _ = block.attn.split_heads(block.norm1(x_BND), rotary)
        x_BND = block(x_BND, rotary)
        scale = q_BANE.shape[-1] ** -0.5
        yield (q_BANE.float() * scale) @ k_BANE.float().transpose(-2, -1), x_BND.float()


@torch.no_grad()
def measure_attention(model: VisionTransformer, images_BCHW: Tensor) -> AttentionMeasures:
    """Averages over the images, which are normalised; the model is in evaluation mode.

    distance: mean distance between a patch and what it attends to, over all patches and images, weighted by
    the attention among patches alone, renormalised; between centres (Dosovitskiy et al. 2021, appendix D.7,
    figures 7 and 11). entropy: of each token's attention, mean over tokens (Zhai et al. 2023, arXiv
    2303.06296). logit_max: over all images (Dehghani et al. 2023, arXiv 2302.05442, section 3.1).
    """
    heads, tokens = model.spec.size.num_heads, model.spec.num_prefix + math.prod(model.spec.grid)
    group = max(1, LOGIT_BYTES // (heads * tokens**2 * 4))
    sums = _Sums(model, images_BCHW)
    for start in range(0, len(images_BCHW), group):
        sums.add(images_BCHW[start : start + group], rollouts=max(0, ROLLOUT_IMAGES - start))
    return sums.measures(len(images_BCHW))


class _Sums:
    """Over images; (depth, heads) in float64."""

    def __init__(self, model: VisionTransformer, images_BCHW: Tensor) -> None:
        self._model = model
        shape = (model.spec.size.depth, model.spec.size.num_heads)
        self._distance_PP = patch_distances(model).to(images_BCHW.device)
        self._distance, self._entropy, self._square, self._max = (
            torch.zeros(shape, dtype=torch.float64) for _ in range(4)
        )
        self._norm = torch.zeros(shape[0], dtype=torch.float64)
        self._rollouts: list[Tensor] = []

    def add(self, images_BCHW: Tensor, rollouts: int) -> None:
        """Rollouts of only the first so many of these images."""
        spec, count = self._model.spec, len(images_BCHW)
        product_BNN: Tensor | None = None
        for block, (logits_BANN, x_BND) in enumerate(walk_blocks(self._model, images_BCHW)):
            self._max[block] = self._max[block].maximum(logits_BANN.abs().amax(dim=(0, 2, 3)).double().cpu())
            self._square[block] += count * _per_head(logits_BANN.square())
            self._norm[block] += count * x_BND.norm(dim=-1).mean().double().cpu()
            # Softmax over the patches is the renormalised attention, without dividing by a sum that the
            # prefix tokens may have left near zero.
            patches_BAPP = logits_BANN[..., spec.num_prefix :, spec.num_prefix :].softmax(dim=-1)
            self._distance[block] += count * _per_head((patches_BAPP * self._distance_PP).sum(dim=-1))
            del patches_BAPP
            log_BANN = logits_BANN.log_softmax(dim=-1)
            del logits_BANN
            attention_BANN = log_BANN.exp()
            if rollouts:
                product_BNN = _roll(product_BNN, attention_BANN[:rollouts])
            self._entropy[block] -= count * _per_head(attention_BANN.mul_(log_BANN).sum(dim=-1))
        if product_BNN is not None:
            self._rollouts.append(patches_of_output(self._model, product_BNN).double().cpu())

    def measures(self, count: int) -> AttentionMeasures:
        return AttentionMeasures(
            distance=(self._distance / count).numpy(),
            # Rounding may leave the entropy of attention to a single token just below zero.
            entropy=(self._entropy / count).clamp(min=0).numpy(),
            logit_max=self._max.numpy(),
            logit_rms=(self._square / count).sqrt().numpy(),
            residual_norm=(self._norm / count).numpy(),
            rollout=np.asarray(torch.cat(self._rollouts).numpy()),
        )


def _per_head(values: Tensor) -> Tensor:
    """Mean over all but the heads, which are dimension 1."""
    others = tuple(dim for dim in range(values.ndim) if dim != 1)
    return values.mean(dim=others).double().cpu()


def _roll(product_BNN: Tensor | None, attention_BANN: Tensor) -> Tensor:
    """Attention rollout's next factor: half the heads' mean, half the residual connection.

    Abnar & Zuidema 2020 (arXiv 2005.00928), section 3; averaged over heads as in Dosovitskiy et al. 2021,
    appendix D.8.
    """
    factor_BNN = 0.5 * attention_BANN.mean(dim=1)
    factor_BNN.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return factor_BNN if product_BNN is None else factor_BNN @ product_BNN


def patches_of_output(model: VisionTransformer, product_BNN: Tensor) -> Tensor:
    """(B, h, w): the class token's row; without one, the mean of the patches' rows."""
    spec = model.spec
    rows_BN = product_BNN[:, 0] if spec.pool == "cls" else product_BNN[:, spec.num_prefix :].mean(dim=1)
    return rows_BN[:, spec.num_prefix :].reshape(-1, *spec.grid)


def patch_distances(model: VisionTransformer) -> Tensor:
    """Pixels between the centres of each pair of patches, (P, P)."""
    height, width = model.spec.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([rows.flatten(), columns.flatten()], dim=1).float() * model.spec.patch_size
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
