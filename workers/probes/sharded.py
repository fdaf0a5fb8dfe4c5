"""Probes of a model that trains: whole and in float32 on rank 0, whatever it is to the others."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from workers.models.hybrid import HybridTransformer
from workers.models.hybrid_sizes import HybridSpec
from workers.models.sizes import ViTSpec
from workers.models.vit import VisionTransformer
from workers.probes.probe import probe
from workers.probes.result import Probes


def probe_sharded(model: nn.Module, images: Tensor | None) -> Probes | None:
    """Every rank calls it, between steps; rank 0 has the images and gets the probes, the others None.

    The model is a ViT or a hybrid, sharded by FSDP2 or not, its blocks compiled or checkpointed or not: none
    of that is run. Rank 0 makes a copy of its parameters on the device of the images (1.2 GB for an L) and
    probes that. No state of the training changes, random numbers included.
    """
    whole = gather_model(model, images.device if images is not None else None)
    if whole is None:
        return None
    assert images is not None
    return probe(whole, images)


@torch.no_grad()
def gather_model(model: nn.Module, device: torch.device | None) -> VisionTransformer | None:
    """A plain float32 copy in evaluation mode on rank 0's device; None on other ranks, which take part."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass the root may hold whole parameters in another precision
    spec = model.spec
    assert isinstance(spec, ViTSpec)
    first = not dist.is_initialized() or dist.get_rank() == 0
    copy: VisionTransformer | None = None
    if first:
        with torch.device("meta"):
            copy = HybridTransformer(spec) if isinstance(spec, HybridSpec) else VisionTransformer(spec)
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
