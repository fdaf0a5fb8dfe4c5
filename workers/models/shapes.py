"""The parameters of a model by name, with their shapes, in closed form and without torch."""

from workers.model_config import ModelConfig
from workers.models.hybrid_sizes import HybridSpec
from workers.models.resnet_sizes import (
    BiTSize,
    BottleneckShape,
    ResNetSize,
    bottlenecks,
    resnet_size,
)
from workers.models.sizes import ViTSpec

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model: ModelConfig) -> list[Shapes]:
    """Those outside of blocks first, then those of each block."""
    if model.family != "resnet":
        spec = model.spec
        return [_vit_outside(spec), *(_vit_block(spec, number) for number in range(spec.size.depth))]
    size = resnet_size(model.size)
    if isinstance(size, BiTSize):
        return _bit(size, model.channels, model.num_classes)
    return _resnet(size, model.channels, model.num_classes)


def _vit_outside(spec: ViTSpec) -> Shapes:
    width = spec.size.width
    shapes: Shapes = {"cls_token": (1, 1, width)} if spec.pool == "cls" else {}
    if spec.registers:
        shapes["reg_token"] = (1, spec.registers, width)
    if spec.positions != "rope":
        shapes["pos_embed"] = (1, spec.embedded_prefix + spec.grid[0] * spec.grid[1], width)
    if isinstance(spec, HybridSpec):
        shapes |= _linear("patch_embed.proj", spec.stem.features, width, (1, 1))
        shapes |= _backbone(spec)
    else:
        shapes |= _linear("patch_embed.proj", spec.channels, width, (spec.patch_size, spec.patch_size))
    shapes |= _norm("fc_norm" if spec.norm_after_pool else "norm", width)
    if spec.pool == "map":
        pool = "attn_pool"
        shapes |= {f"{pool}.latent": (1, 1, width)} | _norm(f"{pool}.norm", width)
        for name, outputs in (("q", width), ("kv", 2 * width), ("proj", width)):
            shapes |= _linear(f"{pool}.{name}", width, outputs)
        shapes |= _mlp(f"{pool}.mlp", spec)
    if spec.hidden_head:
        shapes |= _linear("pre_logits.fc", width, width)
    return shapes | _linear("head", width, spec.num_classes)


def _vit_block(spec: ViTSpec, number: int) -> Shapes:
    width, name = spec.size.width, f"blocks.{number}"
    shapes = _norm(f"{name}.norm1", width) | _linear(f"{name}.attn.qkv", width, 3 * width)
    if spec.qk_norm:
        for norm in ("q_norm", "k_norm"):
            shapes |= _norm(f"{name}.attn.{norm}", width // spec.size.num_heads)
    shapes |= _linear(f"{name}.attn.proj", width, width) | _norm(f"{name}.norm2", width)
    shapes |= _mlp(f"{name}.mlp", spec)
    if spec.layer_scale is not None:
        shapes |= {f"{name}.{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
    return shapes


def _backbone(spec: HybridSpec) -> Shapes:
    name = "patch_embed.backbone"
    shapes: Shapes = {f"{name}.stem.conv.weight": (64, spec.channels, 7, 7)} | _norm(f"{name}.stem.norm", 64)
    for place, shape in _places(spec.stem):
        block = f"{name}.{place}"
        if shape.first:
            shapes |= {f"{block}.downsample.conv.weight": (shape.outputs, shape.inputs, 1, 1)}
            shapes |= _norm(f"{block}.downsample.norm", shape.outputs)
        shapes |= _convolutions(block, shape)
        for norm, channels in (("norm1", shape.inner), ("norm2", shape.inner), ("norm3", shape.outputs)):
            shapes |= _norm(f"{block}.{norm}", channels)
    return shapes


def _bit(size: BiTSize, channels: int, num_classes: int) -> list[Shapes]:
    outside: Shapes = {"stem.conv.weight": (64 * size.width_factor, channels, 7, 7)}
    outside |= _norm("norm", size.features) | _linear("head.fc", size.features, num_classes, (1, 1))
    blocks = []
    for block, shape in _places(size):
        shapes: Shapes = {}
        if shape.first:
            shapes[f"{block}.downsample.conv.weight"] = (shape.outputs, shape.inputs, 1, 1)
        for norm, count in (("norm1", shape.inputs), ("norm2", shape.inner), ("norm3", shape.inner)):
            shapes |= _norm(f"{block}.{norm}", count)
        blocks.append(shapes | _convolutions(block, shape))
    return [outside, *blocks]


def _resnet(size: ResNetSize, channels: int, num_classes: int) -> list[Shapes]:
    outside: Shapes = {"conv1.weight": (size.width, channels, 3, 3)} | _norm("norm1", size.width)
    inputs, blocks = size.width, list[Shapes]()
    for stage in range(3):
        outputs = size.width << stage
        for _ in range(size.blocks_per_stage):
            name = f"blocks.{len(blocks)}"
            shapes: Shapes = {f"{name}.conv1.weight": (outputs, inputs, 3, 3)} | _norm(
                f"{name}.norm1", outputs
            )
            shapes |= {f"{name}.conv2.weight": (outputs, outputs, 3, 3)} | _norm(f"{name}.norm2", outputs)
            blocks.append(shapes)
            inputs = outputs
    return [outside | _linear("head", inputs, num_classes), *blocks]


def _places(size: BiTSize) -> list[tuple[str, BottleneckShape]]:
    """Names of the bottlenecks, and what they are."""
    names = [f"stages.{stage}.blocks.{at}" for stage, count in enumerate(size.blocks) for at in range(count)]
    return list(zip(names, bottlenecks(size), strict=True))


def _convolutions(block: str, shape: BottleneckShape) -> Shapes:
    return {
        f"{block}.conv1.weight": (shape.inner, shape.inputs, 1, 1),
        f"{block}.conv2.weight": (shape.inner, shape.inner, 3, 3),
        f"{block}.conv3.weight": (shape.outputs, shape.inner, 1, 1),
    }


def _mlp(name: str, spec: ViTSpec) -> Shapes:
    width, mlp_dim = spec.size.width, spec.size.mlp_dim
    return _linear(f"{name}.fc1", width, mlp_dim) | _linear(f"{name}.fc2", mlp_dim, width)


def _linear(name: str, inputs: int, outputs: int, kernel: tuple[int, ...] = ()) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
