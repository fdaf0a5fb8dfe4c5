"""timm's Vision Transformers: our names are theirs."""

from collections.abc import Mapping

from torch import Tensor

from workers.errors import CheckpointError
from workers.model_config import ModelConfig

NAMES = {
    "ti": "vit_tiny_patch16_224",
    "s": "vit_small_patch16_224",
    "b": "vit_base_patch16_224",
    "l": "vit_large_patch16_224",
}
"""Of timm's models at these sizes; others are one of them with other dimensions."""


def recognises(names: set[str]) -> bool:
    return "patch_embed.proj.weight" in names


def from_ours(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """CheckpointError for what timm's VisionTransformer has not."""
    if config.positions == "rope":
        raise CheckpointError("timm's VisionTransformer has no rotary positions; export as safetensors")
    if config.hidden_head:
        raise CheckpointError("timm's VisionTransformer has no hidden_head any more; export as big_vision")
    return dict(state)


def create_model(config: ModelConfig) -> str:
    """The line of Python that makes the model which takes our tensors; needs timm, torch and functools."""
    spec, size = config.spec, config.spec.size
    height, width = spec.image_size
    arguments: dict[str, object] = {
        "img_size": height if height == width else (height, width),
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "num_classes": spec.num_classes,
    }
    if config.size not in NAMES:
        arguments |= {"embed_dim": size.width, "depth": size.depth, "num_heads": size.num_heads}
        arguments["mlp_ratio"] = size.mlp_dim / size.width
    if spec.pool == "gap":
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": spec.norm_after_pool}
    elif spec.pool == "map":
        arguments |= {"class_token": False, "global_pool": "map"}
    if spec.registers:
        arguments["reg_tokens"] = spec.registers
    if spec.num_prefix and not spec.embedded_prefix:
        arguments["no_embed_class"] = True
    if spec.qk_norm:
        arguments["qk_norm"] = True
    if spec.layer_scale is not None:
        arguments["init_values"] = spec.layer_scale
    if spec.activation != "gelu":
        arguments["act_layer"] = spec.activation
    text = [f"{name}={value!r}" for name, value in arguments.items()]
    if spec.norm_epsilon != 1e-6:
        text.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={spec.norm_epsilon!r})")
    return f"timm.create_model({NAMES.get(config.size, NAMES['b'])!r}, {', '.join(text)})"
