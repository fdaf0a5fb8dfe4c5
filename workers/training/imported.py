"""Weights from elsewhere as the complete checkpoint of a run that trained nothing."""

import hashlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from workers.config import ModelConfig
from workers.storage import Store
from workers.training.checkpoint import MANIFEST, Manifest, checkpoint_directory, object_name
from workers.training.commits import Commit, CommitLog


def write_imported(
    store: Store, run: str, model: ModelConfig, state: Mapping[str, Tensor], source: Mapping[str, Any]
) -> Commit:
    """The commit of these weights in the run's store, made if it is not there.

    `source` says where they are from; it stands in the manifest's `config`, beside the model, in place of all
    that a run says of training.
    """
    log = CommitLog(store)
    head = log.head()
    if head is not None and head.complete:
        return head
    lease = log.take_lease()
    directory = checkpoint_directory(0, lease.epoch)
    name = object_name("model", 0, 1)
    data = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    store.create(f"{directory}/{name}", data)
    manifest = Manifest(
        run=run,
        images_seen=0,
        step=0,
        epoch=lease.epoch,
        parent=None,
        world_size=1,
        num_shards=1,
        objects={name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
        shapes={key: list(value.shape) for key, value in state.items()},
        scalars={},
        config={"name": run, "model": model.model_dump(mode="json"), "source": dict(source)},
        sources=[],
        tallies=[],
        bad_samples=[],
        metrics={},
        versions={},
        complete=True,
    ).to_bytes()
    key = f"{directory}/{MANIFEST}"
    store.create(key, manifest)
    return log.append(
        lease,
        parent=lease.continues,
        manifest=key,
        digest=hashlib.sha256(manifest).hexdigest(),
        images_seen=0,
        complete=True,
    )
