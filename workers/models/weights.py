"""A trained ViT's weights for a model of another resolution or other classes."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from workers.errors import CheckpointError
from workers.models.positions import resample_patch_embedding, resample_position_embedding
from workers.models.sizes import Resampling
from workers.models.vit import VisionTransformer

HEAD = ("head.weight", "head.bias")
HIDDEN = "pre_logits."
PATCHES = "patch_embed.proj.weight"
PREFIX = ("cls_token", "reg_token")
SHOWN = 8  # faults in one message; a wrong model size has hundreds


def adapt_state_dict(
    state: Mapping[str, Tensor],
    *,
    source_grid: tuple[int, int],
    target: VisionTransformer,
    new_head: bool,
    convention: Resampling = "timm-bicubic",
) -> dict[str, Tensor]:
    """`state`, trained on `source_grid` (height, width) patches, as a whole state dict for `target`.

    Position embeddings, learned or fixed, are resampled to the target's grid; patches of another size are
    resampled as FlexiViT does; a new head is zeros, whatever the old one was, and takes the place of a hidden
    layer, too, that the target has not; all else is the same tensors. The target lends shapes and grid only
    and may be on the meta device. CheckpointError names every tensor that is missing, unexpected, of another
    shape or not finite.
    """
    wanted = target.state_dict()
    dropped = {*HEAD, *(name for name in state if name.startswith(HIDDEN) and name not in wanted)}
    adapted = {name: tensor for name, tensor in state.items() if not (new_head and name in dropped)}
    if new_head:
        for name in HEAD:
            adapted[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
    # Where other tokens come before the patches there is nothing to resample; the check names what differs.
    same_prefix = all(_shape(adapted, name) == _shape(wanted, name) for name in PREFIX)
    if same_prefix and "pos_embed" in adapted and "pos_embed" in wanted:
        adapted["pos_embed"] = resample_position_embedding(
            adapted["pos_embed"],
            source_grid,
            target.spec.grid,
            num_prefix=target.spec.embedded_prefix,
            convention=convention,
        )
    if PATCHES in adapted and adapted[PATCHES].ndim == 4:
        height, width = wanted[PATCHES].shape[2:]
        adapted[PATCHES] = resample_patch_embedding(adapted[PATCHES], (height, width))
    check_state(adapted, wanted)
    return {name: adapted[name] for name in wanted}


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """CheckpointError, naming tensors and shapes, unless `state` is finite and has what is wanted."""
    faults = [f"{name} is missing" for name in wanted if name not in state]
    faults += [f"{name} {tuple(state[name].shape)} is unexpected" for name in state if name not in wanted]
    for name in wanted.keys() & state.keys():
        found, expected = tuple(state[name].shape), tuple(wanted[name].shape)
        if found != expected:
            faults.append(f"{name} is {found}, the model needs {expected}{_advice(name)}")
        elif not bool(torch.isfinite(state[name]).all()):
            faults.append(f"{name} has values that are not finite")
    if faults:
        raise CheckpointError(f"weights do not fit the model: {_listed(sorted(faults))}")


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _advice(name: str) -> str:
    return " (other classes: ask for a new head)" if name in HEAD else ""


def _listed(faults: Iterable[str]) -> str:
    faults = list(faults)
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "; ".join(faults[:SHOWN] + more)
