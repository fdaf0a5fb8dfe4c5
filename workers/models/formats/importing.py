"""A model of ours from a file of weights, whoever made it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.config_text import override
from workers.errors import CheckpointError, ConfigError
from workers.model_config import ModelConfig, make_model_config
from workers.models import build_model
from workers.models.formats import MODEL_KEY, Format, big_vision, huggingface, timm
from workers.models.formats.infer import HEADLESS_CLASSES, Known, infer_model
from workers.models.formats.reading import WeightsFile, read_weights
from workers.models.weights import HEAD, check_state

NORMALIZATIONS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Means and standard deviations for pixels in 0..1; ours are fed -1..1, which is `half`."""


@dataclass(frozen=True)
class ImportedWeights:
    format: Format
    config: ModelConfig
    state: dict[str, Tensor]
    """Our names, float32, checked against the model."""
    has_head: bool


def import_weights(
    path: Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    format: Format | None = None,
    normalization: str = "half",
    overrides: Iterable[str] = (),
) -> ImportedWeights:
    """The model in a file of weights: format and model are told from the tensors, and from config.json beside
    a file of Hugging Face's.

    `image_size` is what it was trained with, needed unless that was square; `overrides` are fields of the
    ModelConfig that no tensor tells, as `activation=gelu`; weights for images normalised as `imagenet` are
    rewritten for ours, exactly. CheckpointError names what cannot be used, tensors with their shapes.
    """
    file = read_weights(path)
    found = format or _recognise(path, file)
    if found != "safetensors" and found != _recognise(path, file):
        raise CheckpointError(f"{path}: its tensors are not named as {found} names them, but {_names(file)}")
    try:
        state, fields = _convert(file, found, path, image_size)
        config = make_model_config(override(fields, overrides))
        has_head = HEAD[0] in state
        if not has_head and config.num_classes == HEADLESS_CLASSES:
            state |= {HEAD[0]: torch.zeros(1, config.spec.size.width), HEAD[1]: torch.zeros(1)}
        with torch.device("meta"):
            wanted = build_model(**config.model_dump()).state_dict()
        if config.positions == "sincos2d" and "pos_embed" not in state:
            state["pos_embed"] = build_model(**config.model_dump()).state_dict()["pos_embed"]
        check_state(state, wanted)
    except CheckpointError as error:
        raise CheckpointError(f"{path} ({found}; names as in timm): {error}") from None
    return ImportedWeights(found, config, _renormalized(state, normalization), has_head)


def _recognise(path: Path, file: WeightsFile) -> Format:
    names = set(file.tensors)
    if MODEL_KEY in file.metadata:
        return "safetensors"
    recognised: dict[Format, bool] = {
        "timm": timm.recognises(names),
        "hf": huggingface.recognises(names),
        "big_vision": big_vision.recognises(names),
    }
    found = [name for name, yes in recognised.items() if yes]
    if len(found) != 1:
        raise CheckpointError(f"{path}: not a ViT of timm, Hugging Face or big_vision; it has {_names(file)}")
    return found[0]


def _convert(
    file: WeightsFile, format: Format, path: Path, image_size: int | tuple[int, int] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under our names, and the fields of their ModelConfig."""
    if format == "safetensors":
        try:
            fields = json.loads(file.metadata[MODEL_KEY])
        except (KeyError, ValueError):
            raise CheckpointError(f"its metadata has no {MODEL_KEY}, so it is none of ours") from None
        if not isinstance(fields, dict) or fields.get("family") != "vit":
            raise CheckpointError("only a vit can be imported")
        if image_size is not None and _pair(fields.get("image_size")) != _pair(image_size):
            raise CheckpointError(f"was trained at {fields.get('image_size')} px, not {image_size}")
        return dict(file.tensors), fields
    if format == "hf":
        state, known = huggingface.to_ours(file.tensors), huggingface.known(path)
    elif format == "big_vision":
        state, known = big_vision.to_ours(file.tensors), big_vision.known(file.tensors)
    else:
        state, known = dict(file.tensors), Known()
        if "pos_embed" not in state:
            raise CheckpointError("has no pos_embed; rotary positions of others are not ours")
    if image_size is not None:
        known = replace(known, image_size=image_size)
    return state, infer_model(state, known)


def _renormalized(state: dict[str, Tensor], normalization: str) -> dict[str, Tensor]:
    """With x in -1..1, (x / 2 + 1/2 - mean) / std is linear, so the patch embedding takes it in."""
    if normalization not in NORMALIZATIONS:
        raise ConfigError(f"normalization {normalization!r}: choose one of {', '.join(NORMALIZATIONS)}")
    weight, bias = (state[f"patch_embed.proj.{kind}"].double() for kind in ("weight", "bias"))
    if normalization == "half":
        return state
    if weight.shape[1] != 3:
        raise ConfigError(
            f"normalization {normalization}: for 3 channels, the weights have {weight.shape[1]}"
        )
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in NORMALIZATIONS[normalization])
    bias = bias + (weight.sum(dim=(2, 3)) * (0.5 - mean) / std).sum(dim=1)
    weight = weight * (0.5 / std)[:, None, None]
    return state | {"patch_embed.proj.weight": weight.float(), "patch_embed.proj.bias": bias.float()}


def _pair(size: object) -> list[object]:
    return list(size) if isinstance(size, list | tuple) else [size, size]


def _names(file: WeightsFile) -> str:
    names = sorted(file.tensors)
    return ", ".join(f"{name} {tuple(file.tensors[name].shape)}" for name in names[:3]) + ", ..."
