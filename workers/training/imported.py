"""Weights from elsewhere as the complete checkpoint of a run that trained nothing."""

import hashlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import workers
from workers.code_digests import code_digests
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.storage import Store
from workers.training.commits import Commit, CommitLog
from workers.training.manifest import MANIFEST, Manifest, checkpoint_directory, object_name
from workers.training.probe_logits import record_logits


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
    whole = build_model(**model.model_dump())
    whole.load_state_dict(dict(state))
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
        versions={"vitscale": workers.__version__, "torch": str(torch.__version__), **code_digests()},
        complete=True,
        probe=record_logits(whole, model),
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
