"""Parameters by name, without torch: which layer each is of, and which are frozen."""

import re

EMBEDDINGS = ("cls_token", "reg_token", "pos_embed", "patch_embed", "conv1", "norm1")
"""What lies before the first block; the last two are of ResNets."""


def layer_of(name: str, depth: int) -> int:
    """0: embeddings, n + 1: block n, depth + 1: the head and a pool's own layers. The last norm of tokens
    goes with the last block, as in timm's `param_groups_layer_decay`."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    top = name.partition(".")[0]
    return 0 if top in EMBEDDINGS else depth if top == "norm" else depth + 1


def is_frozen(name: str, depth: int, which: str) -> bool:
    """`which`: see `OptimConfig.freeze`."""
    if which == "patch_embedding":
        return name.startswith("patch_embed.")
    if which.startswith("blocks:"):
        return layer_of(name, depth) <= int(which.removeprefix("blocks:"))
    return which == "backbone" and not name.startswith("head.")
