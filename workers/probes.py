"""What a Vision Transformer learned, as arrays: the three panels of figure 7 of Dosovitskiy et al. 2021."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.models.vit import Attention, VisionTransformer

FIGURE_7_FILTERS = 28

Visit = Callable[[int, Tensor], None]


def patch_filters(model: VisionTransformer) -> NDArray[np.float64]:
    """Principal components of the patch embedding's filters, (K, C, p, p), of unit norm, largest first.

    K is 28, or the rank that so many filters of that size can have. Of the two signs of a component, the
    one whose largest value is positive.
    """
    weight = model.patch_embed.proj.weight.detach().double().cpu().numpy()
    filters = weight.reshape(weight.shape[0], -1)
    centred = filters - filters.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    # Centring takes one from the rank that the number of filters allows.
    components = components[: min(FIGURE_7_FILTERS, len(filters) - 1, filters.shape[1])]
    extremes = np.abs(components).argmax(axis=1, keepdims=True)
    components = components * np.sign(np.take_along_axis(components, extremes, axis=1))
    return np.asarray(components.reshape(-1, *weight.shape[1:]), dtype=np.float64)


def position_similarity(model: VisionTransformer) -> NDArray[np.float64]:
    """Cosine between the position embeddings of each pair of patches, (h, w, h, w), no class token."""
    embedding = model.pos_embed.detach()[0, model.spec.embedded_prefix :].double().cpu().numpy()
    norms = np.linalg.norm(embedding, axis=1, keepdims=True)
    unit = embedding / np.maximum(norms, np.finfo(np.float64).tiny)
    return np.asarray((unit @ unit.T).reshape(*model.spec.grid, *model.spec.grid), dtype=np.float64)


def attention_distance(model: VisionTransformer, images: Tensor) -> NDArray[np.float64]:
    """Mean distance in pixels between a patch and what it attends to, (depth, heads).

    Averaged over all patches of the images (B, C, H, W), weighted by the attention among patches alone:
    without the class token, renormalised. Distances are between centres (appendix D.7, figure 11).
    """
    distance_NN = _patch_distances(model).to(images.device)
    rows: dict[int, Tensor] = {}

    def visit(block: int, logits_BANN: Tensor) -> None:
        patches = logits_BANN[..., model.spec.num_prefix :, model.spec.num_prefix :]
        # Softmax over the patches is the renormalised attention, without dividing by a sum that the class
        # token may have left near zero.
        weighted = patches.softmax(dim=-1) * distance_NN
        rows[block] = weighted.sum(dim=-1).mean(dim=(0, 2)).double().cpu()

    visit_attention_logits(model, images, visit)
    return np.stack([rows[block].numpy() for block in range(len(model.blocks))])


def visit_attention_logits(model: VisionTransformer, images: Tensor, visit: Visit) -> None:
    """Run the model once and call `visit(block, logits)` with what each block's softmax sees.

    Logits are (B, A, N, N) in float32, class token first; only one such array lives at a time. Queries and
    keys are computed again beside the forward pass, which keeps its fused attention.
    """
    handles = []
    try:
        for index, block in enumerate(model.blocks):
            attention = block.get_submodule("attn")
            handles.append(attention.register_forward_pre_hook(partial(_visit_one, index, visit)))
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def _visit_one(index: int, visit: Visit, attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(attention, Attention)
    q_BANE, k_BANE, _ = attention.split_heads(inputs[0])
    scale = q_BANE.shape[-1] ** -0.5
    visit(index, (q_BANE.float() * scale) @ k_BANE.float().transpose(-2, -1))


def _patch_distances(model: VisionTransformer) -> Tensor:
    """Pixels between the centres of each pair of patches, (h * w, h * w)."""
    height, width = model.spec.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([rows.flatten(), columns.flatten()], dim=1).float() * model.spec.patch_size
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
