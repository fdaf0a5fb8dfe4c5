"""Sizes by name, and what a model of that size costs, in closed form and without torch.

Parameters are exact. FLOPs are two per multiply-add, forward, per image, and count matrix products and
convolutions only (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022, appendix F). Normalisation,
softmax, activations and additions are left out: 0.1 % of ViT-B/16 at 224. "GMACs", as timm's tables have
them, are half of that. A training step costs three times the forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from workers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    width: int
    depth: int
    mlp_dim: int
    num_heads: int


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """6 * blocks_per_stage + 2 layers in three stages of `width`, 2 * width and 4 * width channels."""

    blocks_per_stage: int
    width: int = 16


VIT_SIZES = {
    # Toy sizes for images of 8 to 32 pixels on a few cores: 16 wide heads, mlp_dim = 4 * width as in the
    # sizes below, and some three times the parameters from one to the next (10 k to 1 M).
    "digits-xs": ViTSize(width=16, depth=3, mlp_dim=64, num_heads=1),
    "digits-s": ViTSize(width=32, depth=3, mlp_dim=128, num_heads=2),
    "digits": ViTSize(width=48, depth=4, mlp_dim=192, num_heads=3),
    "digits-l": ViTSize(width=80, depth=4, mlp_dim=320, num_heads=5),
    "digits-xl": ViTSize(width=128, depth=5, mlp_dim=512, num_heads=8),
    # Ti and S: Touvron et al. 2021 (DeiT), table 1. B, L, H: Dosovitskiy et al. 2021, table 1.
    "ti": ViTSize(width=192, depth=12, mlp_dim=768, num_heads=3),
    "s": ViTSize(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "b": ViTSize(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "l": ViTSize(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "h": ViTSize(width=1280, depth=32, mlp_dim=5120, num_heads=16),
}

# He et al. 2016, section 4.2 and table 6.
RESNET_SIZES = {
    "8": ResNetSize(blocks_per_stage=1),
    "14": ResNetSize(blocks_per_stage=2),
    "20": ResNetSize(blocks_per_stage=3),
}


def vit_size(name: str) -> ViTSize:
    if name not in VIT_SIZES:
        raise _unknown_size("ViT", name, VIT_SIZES)
    return VIT_SIZES[name]


def resnet_size(name: str) -> ResNetSize:
    if name not in RESNET_SIZES:
        raise _unknown_size("ResNet", name, RESNET_SIZES)
    return RESNET_SIZES[name]


def image_shape(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels; one number means a square."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ConfigError(f"model.image_size: {image_size} is not positive")
    return height, width


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches per (column, row) of the image: the (height, width) of the token grid."""
    height, width = image_shape(image_size)
    if patch_size < 1:
        raise ConfigError(f"model.patch_size: {patch_size} is not positive")
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"model.image_size: {image_size} is not a multiple of model.patch_size {patch_size}; "
            f"{_whole_patches(height, patch_size)} x {_whole_patches(width, patch_size)} would be"
        )
    return height // patch_size, width // patch_size


def vit_parameters(
    size: ViTSize, *, image_size: int | tuple[int, int], patch_size: int, channels: int, num_classes: int
) -> int:
    grid = patch_grid(image_size, patch_size)
    width, mlp_dim = size.width, size.mlp_dim
    patch_embedding = channels * patch_size**2 * width + width
    positions = (1 + grid[0] * grid[1]) * width
    norms = 2 * 2 * width
    attention = 3 * (width * width + width) + width * width + width
    mlp = width * mlp_dim + mlp_dim + mlp_dim * width + width
    head = width * num_classes + num_classes
    class_token, final_norm = width, 2 * width
    blocks = size.depth * (norms + attention + mlp)
    return patch_embedding + class_token + positions + blocks + final_norm + head


def vit_flops(
    size: ViTSize, *, image_size: int | tuple[int, int], patch_size: int, channels: int, num_classes: int
) -> int:
    grid = patch_grid(image_size, patch_size)
    patches = grid[0] * grid[1]
    tokens = 1 + patches
    patch_embedding = patches * channels * patch_size**2 * size.width
    projections = tokens * 4 * size.width**2
    scores_and_mixing = 2 * tokens**2 * size.width
    mlp = 2 * tokens * size.width * size.mlp_dim
    multiply_adds = patch_embedding + size.depth * (projections + scores_and_mixing + mlp)
    return 2 * (multiply_adds + size.width * num_classes)


def resnet_parameters(size: ResNetSize, *, channels: int, num_classes: int) -> int:
    convolutions = sum(9 * inputs * outputs for inputs, outputs, _ in _convolutions(size, channels))
    norms = sum(2 * outputs for _, outputs, _ in _convolutions(size, channels))
    return convolutions + norms + 4 * size.width * num_classes + num_classes


def resnet_flops(
    size: ResNetSize, *, image_size: int | tuple[int, int], channels: int, num_classes: int
) -> int:
    height, width = image_shape(image_size)
    multiply_adds = 4 * size.width * num_classes
    for inputs, outputs, stride in _convolutions(size, channels):
        multiply_adds += 9 * inputs * outputs * -(-height // stride) * -(-width // stride)
    return 2 * multiply_adds


def _convolutions(size: ResNetSize, channels: int) -> list[tuple[int, int, int]]:
    """(input channels, output channels, stride of the output against the image) of each 3 x 3 convolution."""
    rows = [(channels, size.width, 1)]
    for stage in range(3):
        outputs = size.width * 2**stage
        for _ in range(2 * size.blocks_per_stage):
            rows.append((rows[-1][1], outputs, 2**stage))
    return rows


def _whole_patches(pixels: int, patch_size: int) -> int:
    return max(1, pixels // patch_size) * patch_size


def _unknown_size(family: str, name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"model.size: no {family} is called {name!r}; choose one of {', '.join(known)}")
