"""A file of weights that timm, transformers or JAX takes, from a model of ours."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

from workers.errors import CheckpointError, ConfigError
from workers.model_config import ModelConfig
from workers.models.formats import MODEL_KEY, Format, big_vision, huggingface, timm


def write_weights(path: Path, format: Format, config: ModelConfig, state: Mapping[str, Tensor]) -> str:
    """A new file, or for `hf` a new folder, and the Python that loads it.

    CheckpointError where the format has no such model; ConfigError if the path exists.
    """
    if path.exists():
        raise ConfigError(f"{path} exists; choose another path")
    # Before any of it is written.
    if format != "safetensors" and config.family != "vit":
        raise CheckpointError(f"a {config.family} is exported as safetensors only")
    metadata = {"format": "pt", MODEL_KEY: config.model_dump_json()}
    if format == "hf":
        tensors = huggingface.from_ours(state, config)
        path.mkdir(parents=True)
        safetensors.torch.save_file(_whole(tensors), path / "model.safetensors", {"format": "pt"})
        for name, values in (
            ("config.json", huggingface.config_json(config)),
            ("preprocessor_config.json", huggingface.preprocessor_json(config)),
        ):
            (path / name).write_text(json.dumps(values, indent=2) + "\n")
        return f"transformers.ViTForImageClassification.from_pretrained({str(path)!r})"
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "big_vision":
        arrays = {name: t.numpy() for name, t in big_vision.from_ours(state, config).items()}
        with path.open("xb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        return f"numpy.load({str(path)!r})"
    tensors = timm.from_ours(state, config) if format == "timm" else dict(state)
    safetensors.torch.save_file(_whole(tensors), path, metadata)
    load = f"safetensors.torch.load_file({str(path)!r})"
    return f"model = {timm.create_model(config)}\nmodel.load_state_dict({load})" if format == "timm" else load


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().clone() for name, value in state.items()}
