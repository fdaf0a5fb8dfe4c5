"""Queries, keys and values: one matrix in timm's models and ours, three elsewhere."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

JOINED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "attn_pool.kv": ("attn_pool.k", "attn_pool.v")}


def join(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`...attn.q.weight`, `.k.`, `.v.` become `...attn.qkv.weight`; incomplete ones stay as they are."""
    result = dict(state)
    for joined, parts in JOINED.items():
        for name in state:
            match = re.fullmatch(rf"(.*\b){re.escape(parts[0])}\.(weight|bias)", name)
            names = [f"{match[1]}{part}.{match[2]}" for part in parts] if match else []
            values = [state[part] for part in names if part in state]
            if match and len(values) == len(parts) and len({value.shape for value in values}) == 1:
                result[f"{match[1]}{joined}.{match[2]}"] = torch.cat(values)
                for part in names:
                    del result[part]
    return result


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `join`."""
    result = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        joined = next((known for known in JOINED if re.search(rf"\b{known}$", module)), None)
        if joined is None:
            result[name] = value
            continue
        parts = JOINED[joined]
        for part, chunk in zip(parts, value.chunk(len(parts)), strict=True):
            result[f"{module.removesuffix(joined)}{part}.{kind}"] = chunk
    return result
