"""Which model a set of tensors is of; names are ours, which are timm's."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workers.errors import CheckpointError
from workers.models.positions import square_grid
from workers.models.sizes import VIT_SIZES, Activation, patch_grid, size_text

HEADLESS_CLASSES = 1
"""Of the zero head that a file without one is given; fine-tuning makes a new one."""
LAYER_SCALE = 1e-5
"""DINOv2's initial value; of trained tensors only whether there is one matters."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What no tensor tells, as a format or a file beside the weights has it."""

    norm_epsilon: float = 1e-6
    activation: Activation = "gelu"
    num_heads: int | None = None
    image_size: int | tuple[int, int] | None = None
    embed_prefix: bool | None = None
    """Whether the tokens before the patches have positions; None: as the file's model may be."""


def infer_model(state: Mapping[str, Tensor], known: Known) -> dict[str, Any]:
    """Fields of a ModelConfig. CheckpointError, naming what is wrong or missing, where no model of ours has
    such tensors; `known.image_size` is needed unless the positions can only be those of square images."""
    channels, patch_size = _patches(state)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    has_class_token = "cls_token" in state
    image_size, embed_prefix = _positions(state, registers + has_class_token, patch_size, known)
    fields: dict[str, Any] = {
        "size": _size_name(state, known.num_heads),
        "image_size": image_size,
        "patch_size": patch_size,
        "channels": channels,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else HEADLESS_CLASSES,
        "pool": "cls" if has_class_token else "map" if "attn_pool.latent" in state else "gap",
        "norm_after_pool": "fc_norm.weight" in state and not has_class_token,
        "positions": "learned" if "pos_embed" in state else "sincos2d",
        "embed_prefix": embed_prefix,
        "registers": registers,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "layer_scale": LAYER_SCALE if "blocks.0.ls1.gamma" in state else None,
        "activation": known.activation,
        "norm_epsilon": known.norm_epsilon,
        "hidden_head": "pre_logits.fc.weight" in state,
    }
    return fields


def _patches(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(channels, patch size)"""
    weight = _tensor(state, "patch_embed.proj.weight", ndim=4)
    _, channels, height, width = weight.shape
    if height != width:
        raise CheckpointError(f"patch_embed.proj.weight {tuple(weight.shape)}: patches are no squares")
    if channels not in (1, 3):
        raise CheckpointError(
            f"patch_embed.proj.weight {tuple(weight.shape)}: {channels} channels, not 1 or 3"
        )
    return channels, height


def _size_name(state: Mapping[str, Tensor], num_heads: int | None) -> str:
    """By width, depth and MLP; heads must be those of the size, where anything tells them."""
    width = _tensor(state, "patch_embed.proj.weight", ndim=4).shape[0]
    mlp_dim = _tensor(state, "blocks.0.mlp.fc1.weight", ndim=2).shape[0]
    depth = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    if "blocks.0.attn.q_norm.weight" in state:
        num_heads = width // max(1, state["blocks.0.attn.q_norm.weight"].shape[0])
    found = [
        name
        for name, size in VIT_SIZES.items()
        if (size.width, size.depth, size.mlp_dim) == (width, depth, mlp_dim)
    ]
    if not found:
        raise CheckpointError(
            f"no size has width {width}, depth {depth} and MLPs of {mlp_dim}; known: {', '.join(VIT_SIZES)}"
        )
    if num_heads is not None and VIT_SIZES[found[0]].num_heads != num_heads:
        raise CheckpointError(
            f"{num_heads} attention heads, where size {found[0]} has {VIT_SIZES[found[0]].num_heads}"
        )
    return found[0]


def _positions(
    state: Mapping[str, Tensor], num_prefix: int, patch_size: int, known: Known
) -> tuple[int | tuple[int, int], bool]:
    """Image size, and whether tokens before the patches have positions.

    A count of rows tells neither by itself: 196 may be 14 x 14, or 13 x 15 and a class token, or 7 x 28. What
    is taken without an image size is a square after all tokens before the patches, or none of them.
    """
    if "pos_embed" not in state:
        if known.image_size is None:
            raise CheckpointError("no position embedding tells the image size; give it (--image-size)")
        return known.image_size, True
    rows = _tensor(state, "pos_embed", ndim=3).shape[1]
    what = f"pos_embed {tuple(state['pos_embed'].shape)}"
    readings = [embedded for embedded in (True, False) if known.embed_prefix in (embedded, None)]
    if known.image_size is not None:
        height, width = patch_grid(known.image_size, patch_size)
        for embedded in readings:
            if rows == height * width + num_prefix * embedded:
                return known.image_size, embedded or not num_prefix
        raise CheckpointError(
            f"{what}: images of {size_text(known.image_size)} px have {height * width} patches of "
            f"{patch_size} px, and {num_prefix} tokens before them; the positions are of {rows}"
        )
    if num_prefix and len(readings) > 1 and math.isqrt(rows) ** 2 == rows:
        raise CheckpointError(
            f"{what}: a square grid without positions for the {num_prefix} tokens before the patches, or a "
            "rectangle with them; give the image size (--image-size)"
        )
    side, _ = square_grid(rows - num_prefix * readings[0])
    return side * patch_size, readings[0] or not num_prefix


def _tensor(state: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{name} is missing: these are not the weights of a Vision Transformer")
    if state[name].ndim != ndim:
        raise CheckpointError(f"{name} {tuple(state[name].shape)}: expected {ndim} dimensions")
    return state[name]
