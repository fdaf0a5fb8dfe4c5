"""The .npz files of JAX's ViTs, in two layouts.

vision_transformer (Dosovitskiy et al. 2021; AugReg, Steiner et al. 2022): no prefix or `opt/target/`, the
class token has a position. big_vision (Beyer et al. 2022, SigLIP): prefix `params/` or `params/img/`, it has
none; blocks may be stacked along a first axis (scan). Matrices are (inputs, outputs) in both, and attention's
are split into heads.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from workers.errors import CheckpointError
from workers.model_config import ModelConfig
from workers.models.formats import projections
from workers.models.formats.infer import Known

PREFIXES = ("opt/target/", "params/img/", "params/", "")
OUTER = {
    "embedding": "patch_embed.proj",
    "Transformer/encoder_norm": "norm",
    "pre_logits": "pre_logits.fc",
    "head": "head",
    "MAPHead_0/LayerNorm_0": "attn_pool.norm",
    "MAPHead_0/MlpBlock_0/Dense_0": "attn_pool.mlp.fc1",
    "MAPHead_0/MlpBlock_0/Dense_1": "attn_pool.mlp.fc2",
    **{
        f"MAPHead_0/MultiHeadDotProductAttention_0/{theirs}": f"attn_pool.{ours}"
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj"))
    },
}
POSEMBED_INPUT = "Transformer/posembed_input/pos_embedding"
PARAMETERS = {
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    POSEMBED_INPUT: "pos_embed",
    "MAPHead_0/probe": "attn_pool.latent",
}
ATTENTION = {"query": "attn.q", "key": "attn.k", "value": "attn.v", "out": "attn.proj"}


def _block(attention: int, norm2: int, mlp: int) -> dict[str, str]:
    """Flax numbers a block's modules: all of them, or each kind by itself."""
    names = {f"MultiHeadDotProductAttention_{attention}/{part}": ours for part, ours in ATTENTION.items()}
    names |= {f"MlpBlock_{mlp}/Dense_{n}": f"mlp.fc{n + 1}" for n in (0, 1)}
    return {"LayerNorm_0": "norm1", f"LayerNorm_{norm2}": "norm2"} | names


BLOCK = {"vision_transformer": _block(1, 2, 3), "big_vision": _block(0, 1, 0)}


def recognises(names: set[str]) -> bool:
    return any(f"{prefix}embedding/kernel" in names for prefix in PREFIXES)


def known(tensors: Mapping[str, Tensor]) -> Known:
    """JAX's GELU is the tanh approximation; queries are kept by head; the layout says what has positions."""
    queries = [t for name, t in tensors.items() if re.search(r"encoderblock[^/]*/[^/]+/query/bias$", name)]
    num_heads = queries[0].shape[-2] if queries and queries[0].ndim > 1 else None
    embed_prefix = any(name.endswith(POSEMBED_INPUT) for name in tensors)
    return Known(activation="gelu_tanh", num_heads=num_heads, embed_prefix=embed_prefix)


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = next(prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in tensors)
    inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    state = {}
    for name, value in _unstacked(inner):
        module, _, kind = name.rpartition("/")
        ours = _our_module(module)
        if name in PARAMETERS:
            state[PARAMETERS[name]] = value
        elif ours is not None and kind in ("kernel", "scale", "bias"):
            state[f"{ours}.{'bias' if kind == 'bias' else 'weight'}"] = _from_flax(ours, kind, value)
        else:
            state[name] = value  # and so it is named as unexpected
    return projections.join(state)


def from_ours(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """In the layout that has the model's kind of positions. CheckpointError for what neither has."""
    spec = config.spec
    lacking = {
        "rotary positions": spec.positions == "rope",
        "registers": spec.registers > 0,
        "qk_norm": spec.qk_norm,
        "layer_scale": spec.layer_scale is not None,
        "norm_after_pool": spec.norm_after_pool,
    }
    if found := [name for name, lacks in lacking.items() if lacks]:
        raise CheckpointError(f"big_vision's ViT has no {', '.join(found)}; export as timm or safetensors")
    layout = "vision_transformer" if spec.embedded_prefix else "big_vision"
    embedding = POSEMBED_INPUT if spec.embedded_prefix else "pos_embedding"
    parameters = {ours: theirs for theirs, ours in PARAMETERS.items()} | {"pos_embed": embedding}
    modules = {ours: theirs for theirs, ours in OUTER.items()}
    block_modules = {ours: theirs for theirs, ours in BLOCK[layout].items()}
    result = {}
    for name, value in projections.split(state).items():
        module, _, kind = name.rpartition(".")
        if name in parameters:
            theirs, flax = parameters[name], value
        else:
            match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
            path = (
                f"Transformer/encoderblock_{match[1]}/{block_modules[match[2]]}" if match else modules[module]
            )
            flax_kind = "bias" if kind == "bias" else "scale" if value.ndim == 1 else "kernel"
            theirs, flax = f"{path}/{flax_kind}", _to_flax(module, flax_kind, value, spec.size.num_heads)
        result[theirs if layout == "vision_transformer" else f"params/{theirs}"] = flax.contiguous()
    return result


def _unstacked(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Blocks that a scan went over, each by itself."""
    for name, value in tensors.items():
        stacked = name.removeprefix("Transformer/encoderblock/")
        if stacked == name or value.ndim == 0:
            yield name, value
        else:
            yield from ((f"Transformer/encoderblock_{n}/{stacked}", row) for n, row in enumerate(value))


def _our_module(name: str) -> str | None:
    if match := re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", name):
        part = (BLOCK["vision_transformer"] | BLOCK["big_vision"]).get(match[2])
        return part and f"blocks.{match[1]}.{part}"
    return OUTER.get(name)


def _from_flax(module: str, kind: str, value: Tensor) -> Tensor:
    """Kernels are (h, w, C, D); (D, A, E) into attention, (A, E, D) out of it; else (inputs, outputs)."""
    if kind != "kernel":
        return value.flatten()
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    if value.ndim < 2:
        return value
    return value.flatten(0, -2).T if module.endswith("proj") else value.flatten(1).T


def _to_flax(module: str, kind: str, value: Tensor, num_heads: int) -> Tensor:
    part = module.rpartition(".")[2]
    if part in ("q", "k", "v"):
        heads = (num_heads, value.shape[0] // num_heads)
        return value.reshape(heads) if kind == "bias" else value.T.reshape(-1, *heads)
    if kind != "kernel":
        return value
    if value.ndim == 4:
        return value.permute(2, 3, 1, 0)
    if module.endswith(("attn.proj", "attn_pool.proj")):
        return value.T.reshape(num_heads, -1, value.shape[0])
    return value.T
