"""What a forward pass leaves for the backward pass, in closed form and without torch.

Counted as autograd keeps it: of a product its inputs, of a norm its input and two floats per row, of fused
attention queries, keys, values, result and one float per row and head: 8 width + 2 mlp_dim of each token
and block, the terms of Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) without those of dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.config import RunConfig
from workers.models.hybrid_sizes import HybridSpec
from workers.models.resnet_sizes import BiTSize, ResNetSize, bit_convolutions, bottlenecks, resnet_size
from workers.models.sizes import ViTSpec

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Bytes of one image in a block, or in all that is outside of blocks."""

    kept: int
    """From the forward pass to this unit's backward pass, the block's input with it."""
    whole: int
    """While its backward pass runs: more than `kept` where that computes the block again."""
    work: int
    """Gradients of activations beside that, at their widest."""
    filters: int = 0
    """Of all images together: filters as they are standardised, until this unit's backward pass."""


def activations(config: RunConfig, *, cuda: bool) -> list[Unit]:
    """Outside of blocks first, then block by block."""
    if config.model.family == "resnet":
        return _resnet(config)
    spec = config.model.spec
    token = _Token(config, spec, fused_attention=cuda or config.train.precision == "float32", cuda=cuda)
    depth = spec.size.depth
    alone = spec.pool == "cls"  # then the last block is one of the class token
    blocks = [token.block(class_alone=alone and number == depth - 1) for number in range(depth)]
    return [token.outside(), *blocks]


def element_bytes(config: RunConfig) -> int:
    """Of what is computed."""
    return FLOAT if config.train.precision == "float32" else FLOAT // 2


@dataclass(frozen=True)
class _Token:
    """Of a ViT's blocks."""

    config: RunConfig
    spec: ViTSpec
    fused_attention: bool
    cuda: bool

    @property
    def tokens(self) -> int:
        return self.spec.num_prefix + self.spec.grid[0] * self.spec.grid[1]

    def block(self, *, class_alone: bool) -> Unit:
        spec, each = self.spec, element_bytes(self.config)
        width, mlp_dim, heads = spec.size.width, spec.size.mlp_dim, spec.size.num_heads
        tokens, queries = self.tokens, 1 if class_alone else self.tokens
        mask = 1 if self.cuda else each
        # Of all tokens: the input, its norm, keys and values. Of those with a query: that, what attention
        # mixed, the sum, its norm, the hidden layer before and after its activation.
        values = tokens * 4 * width + queries * (4 * width + 2 * mlp_dim)
        floats = 2 * tokens + 2 * queries + (queries * heads if self.fused_attention else 0)
        if not self.fused_attention:
            values += heads * queries * tokens
        turned = tokens + queries
        if spec.qk_norm:
            values += turned * width
            floats += 2 * turned * heads
        if spec.positions == "rope":
            values += turned * width
        if spec.layer_scale is not None:
            values += 2 * queries * width
        whole = values * each + floats * FLOAT
        if spec.dropout:
            whole += queries * (2 * width + mlp_dim) * mask
        entry = tokens * width * each
        products = (tokens * 2 * width + queries * (4 * width + mlp_dim)) * each
        products += queries * heads * FLOAT if self.fused_attention else heads * queries * tokens * each
        # At its widest the gradient of the MLP's hidden layer before and after its activation, less what was
        # kept of the latter; of a class token alone those of keys, values, norm and input.
        work = max(queries * (width + mlp_dim), tokens * 4 * width if class_alone else 0) * each
        match self.config.compute.activation_checkpointing:
            case "none":
                return Unit(kept=whole, whole=whole, work=work)
            case "selective":
                return Unit(kept=entry + products, whole=max(whole, entry + products), work=work)
            case "full":
                return Unit(kept=entry, whole=whole, work=work)

    def outside(self) -> Unit:
        """Images and patches before the blocks; norm, pool and head after them."""
        spec, each = self.spec, element_bytes(self.config)
        width, (height, columns) = spec.size.width, spec.grid
        patches, pixels = height * columns, spec.channels * spec.image_size[0] * spec.image_size[1]
        kept = pixels * FLOAT
        if isinstance(spec, HybridSpec):
            kept += (_backbone(spec) + patches * spec.stem.features) * each
        else:
            kept += pixels * each
        if spec.dropout:
            kept += self.tokens * width * (1 if self.cuda else each)
        if spec.pool != "cls":
            kept += self.tokens * width * each  # what the last block made
        if spec.pool == "map":
            kept += patches * 3 * width * each
        logits = spec.num_classes
        kept += logits * (2 * FLOAT + each)
        work, filters = self.tokens * 2 * width * each + logits * FLOAT, 0
        if isinstance(spec, HybridSpec):
            filters = each * sum(row.weights for row in bit_convolutions(spec.stem, spec.channels))
        return Unit(kept=kept, whole=kept, work=work, filters=filters)


def _backbone(spec: HybridSpec) -> int:
    """Values of the ResNet of a hybrid; it is outside of blocks."""
    area = spec.image_size[0] * spec.image_size[1]
    # The padded image; the convolution of stride 2, and that after norm and ReLU; the padded input of the
    # pool and where its maxima are, of 8 bytes.
    values = spec.channels * area + 3 * 64 * area // 4 + 64 * area // 16 * 4
    at = area // 16
    for shape in bottlenecks(spec.stem):
        after = at // shape.stride**2
        values += at * shape.inputs + 2 * at * shape.inner + 2 * after * shape.inner + after * shape.outputs
        values += after * shape.outputs if shape.first else 0
        values += at * shape.inner if shape.stride > 1 else 0  # padded for the strided convolution
        at = after
    return values


def _resnet(config: RunConfig) -> list[Unit]:
    size, each = resnet_size(config.model.size), element_bytes(config)
    height, width = config.model.image_shape
    area = height * width
    blocks = _bottlenecks(size, area) if isinstance(size, BiTSize) else _residuals(size, area)
    pixels = config.model.channels * height * width
    again = config.compute.activation_checkpointing != "none"  # none of a convolution's results is kept
    units = [
        Unit(
            kept=(entry if again else whole) * each,
            whole=whole * each,
            work=work * each,
            filters=filters * each,
        )
        for entry, whole, work, filters in blocks
    ]
    if isinstance(size, BiTSize):
        channels = 64 * size.width_factor
        stem = height * width // 4 * channels * each + height * width // 16 * channels * 8
        stride = 1 << (len(size.blocks) + 1)
        last = 2 * size.features * -(-height // stride) * -(-width // stride)
    else:
        stem = height * width * size.width * each
        last = (size.width << 2) * -(-height // 4) * -(-width // 4)
    cast = pixels * each if each < FLOAT else 0
    kept = pixels * FLOAT + cast + stem + last * each + config.model.num_classes * (2 * FLOAT + each)
    return [Unit(kept=kept, whole=kept, work=stem), *units]


def _residuals(size: ResNetSize, area: int) -> Sequence[tuple[int, int, int, int]]:
    """(input, all that is kept, work, filters) of each block, in values."""
    width, per_stage = size.width, size.blocks_per_stage
    rows, entry = [], width * area
    for stage in range(3):
        after = (width << stage) * (area >> 2 * stage)
        for _ in range(per_stage):
            # Before and after the first norm and its ReLU, and before the second norm.
            rows.append((entry, entry + 3 * after, 4 * after, 0))
            entry = after
    return rows


def _bottlenecks(size: BiTSize, area: int) -> Sequence[tuple[int, int, int, int]]:
    rows, at = [], area // 16
    for shape in bottlenecks(size):
        after = at // shape.stride**2
        entry = at * shape.inputs
        whole = 2 * entry + 2 * at * shape.inner + 2 * after * shape.inner
        filters = shape.inputs * shape.inner + 9 * shape.inner**2 + shape.inner * shape.outputs
        filters += shape.inputs * shape.outputs if shape.first else 0
        rows.append((entry, whole, at * shape.inputs + after * shape.outputs, filters))
        at = after
    return rows
