"""What a checkpoint computes of two fixed images: recorded when it is saved, compared when it is restored."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from workers.errors import CheckpointError
from workers.model_config import ModelConfig

SHOWN = 32
"""Classes whose logits are recorded; of all others the norm tells."""
TOLERANCE = 1e-3
"""Of the largest logit, or of 1: other processors and versions of torch add in another order."""


@torch.no_grad()
def record_logits(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """Of a whole float32 model on the CPU."""
    logits = probe(model, config)
    if not torch.isfinite(logits).all():
        return {}  # no restore test lets it pass
    return {"logits": logits[:, :SHOWN].tolist(), "norms": logits.norm(dim=1).tolist()}


@torch.no_grad()
def probe(model: nn.Module, config: ModelConfig) -> Tensor:
    """Logits, float32 (2, K), of two images of noise in [-1, 1], the same ones everywhere."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((2, config.channels, *config.image_shape), generator=generator) * 2 - 1
    training = model.training
    logits: Tensor = model.eval()(images).float()
    model.train(training)
    return logits


def check_logits(logits: Tensor, recorded: dict[str, Any], where: str) -> None:
    """CheckpointError unless they are those that were recorded."""
    try:
        expected = torch.tensor(recorded["logits"], dtype=torch.float32)
        norms = torch.tensor(recorded["norms"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: what it records of its logits cannot be read: {error}") from error
    shown = logits[:, :SHOWN]
    if expected.shape != shown.shape or norms.shape != (len(logits),):
        raise CheckpointError(f"{where}: its recorded logits are of shape {tuple(expected.shape)}")
    scale = TOLERANCE * max(1.0, expected.abs().max().item())
    off = (shown - expected).abs().max().item()
    spread = (logits.norm(dim=1) - norms).abs().max().item()
    if not (off <= scale and spread <= scale * math.sqrt(logits.shape[1])):
        raise CheckpointError(
            f"{where}: the restored model computes other logits than the saved one did (by {off:.2g}); "
            "use the version of vitscale that wrote it"
        )
