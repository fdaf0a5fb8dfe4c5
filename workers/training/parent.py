"""The weights that fine-tuning starts from: another run's, for another resolution or other classes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from workers.config import InitConfig
from workers.data.index import DatasetIndex
from workers.errors import ConfigError, DataError
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.resample_report import describe_positions, resample_report
from workers.models.sizes import patch_grid
from workers.models.vit import VisionTransformer
from workers.models.weights import adapt_state_dict
from workers.probes import first_images
from workers.training.checkpoint import load_full
from workers.training.collectives import first_text
from workers.training.evaluate import normalize
from workers.training.manifest import open_manifest
from workers.training.restore import load_model

REPORTED_IMAGES = 32


def load_parent(init: InitConfig, model: nn.Module) -> None:
    """`model` gets the parent's weights: position embeddings resampled, and a new head if asked for."""
    if not isinstance(model, VisionTransformer):
        raise ConfigError("model.family: only a vit or a hybrid can start from another run's weights (init)")
    store, manifest = open_manifest(init.manifest, init.digest)
    state = adapt_state_dict(
        load_full(store, manifest),
        source_grid=patch_grid(manifest.model.image_size, manifest.model.patch_size),
        target=model,
        new_head=init.new_head,
        convention=init.resampling,
    )
    model.load_state_dict(state)


def describe_resize(
    init: InitConfig, model: nn.Module, config: ModelConfig, validation: DatasetIndex, device: torch.device
) -> dict[str, float]:
    """What the change of resolution did, before any training: see `resample_report`. Every rank calls it,
    and the first one gets the figures."""
    figures, problem = {}, ""
    if dist.get_rank() == 0:
        try:
            figures = _figures(init, model, config, validation)
        except DataError as error:
            problem = str(error)
    if problem := first_text(problem, device):
        raise DataError(problem)
    return figures


@dataclass(frozen=True)
class PositionDrift:
    """Of a trained model's position embeddings from its parent's, resampled to its grid."""

    norm: float
    """Of the mean norm, relative to the parent's."""
    neighbours: float
    """Of the mean cosine of patches side by side."""


def position_drift(url: str, digest: str) -> PositionDrift | None:
    """Of the model of a manifest; None if it has no parent or no position embeddings."""
    model, manifest = load_model(url, digest)
    config = manifest.run_config
    if config is None or config.init is None or not isinstance(model, VisionTransformer):
        return None
    if model.spec.positions == "rope":
        return None
    origin = build_model(**manifest.model.model_dump())
    load_parent(config.init, origin)
    assert isinstance(origin, VisionTransformer)
    before, after = describe_positions(origin), describe_positions(model)
    return PositionDrift(
        norm=after["position_norm"] / before["position_norm"] - 1,
        neighbours=after.get("neighbour_cosine", 0.0) - before.get("neighbour_cosine", 0.0),
    )


def _figures(
    init: InitConfig, model: nn.Module, config: ModelConfig, validation: DatasetIndex
) -> dict[str, float]:
    assert isinstance(model, VisionTransformer)
    parent, _ = load_model(init.manifest, init.digest)
    assert isinstance(parent, VisionTransformer)
    images, _ = first_images(validation, config, REPORTED_IMAGES)
    report = resample_report(parent, model, normalize(images))
    return {f"resize/{name}": value for name, value in report.items()}
