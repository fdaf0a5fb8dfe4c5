"""The Vision Transformer of Dosovitskiy et al. 2021 (arXiv 2010.11929), with timm's parameter names.

Shape suffixes: B batch, C channels, H W pixels, N tokens (class token first), D width, A attention heads,
E width of one head, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.sizes import ViTSize, patch_grid

EPSILON = 1e-6  # of every norm, as in the JAX original and timm; torch's own default is 1e-5


class PatchEmbed(nn.Module):
    """Cut into patches and project each: a convolution whose stride is its kernel."""

    def __init__(self, *, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BDHW: Tensor = self.proj(images_BCHW)
        return x_BDHW.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, *, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split_heads(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, A, N, E)."""
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q_BANE, k_BANE, v_BANE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q_BANE, k_BANE, v_BANE

    def forward(self, x_BND: Tensor) -> Tensor:
        mixed_BANE = functional.scaled_dot_product_attention(*self.split_heads(x_BND))
        projected: Tensor = self.proj(mixed_BANE.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.fc2(functional.gelu(self.fc1(x_BND)))
        return out_BND


class Block(nn.Module):
    """Pre-norm residual block: equations 2 and 3 of the paper."""

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=EPSILON)
        self.attn = Attention(width=size.width, num_heads=size.num_heads)
        self.norm2 = nn.LayerNorm(size.width, eps=EPSILON)
        self.mlp = Mlp(width=size.width, hidden=size.mlp_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        out_BND: Tensor = x_BND + self.mlp(self.norm2(x_BND))
        return out_BND


class VisionTransformer(nn.Module):
    """Logits (B, K) from the class token of float images (B, C, H, W), already normalised.

    `grid` is the (height, width) of the patch tokens; `num_prefix` counts the tokens before them, and
    `pos_embed` (1, num_prefix + height * width, D) has a row for each of both.
    """

    num_prefix = 1

    def __init__(
        self, size: ViTSize, *, image_size: tuple[int, int], patch_size: int, channels: int, num_classes: int
    ) -> None:
        super().__init__()
        assert size.width % size.num_heads == 0
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid = patch_grid(image_size, patch_size)
        tokens = self.num_prefix + self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.empty(1, self.num_prefix, size.width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, size.width))
        self.patch_embed = PatchEmbed(channels=channels, patch_size=patch_size, width=size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=EPSILON)
        self.head = nn.Linear(size.width, num_classes)
        self.init_weights()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # A wrong size with the right number of tokens would give wrong positions without any error.
        if images_BCHW.shape[-2:] != self.image_size:
            raise ValueError(f"model for images of {self.image_size}, given {tuple(images_BCHW.shape)}")
        x_BND = self.patch_embed(images_BCHW)
        cls_B1D = self.cls_token.expand(x_BND.shape[0], -1, -1)
        x_BND = torch.cat([cls_B1D, x_BND], dim=1) + self.pos_embed
        for block in self.blocks:
            x_BND = block(x_BND)
        logits_BK: Tensor = self.head(self.norm(x_BND[:, 0]))
        return logits_BK

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter, whatever memory holds, after big_vision (Beyer et al. 2022, arXiv 2205.01580).

        Spreads follow the width, biases are zero. A fixed 0.02 (timm, DeiT) suits a width of 768 and all but
        stops the toy sizes: `digits` reached 70 % of held-out digits in 20 epochs with it, 95 % with these.
        Deterministic in the generator's state (torch's own when None), which must be of the parameters'
        device. Call it on whole tensors: the draws of a sharded tensor depend on the sharding.
        """
        nn.init.zeros_(self.cls_token)
        nn.init.normal_(self.pos_embed, std=self.pos_embed.shape[-1] ** -0.5, generator=generator)
        _lecun_normal(self.patch_embed.proj.weight, generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear) and module is not self.head:
                # Queries, keys and values are three matrices in one.
                for weight in module.weight.chunk(3 if name.endswith("qkv") else 1):
                    nn.init.xavier_uniform_(weight, generator=generator)
        nn.init.zeros_(self.head.weight)  # all classes equally likely: the first loss is log K
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)


def _lecun_normal(weight: Tensor, generator: torch.Generator | None) -> None:
    """Variance 1 / fan-in after truncation at two standard deviations (flax's lecun_normal)."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
