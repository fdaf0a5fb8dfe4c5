"""Position embeddings on another grid of patches."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from workers.errors import CheckpointError

Convention = Literal["timm-bicubic"]


def resample_position_embedding(
    embedding: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    num_prefix: int,
    convention: Convention = "timm-bicubic",
) -> Tensor:
    """(1, num_prefix + h * w, D) on `grid` (h, w) to (1, num_prefix + h' * w', D) on `new_grid` (h', w').

    timm-bicubic: antialiased bicubic in float32, corners not aligned, the prefix as it is, the dtype kept
    (`timm.layers.resample_abs_pos_embed`). On the same grid the embedding itself comes back.
    CheckpointError where the tokens are not those of `grid`.
    """
    assert convention == "timm-bicubic"
    height, width = grid
    tokens = num_prefix + height * width
    if embedding.ndim != 3 or embedding.shape[:2] != (1, tokens):
        raise CheckpointError(
            f"position embedding: shape {tuple(embedding.shape)} is not (1, {tokens}, width), which "
            f"{num_prefix} prefix tokens and a grid of {height} x {width} patches need; "
            "give the image and patch size that it was trained with"
        )
    if grid == new_grid:
        return embedding
    prefix, patches = embedding[:, :num_prefix], embedding[:, num_prefix:]
    planes = patches.float().reshape(1, height, width, -1).permute(0, 3, 1, 2)
    planes = functional.interpolate(planes, size=new_grid, mode="bicubic", antialias=True)
    resampled = planes.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
    return torch.cat([prefix, resampled], dim=1)
