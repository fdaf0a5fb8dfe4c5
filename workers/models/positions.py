"""Positions of patches: fixed and rotary ones, and embeddings resampled to another grid."""

import math
from typing import Literal, NamedTuple, Self

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


def sincos2d(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (1, h * w, D) of Beyer et al. 2022: sines and cosines of x, then of y."""
    height, width_ = grid
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width_).double(), indexing="ij")
    omega = 10_000.0 ** -(torch.arange(width // 4).double() / max(1, width // 4 - 1))
    angles_x, angles_y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    table = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    return table.float()[None]


class Rotary(NamedTuple):
    """Sines and cosines (h * w, E) by which queries and keys of the patches are turned.

    DINOv3's (Simeoni et al. 2025, section 3.2): coordinates of the patches' centres are normalised to -1..1
    on each side, so they mean the same at any resolution; periods from 1 to 100.
    """

    sin: Tensor
    cos: Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], head_width: int, like: Tensor) -> Self:
        """On the device of `like`, in its dtype."""
        periods = 100.0 ** (torch.arange(head_width // 4, device=like.device) / (head_width // 4))
        sides = [(torch.arange(n, device=like.device) + 0.5) / n * 2 - 1 for n in grid]
        coordinates = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * coordinates[:, :, None] / periods).flatten(1).tile(2)
        return cls(angles.sin().to(like.dtype), angles.cos().to(like.dtype))

    def turn(self, x_BANE: Tensor) -> Tensor:
        """The tokens before the patches have no place and stay as they are."""
        num_prefix = x_BANE.shape[-2] - self.sin.shape[-2]
        prefix, patches = x_BANE[..., :num_prefix, :], x_BANE[..., num_prefix:, :]
        first, second = patches.chunk(2, dim=-1)
        turned = patches * self.cos + torch.cat([-second, first], dim=-1) * self.sin
        return torch.cat([prefix, turned], dim=-2) if num_prefix else turned
