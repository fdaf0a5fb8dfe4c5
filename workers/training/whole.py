"""The whole of a model that trains, as a plain copy on rank 0, and what is told of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.hybrid import HybridTransformer
from workers.models.hybrid_sizes import HybridSpec
from workers.models.sizes import ViTSpec
from workers.models.vit import VisionTransformer
from workers.probes import Probes, probe
from workers.training.probe_logits import record_logits


@torch.no_grad()
def gather_whole(
    model: nn.Module, build: Callable[[], nn.Module], device: torch.device | None
) -> nn.Module | None:
    """A float32 copy, in evaluation mode, on rank 0's device; None on other ranks, which take part.

    `build` makes a module with the same parameters in the same order. The model is sharded by FSDP2 or not,
    its blocks compiled or checkpointed or not: none of that is run, and no state of the training changes,
    random numbers included.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass the root may hold whole parameters in another precision
    copy: nn.Module | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        with torch.device("meta"):
            copy = build()
        copy = copy.to_empty(device=device).eval()
    # By order, which wrappers keep, and not by name, which some of them change.
    targets = list(copy.parameters()) if copy is not None else []
    for number, parameter in enumerate(model.parameters()):
        # One whole parameter at a time on ranks other than 0.
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if copy is not None:
            assert targets[number].shape == value.shape
            targets[number].copy_(value)
    return copy


def saved_logits(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """For the manifest, on rank 0, computed on the CPU; every rank calls it."""
    whole = gather_whole(model, lambda: build_model(**config.model_dump()), torch.device("cpu"))
    return record_logits(whole, config) if whole is not None else {}


def probe_whole(model: nn.Module, images: Tensor | None) -> Probes | None:
    """Every rank calls it, between steps; rank 0 has the images and gets the probes, the others None.

    The model is a ViT or a hybrid. Rank 0's copy is on the device of the images (1.2 GB for an L).
    """
    spec = model.spec
    assert isinstance(spec, ViTSpec)
    kind = HybridTransformer if isinstance(spec, HybridSpec) else VisionTransformer
    whole = gather_whole(model, lambda: kind(spec), images.device if images is not None else None)
    if whole is None:
        return None
    assert images is not None and isinstance(whole, VisionTransformer)
    return probe(whole, images)
