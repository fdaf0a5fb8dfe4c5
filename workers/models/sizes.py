"""ViT sizes by name, and what a model of that size costs, in closed form and without torch.

Parameters are exact. FLOPs are two per multiply-add, forward, per image, and count matrix products and
convolutions only (Kaplan et al. 2020, section 2.1; Hoffmann et al. 2022, appendix F). Normalisation,
softmax, activations and additions are left out: 0.1 % of ViT-B/16 at 224. "GMACs", as timm's tables have
them, are half of that. A training step costs three times the forward pass.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from workers.errors import ConfigError

Pool = Literal["cls", "gap", "map"]
Positions = Literal["learned", "sincos2d", "rope"]
Activation = Literal["gelu", "gelu_tanh"]
Resampling = Literal["timm-bicubic", "bicubic", "bicubic-corners", "bilinear"]
"""Conventions for position embeddings on another grid, see `workers/models/positions.py`."""


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    width: int
    depth: int
    mlp_dim: int
    num_heads: int


VIT_SIZES = {
    # Toy sizes for images of 8 to 32 pixels on a few cores: 16 wide heads, mlp_dim = 4 * width as in the
    # sizes below, and some three times the parameters from one to the next (10 k to 1 M).
    "digits-xs": ViTSize(width=16, depth=3, mlp_dim=64, num_heads=1),
    "digits-s": ViTSize(width=32, depth=3, mlp_dim=128, num_heads=2),
    "digits": ViTSize(width=48, depth=4, mlp_dim=192, num_heads=3),
    "digits-l": ViTSize(width=80, depth=4, mlp_dim=320, num_heads=5),
    "digits-xl": ViTSize(width=128, depth=5, mlp_dim=512, num_heads=8),
    # Zhai et al. 2022 (arXiv 2106.04560), table 2; there it is called s, in small.
    "xs": ViTSize(width=256, depth=6, mlp_dim=1024, num_heads=8),
    # Ti and S: Touvron et al. 2021 (DeiT), table 1. B, L, H: Dosovitskiy et al. 2021, table 1.
    "ti": ViTSize(width=192, depth=12, mlp_dim=768, num_heads=3),
    "s": ViTSize(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "b": ViTSize(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "l": ViTSize(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "h": ViTSize(width=1280, depth=32, mlp_dim=5120, num_heads=16),
    # Alabdulmohsin et al. 2023 (arXiv 2305.13035), the shape-optimised model of 400 M parameters.
    "so400m": ViTSize(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    # Zhai et al. 2022, table 2: "giant" and "gigantic"; capitals matter.
    "g": ViTSize(width=1408, depth=40, mlp_dim=6144, num_heads=16),
    "G": ViTSize(width=1664, depth=48, mlp_dim=8192, num_heads=16),
}


EXPLICIT = re.compile(r"w([1-9]\d{0,4})-d([1-9]\d{0,2})-m([1-9]\d{0,5})-h([1-9]\d{0,2})")
"""Width, depth, MLP's width and heads, as the name of a size that has none."""


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """All that decides a ViT's tensors and what it computes."""

    size: ViTSize
    image_size: tuple[int, int]
    """Height and width in pixels."""
    patch_size: int
    channels: int
    num_classes: int
    pool: Pool = "cls"
    """What the head sees: the class token; or, without one, the mean of the patches (after the last norm,
    Beyer et al. 2022) or an attention pool over them (Zhai et al. 2022, section 3.2)."""
    norm_after_pool: bool = False
    """The last norm is of the pooled mean, not of the tokens: `fc_norm` of timm."""
    positions: Positions = "learned"
    """learned: of the class token and registers, too. sincos2d: fixed (Beyer et al. 2022). rope: queries and
    keys are rotated by their place (Simeoni et al. 2025, DINOv3), which works at any resolution."""
    embed_prefix: bool = True
    """Learned positions also for class token and registers; DeiT-III and DINOv2's registers go without."""
    registers: int = 0
    """Tokens that are thrown away at the end (Darcet et al. 2024, arXiv 2309.16588)."""
    qk_norm: bool = False
    """LayerNorm of queries and keys, per head (Dehghani et al. 2023, arXiv 2302.05442)."""
    layer_scale: float | None = None
    """Initial factor of each residual branch, learned per channel (Touvron et al. 2021, arXiv 2103.17239)."""
    activation: Activation = "gelu"
    """gelu_tanh: the approximation that JAX's models were trained with."""
    norm_epsilon: float = 1e-6
    """As in the JAX original and timm; torch's own default is 1e-5, Hugging Face's ViT has 1e-12."""
    hidden_head: bool = False
    """A layer with tanh before the head, as the paper pretrains (section 3.1); fine-tuning drops it."""
    drop_path: float = 0.0
    """Stochastic depth: rate of the last block (Huang et al. 2016, arXiv 1603.09382)."""
    drop_path_uniform: bool = False
    """The same rate in all blocks (DeiT-III) instead of a linear ramp from 0."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.norm_after_pool and self.pool != "gap":
            raise ConfigError(f"model.norm_after_pool: needs model.pool gap, not {self.pool}")
        if self.positions != "learned" and self.size.width // self.size.num_heads % 4:
            raise ConfigError(f"model.positions: {self.positions} needs heads of a multiple of 4 channels")

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the patch tokens."""
        return patch_grid(self.image_size, self.patch_size)

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class token, then registers."""
        return int(self.pool == "cls") + self.registers

    @property
    def embedded_prefix(self) -> int:
        """Rows of `pos_embed` before those of the patches."""
        return self.num_prefix if self.embed_prefix and self.positions == "learned" else 0

    @property
    def patch_embedding_parameters(self) -> int:
        return _linear(self.channels * self.patch_size**2, self.size.width)

    @property
    def patch_embedding_multiply_adds(self) -> int:
        return self.grid[0] * self.grid[1] * self.channels * self.patch_size**2 * self.size.width


def vit_size(name: str) -> ViTSize:
    """Of a name above, or with its dimensions for a name: w192-d12-m768-h3 is ti."""
    if match := EXPLICIT.fullmatch(name):
        width, depth, mlp_dim, num_heads = map(int, match.groups())
        if width % num_heads:
            raise ConfigError(f"model.size: the width of {name} is no multiple of its {num_heads} heads")
        return ViTSize(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
    if name not in VIT_SIZES:
        raise unknown_size("ViT", name, VIT_SIZES, example="w192-d12-m768-h3")
    return VIT_SIZES[name]


def explicit_name(size: ViTSize) -> str:
    """The name that `vit_size` takes apart."""
    return f"w{size.width}-d{size.depth}-m{size.mlp_dim}-h{size.num_heads}"


def image_shape(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels; one number means a square."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ConfigError(f"model.image_size: {image_size} is not positive")
    return height, width


def size_text(image_size: int | tuple[int, int]) -> str:
    """224 of a square, 224x320 of height 224 and width 320."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return str(height) if height == width else f"{height}x{width}"


def parse_size(text: str) -> int | tuple[int, int]:
    """The reverse of `size_text`; ConfigError where it is none."""
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise ConfigError(f"--image-size {text}: expected pixels per side as 224, or HEIGHTxWIDTH as 224x320")
    height, width = image_shape((int(match[1]), int(match[2] or match[1])))
    return height if height == width else (height, width)


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


def vit_parameters(spec: ViTSpec) -> int:
    """Trainable numbers; fixed positions are none."""
    width, mlp_dim, depth = spec.size.width, spec.size.mlp_dim, spec.size.depth
    rows = spec.grid[0] * spec.grid[1] + spec.embedded_prefix
    embedding = spec.patch_embedding_parameters
    embedding += spec.num_prefix * width + (rows * width if spec.positions == "learned" else 0)
    norm = 2 * width
    mlp = _linear(width, mlp_dim) + _linear(mlp_dim, width)
    block = 2 * norm + _linear(width, 3 * width) + _linear(width, width) + mlp
    block += 4 * (width // spec.size.num_heads) if spec.qk_norm else 0
    block += 2 * width if spec.layer_scale is not None else 0
    pool = 0
    if spec.pool == "map":  # a latent; projections of it, of keys and values, and of the result; norm and MLP
        pool = width + _linear(width, width) + _linear(width, 2 * width) + _linear(width, width) + norm + mlp
    hidden = _linear(width, width) if spec.hidden_head else 0
    return embedding + depth * block + norm + pool + hidden + _linear(width, spec.num_classes)


def vit_flops(spec: ViTSpec) -> int:
    """As papers count: of every token in every block."""
    width, mlp_dim = spec.size.width, spec.size.mlp_dim
    patches = spec.grid[0] * spec.grid[1]
    tokens = spec.num_prefix + patches
    projections = tokens * 4 * width**2
    scores_and_mixing = 2 * tokens**2 * width
    mlp = 2 * width * mlp_dim
    multiply_adds = spec.patch_embedding_multiply_adds
    multiply_adds += spec.size.depth * (projections + scores_and_mixing + tokens * mlp)
    if spec.pool == "map":
        multiply_adds += 2 * width**2 + 2 * patches * width**2 + 2 * patches * width + mlp
    if spec.hidden_head:
        multiply_adds += width**2
    return 2 * (multiply_adds + width * spec.num_classes)


def skipped_flops(spec: ViTSpec) -> int:
    """Those of `vit_flops` that are not computed: where the head sees the class token alone, the last block
    has no queries, projections and MLP of the other tokens."""
    if spec.pool != "cls":
        return 0
    width, others = spec.size.width, spec.num_prefix - 1 + spec.grid[0] * spec.grid[1]
    per_token = 2 * width**2 + 2 * (others + 1) * width + 2 * width * spec.size.mlp_dim
    return 2 * others * per_token


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _whole_patches(pixels: int, patch_size: int) -> int:
    return max(1, pixels // patch_size) * patch_size


def unknown_size(family: str, name: str, known: Iterable[str], *, example: str) -> ConfigError:
    """`example`: of a name that says its dimensions."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1) or [name.lower()] * (name.lower() in known)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(
        f"model.size: no {family} is called {name!r}{meant}; choose one of {', '.join(known)}, or say its "
        f"dimensions, as in {example}"
    )
