"""Positions of patches: fixed and rotary ones; embeddings resampled to another grid or patch size."""

import math
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from workers.errors import CheckpointError
from workers.models.sizes import Resampling


class _Interpolation(NamedTuple):
    mode: Literal["bicubic", "bilinear"]
    antialias: bool
    align_corners: bool


CONVENTIONS: dict[Resampling, _Interpolation] = {
    "timm-bicubic": _Interpolation("bicubic", antialias=True, align_corners=False),
    "bicubic": _Interpolation("bicubic", antialias=False, align_corners=False),
    "bicubic-corners": _Interpolation("bicubic", antialias=False, align_corners=True),
    "bilinear": _Interpolation("bilinear", antialias=False, align_corners=True),
}


def resample_position_embedding(
    embedding: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    num_prefix: int,
    convention: Resampling = "timm-bicubic",
) -> Tensor:
    """(1, num_prefix + h * w, D) on `grid` (h, w) to (1, num_prefix + h' * w', D) on `new_grid` (h', w').

    Works in float32; the prefix and the dtype stay as they are, and on the same grid the embedding itself
    comes back. The field has several conventions, which differ most at the border:

    timm-bicubic     antialiased bicubic, patches are areas, so corners are not aligned: timm
                     (`resample_abs_pos_embed`), DINOv2 with `interpolate_antialias`.
    bicubic          without antialiasing: MAE, CLIPA, Hugging Face's `interpolate_pos_encoding`. Another
                     one also where the grid grows: torch's cubic has a = -0.75 then, else -0.5.
    bicubic-corners  patches are points, the outermost of which stay at the border.
    bilinear         likewise, linear in between: `scipy.ndimage.zoom(order=1)` of the original ViT and of
                     big_vision.

    CheckpointError where the tokens are not those of `grid`. That 14 x 14 was in truth 7 x 28 no count of
    tokens tells: the source's grid has to come from its image size, never from a square root.
    """
    height, width = grid
    tokens = num_prefix + height * width
    if min(*grid, *new_grid) < 1:
        raise CheckpointError(f"position embedding: no grid has {grid} or {new_grid} patches")
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
    planes = functional.interpolate(planes, size=new_grid, **CONVENTIONS[convention]._asdict())
    resampled = planes.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)
    return torch.cat([prefix, resampled], dim=1)


def square_grid(num_patches: int) -> tuple[int, int]:
    """The grid of a model of square images; CheckpointError where only an image size could tell it."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise CheckpointError(
            f"position embedding: {num_patches} patches are no square grid; "
            "give the image size, HEIGHTxWIDTH, that it was trained with"
        )
    return side, side


def resample_patch_embedding(weight: Tensor, new_patch_size: int | tuple[int, int]) -> Tensor:
    """(D, C, p, p) to (D, C, p', p'), so that a resized patch is embedded as the patch was.

    FlexiViT's pseudo-inverse resize (Beyer et al. 2023, arXiv 2212.08013, section 3.4): with B the matrix
    that resizes a patch (antialiased bicubic, as timm's `resample_patch_embed`), the new weights w' are the
    least squares solution of <Bx, w'> = <x, w> over all x: w' = pinv(B)^T w. Exact where patches grow. The
    dtype stays.
    """
    new = (new_patch_size, new_patch_size) if isinstance(new_patch_size, int) else new_patch_size
    height, width = weight.shape[-2:]
    if (height, width) == new:
        return weight
    basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    resized = functional.interpolate(basis, size=new, mode="bicubic", antialias=True)
    # Row i is what pixel i becomes: the transpose of B.
    inverse = torch.linalg.pinv(resized.flatten(1).T)
    resampled: Tensor = weight.double().flatten(2) @ inverse.to(weight.device)
    return resampled.reshape(*weight.shape[:2], *new).to(weight.dtype)


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
