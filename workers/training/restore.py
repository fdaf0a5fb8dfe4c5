"""A model back from a checkpoint, whole and on the CPU, and the proof that it can be had."""

import torch
from torch import nn

from workers.errors import CheckpointError
from workers.models import build_model
from workers.training.checkpoint import load_full
from workers.training.manifest import Manifest, check_shapes, open_manifest
from workers.training.probe_logits import check_logits, probe


def load_model(url: str, digest: str) -> tuple[nn.Module, Manifest]:
    """The model of a manifest, in evaluation mode; every byte is verified before use."""
    store, manifest = open_manifest(url, digest)
    model = build_model(**manifest.model.model_dump())
    check_shapes(manifest, {name: list(value.shape) for name, value in model.named_parameters()})
    model.load_state_dict(load_full(store, manifest))
    return model.eval(), manifest


@torch.no_grad()
def restore_test(url: str, digest: str) -> str:
    """What was tested; CheckpointError unless the model loads, all its weights are finite, and so is what it
    computes, which is what it computed when it was saved, where the manifest says that."""
    model, manifest = load_model(url, digest)
    broken = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(f"{url}: weights that are not finite: {', '.join(broken[:5])}")
    logits = probe(model, manifest.model)
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{url}: the restored model computes values that are not finite")
    if not manifest.probe:
        return "loads, and all is finite; no logits were recorded when it was saved"
    check_logits(logits, manifest.probe, url)
    return "loads, all is finite, and the logits are those recorded when it was saved"
