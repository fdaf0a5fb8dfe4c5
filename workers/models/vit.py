"""The Vision Transformer of Dosovitskiy et al. 2021 (arXiv 2010.11929) and its offspring, with timm's names.

Shape suffixes: B batch, C channels, H W pixels, N tokens (class token and registers first), D width,
A attention heads, E width of one head, K classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models.positions import Rotary, sincos2d
from workers.models.sizes import ViTSpec

AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class PatchEmbed(nn.Module):
    """Cut into patches and project each: what a convolution does whose stride is its kernel."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # As a matrix product, which is faster than cuDNN's and oneDNN's convolutions of this shape.
        batch, channels, height, width = images_BCHW.shape
        p = self.patch_size
        patches = images_BCHW.reshape(batch, channels, height // p, p, width // p, p)
        rows = patches.permute(0, 2, 4, 1, 3, 5).reshape(
            batch, (height // p) * (width // p), channels * p * p
        )
        embedded: Tensor = F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)
        return embedded


class Attention(nn.Module):
    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        width, self.num_heads = spec.size.width, spec.size.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(width // self.num_heads, eps=spec.norm_epsilon) if spec.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(spec.dropout)

    def split_heads(self, x_BND: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, A, N, E), as the scores are computed from them."""
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q_BANE, k_BANE, v_BANE = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q_BANE, k_BANE = self.q_norm(q_BANE), self.k_norm(k_BANE)
        if rotary is not None:
            q_BANE, k_BANE = rotary.turn(q_BANE), rotary.turn(k_BANE)
        return q_BANE, k_BANE, v_BANE

    def class_heads(self, x_BND: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the query (B, A, 1, E) of the class token alone, which is never turned."""
        batch, tokens, width = x_BND.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(x_BND[:, :1], weight[:width], bias[:width]).view(batch, 1, self.num_heads, -1)
        kv = F.linear(x_BND, weight[width:], bias[width:]).view(batch, tokens, 2, self.num_heads, -1)
        k_BANE, v_BANE = kv.permute(2, 0, 3, 1, 4).unbind(0)
        k_BANE = self.k_norm(k_BANE)
        return self.q_norm(query.transpose(1, 2)), k_BANE if rotary is None else rotary.turn(k_BANE), v_BANE

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None, class_alone: bool = False) -> Tensor:
        heads = self.class_heads(x_BND, rotary) if class_alone else self.split_heads(x_BND, rotary)
        mixed_BANE = attend(*heads)
        projected: Tensor = self.proj_drop(self.proj(mixed_BANE.transpose(1, 2).flatten(2)))
        return projected


def attend(q_BANE: Tensor, k_BANE: Tensor, v_BANE: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, by whichever kernel is fastest for device and dtype."""
    if AVX512 and q_BANE.device.type == "cpu" and q_BANE.dtype == torch.bfloat16:
        # Torch's fused attention makes a step of S/16 in bfloat16 1.4 times as long there. On older CPUs,
        # which have no fast products in bfloat16 at all, it takes half of the time of this.
        scores = (q_BANE * q_BANE.shape[-1] ** -0.5) @ k_BANE.transpose(-2, -1)
        mixed_BANE: Tensor = scores.softmax(dim=-1) @ v_BANE
        return mixed_BANE
    return F.scaled_dot_product_attention(q_BANE, k_BANE, v_BANE)


class Mlp(nn.Module):
    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.size.width, spec.size.mlp_dim)
        self.fc2 = nn.Linear(spec.size.mlp_dim, spec.size.width)
        self.drop = nn.Dropout(spec.dropout)
        self.approximate = "tanh" if spec.activation == "gelu_tanh" else "none"

    def forward(self, x_BND: Tensor) -> Tensor:
        hidden = self.drop(F.gelu(self.fc1(x_BND), approximate=self.approximate))
        out_BND: Tensor = self.drop(self.fc2(hidden))
        return out_BND


class LayerScale(nn.Module):
    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class Block(nn.Module):
    """Pre-norm residual block: equations 2 and 3 of the paper."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        width = spec.size.width
        self.norm1 = nn.LayerNorm(width, eps=spec.norm_epsilon)
        self.attn = Attention(spec)
        self.norm2 = nn.LayerNorm(width, eps=spec.norm_epsilon)
        self.mlp = Mlp(spec)
        self.ls1, self.ls2 = (
            nn.Identity() if spec.layer_scale is None else LayerScale(width, spec.layer_scale)
            for _ in range(2)
        )

    def forward(
        self,
        x_BND: Tensor,
        rotary: Rotary | None = None,
        keep_2B: Tensor | None = None,
        class_alone: bool = False,
    ) -> Tensor:
        """`keep_2B`: factors of the two branches for each image, 0 where stochastic depth drops one.
        `class_alone`: only what becomes of the class token, (B, 1, D)."""
        branch = self.ls1(self.attn(self.norm1(x_BND), rotary, class_alone))
        x_BND = x_BND[:, :1] if class_alone else x_BND
        x_BND = x_BND + (branch if keep_2B is None else branch * keep_2B[0, :, None, None])
        branch = self.ls2(self.mlp(self.norm2(x_BND)))
        out_BND: Tensor = x_BND + (branch if keep_2B is None else branch * keep_2B[1, :, None, None])
        return out_BND


class AttentionPool(nn.Module):
    """One learned query that looks at all patches, then an MLP: the MAP head of Zhai et al. 2022."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        width, self.num_heads = spec.size.width, spec.size.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=spec.norm_epsilon)
        self.mlp = Mlp(spec)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, width = x_BND.shape
        head = (self.num_heads, width // self.num_heads)
        q_BANE = self.q(self.latent).view(1, 1, *head).transpose(1, 2).expand(batch, -1, -1, -1)
        kv = self.kv(x_BND).view(batch, tokens, 2, *head)
        k_BANE, v_BANE = kv.permute(2, 0, 3, 1, 4).unbind(0)
        pooled = self.proj(attend(q_BANE, k_BANE, v_BANE).transpose(1, 2).reshape(batch, 1, width))
        out_BND: Tensor = pooled + self.mlp(self.norm(pooled))
        return out_BND[:, 0]


class HiddenLayer(nn.Module):
    """The tanh layer of the head with which the paper pretrains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        out_BD: Tensor = torch.tanh(self.fc(x_BD))
        return out_BD


class VisionTransformer(nn.Module):
    """Logits (B, K) of float images (B, C, H, W), already normalised.

    `spec.grid` is the (height, width) of the patch tokens; `spec.num_prefix` counts the tokens before them.
    `pos_embed` is (1, spec.embedded_prefix + height * width, D); fixed ones are a parameter that takes no
    gradient, so that they are saved and resampled as learned ones are. `patch_embed` maps images to patch
    tokens (B, height * width, D); None: a projection of the pixels.
    """

    def __init__(self, spec: ViTSpec, patch_embed: PatchEmbed | None = None) -> None:
        super().__init__()
        width, depth = spec.size.width, spec.size.depth
        assert width % spec.size.num_heads == 0
        self.spec = spec
        if spec.pool == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if spec.registers:
            self.reg_token = nn.Parameter(torch.empty(1, spec.registers, width))
        if spec.positions != "rope":
            rows = spec.embedded_prefix + spec.grid[0] * spec.grid[1]
            learned = spec.positions == "learned"
            self.pos_embed = nn.Parameter(torch.empty(1, rows, width), requires_grad=learned)
        self.patch_embed = patch_embed or PatchEmbed(spec.channels, spec.patch_size, width)
        self.pos_drop = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(depth))
        norm = nn.LayerNorm(width, eps=spec.norm_epsilon)
        if spec.norm_after_pool:
            self.fc_norm = norm
        else:
            self.norm = norm
        if spec.pool == "map":
            self.attn_pool = AttentionPool(spec)
        if spec.hidden_head:
            self.pre_logits = HiddenLayer(width)
        self.head = nn.Linear(width, spec.num_classes)
        self.init_weights()

    def forward(self, images_BCHW: Tensor, keep: Tensor | None = None) -> Tensor:
        """`keep` (depth, 2, B): see `Block`; None keeps all."""
        x_BND = self.embed(images_BCHW)
        rotary = self.rotary(x_BND)
        # After the last block nobody looks at the patches: that is 6 % of the work of a step of B/16.
        last = len(self.blocks) - 1 if self.spec.pool == "cls" else None
        for index, block in enumerate(self.blocks):
            x_BND = block(x_BND, rotary, None if keep is None else keep[index], index == last)
        logits_BK: Tensor = self.head(self.features(x_BND))
        return logits_BK

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """(B, N, D): what the first block sees."""
        # A wrong size with the right number of tokens would give wrong positions without any error.
        if images_BCHW.shape[-2:] != self.spec.image_size:
            raise ValueError(f"model for images of {self.spec.image_size}, given {tuple(images_BCHW.shape)}")
        x_BND: Tensor = self.patch_embed(images_BCHW)
        spec, batch = self.spec, x_BND.shape[0]
        prefix = [self.cls_token.expand(batch, -1, -1)] if spec.pool == "cls" else []
        prefix += [self.reg_token.expand(batch, -1, -1)] if spec.registers else []
        if spec.positions == "rope":
            x_BND = torch.cat([*prefix, x_BND], dim=1) if prefix else x_BND
        elif spec.embedded_prefix == spec.num_prefix:
            x_BND = (torch.cat([*prefix, x_BND], dim=1) if prefix else x_BND) + self.pos_embed
        else:
            x_BND = torch.cat([*prefix, x_BND + self.pos_embed], dim=1)
        embedded: Tensor = self.pos_drop(x_BND)
        return embedded

    def features(self, x_BND: Tensor) -> Tensor:
        """(B, D): what the head sees of the last block's tokens."""
        spec = self.spec
        if spec.pool == "cls":
            pooled_BD = self.norm(x_BND[:, 0])
        elif spec.norm_after_pool:
            pooled_BD = self.fc_norm(x_BND[:, spec.num_prefix :].mean(dim=1))
        elif spec.pool == "gap":
            pooled_BD = self.norm(x_BND[:, spec.num_prefix :]).mean(dim=1)
        else:
            pooled_BD = self.attn_pool(self.norm(x_BND[:, spec.num_prefix :]))
        features_BD: Tensor = self.pre_logits(pooled_BD) if spec.hidden_head else pooled_BD
        return features_BD

    def rotary(self, x_BND: Tensor) -> Rotary | None:
        """What every block is given beside the tokens."""
        spec = self.spec
        if spec.positions != "rope":
            return None
        return Rotary.of(spec.grid, spec.size.width // spec.size.num_heads, x_BND)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter, whatever memory holds, after big_vision (Beyer et al. 2022, arXiv 2205.01580).

        Spreads follow the width, biases are zero. A fixed 0.02 (timm, DeiT) suits a width of 768 and all but
        stops the toy sizes: `digits` reached 70 % of held-out digits in 20 epochs with it, 95 % with these.
        Deterministic in the generator's state (torch's own when None), which must be of the parameters'
        device. Call it on whole tensors: the draws of a sharded tensor depend on the sharding.
        """
        spec, width = self.spec, self.spec.size.width
        if spec.pool == "cls":
            nn.init.zeros_(self.cls_token)
        if spec.registers:
            nn.init.normal_(self.reg_token, std=width**-0.5, generator=generator)
        if spec.positions == "learned":
            nn.init.normal_(self.pos_embed, std=width**-0.5, generator=generator)
        elif spec.positions == "sincos2d":
            self.pos_embed.copy_(sincos2d(spec.grid, width))
        _lecun_normal(self.patch_embed.proj.weight, generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.initial)
            elif isinstance(module, AttentionPool):
                nn.init.xavier_uniform_(module.latent[0], generator=generator)
            elif isinstance(module, nn.Linear) and module is not self.head:
                # Queries, keys and values are several matrices in one.
                parts = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
                for weight in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(weight, generator=generator)
        nn.init.zeros_(self.head.weight)  # all classes equally likely: the first loss is log K
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)


def drop_path_rates(spec: ViTSpec) -> list[float]:
    """Of each block's two branches."""
    last = max(1, spec.size.depth - 1)
    return [spec.drop_path * (1 if spec.drop_path_uniform else n / last) for n in range(spec.size.depth)]


def _lecun_normal(weight: Tensor, generator: torch.Generator | None) -> None:
    """Variance 1 / fan-in after truncation at two standard deviations (flax's lecun_normal)."""
    std = 1 / math.sqrt(weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
