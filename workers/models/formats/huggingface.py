"""Hugging Face's ViT: `model.safetensors` of a ViTModel or ViTForImageClassification, and its config.json.

Files on the Hub and those that transformers writes have the names of before transformers 5; in memory it has
others since. Both are read, the former are written.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.errors import CheckpointError
from workers.model_config import ModelConfig
from workers.models.formats import projections
from workers.models.formats.infer import Known
from workers.models.sizes import Activation

OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
}
BLOCK = {
    "layernorm_before": "norm1",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
BLOCK_IN_MEMORY = {
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
UNUSED = ("pooler.", "embeddings.mask_token")
"""Of pretraining; the classifier sees neither."""
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
EPSILON = 1e-12
"""transformers' default, where the original and timm have 1e-6."""


def recognises(names: set[str]) -> bool:
    return any(re.match(r"(vit\.)?embeddings\.patch_embeddings\.", name) for name in names)


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        inner = name.removeprefix("vit.")
        if not inner.startswith(UNUSED):
            renamed[_to_our_name(inner)] = value
    return projections.join(renamed)


def _to_our_name(name: str) -> str:
    if match := re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", name):
        part = (BLOCK | BLOCK_IN_MEMORY).get(match[2], match[2])
        return f"blocks.{match[1]}.{part}.{match[3]}"
    if name in OUTER:
        return OUTER[name]
    module, _, kind = name.rpartition(".")
    return f"{OUTER[module]}.{kind}" if module in OUTER else name


def from_ours(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """CheckpointError for what Hugging Face's ViT has not."""
    spec = config.spec
    lacking = {
        f"pool {spec.pool}": spec.pool != "cls",
        f"positions {spec.positions}": spec.positions == "rope",
        "positions without rows for the class token": spec.embedded_prefix != spec.num_prefix,
        "registers": spec.registers > 0,
        "qk_norm": spec.qk_norm,
        "layer_scale": spec.layer_scale is not None,
        "hidden_head": spec.hidden_head,
    }
    if found := [name for name, lacks in lacking.items() if lacks]:
        raise CheckpointError(f"Hugging Face's ViT has no {', '.join(found)}; export as timm or safetensors")
    outer = {ours: theirs for theirs, ours in OUTER.items()}
    block = {ours: theirs for theirs, ours in BLOCK.items()}
    result = {}
    for name, value in projections.split(state).items():
        module, _, kind = name.rpartition(".")
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
            theirs = f"vit.encoder.layer.{match[1]}.{block[match[2]]}.{kind}"
        else:
            theirs = outer[name] if name in outer else f"{outer[module]}.{kind}"
            theirs = theirs if theirs.startswith("classifier") else f"vit.{theirs}"
        result[theirs] = value
    return result


def config_json(config: ModelConfig) -> dict[str, Any]:
    """For `ViTConfig`."""
    spec, size = config.spec, config.spec.size
    height, width = spec.image_size
    labels = {str(label): f"LABEL_{label}" for label in range(spec.num_classes)}
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "dtype": "float32",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.mlp_dim,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation],
        "hidden_dropout_prob": spec.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": spec.norm_epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": spec.patch_size,
        "num_channels": spec.channels,
        "qkv_bias": True,
        "id2label": labels,
        "label2id": {name: int(label) for label, name in labels.items()},
    }


def preprocessor_json(config: ModelConfig) -> dict[str, Any]:
    """For `ViTImageProcessor`: pixels in -1..1, as our models are trained."""
    height, width = config.image_shape
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config.channels,
        "image_std": [0.5] * config.channels,
    }


def known(file: Path) -> Known:
    """What config.json beside the file says; transformers' defaults where there is none."""
    path = file.with_name("config.json")
    if not path.is_file():
        return Known(norm_epsilon=EPSILON, embed_prefix=True)
    try:
        values = json.loads(path.read_text())
        if values["model_type"] != "vit":
            raise CheckpointError(f"{path}: model_type {values['model_type']!r} is not vit")
        activation = values.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"{path}: hidden_act {activation!r}; known: {', '.join(ACTIVATIONS)}")
        side = values.get("image_size")
        return Known(
            embed_prefix=True,
            norm_epsilon=float(values.get("layer_norm_eps", EPSILON)),
            activation=ACTIVATIONS[activation],
            num_heads=int(values["num_attention_heads"]) if "num_attention_heads" in values else None,
            image_size=(int(side[0]), int(side[1])) if isinstance(side, list) else side and int(side),
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a ViT: {error!r}") from None
