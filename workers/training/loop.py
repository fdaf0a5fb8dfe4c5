"""Training, as one rank of a worker group: `train` reads from top to bottom.

Knows neither Ray nor a tracking server; `workers/ray_entry.py` calls it on a cluster.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from workers.config import InitConfig, RunConfig, make_config
from workers.data.batches import Batch
from workers.data.index import DatasetIndex
from workers.data.mixing import mix
from workers.data.mixture import Source
from workers.data.quarantine import to_json
from workers.data.samples import StageTimes
from workers.data.stream import TrainStream
from workers.errors import ConfigError
from workers.models import build_model
from workers.models.sizes import patch_grid
from workers.models.vit import VisionTransformer
from workers.models.weights import adapt_state_dict
from workers.storage import Store, open_store
from workers.training.checkpoint import load_full, open_manifest
from workers.training.commits import Lease
from workers.training.evaluate import Evaluation, evaluate, normalize
from workers.training.inputs import cache_of, check_compute, make_sources, open_data
from workers.training.metrics import EventWriter
from workers.training.optim import learning_rate, make_optimizer
from workers.training.parallel import shard, worker_group
from workers.training.proofs import merge_ledgers, settle_epochs
from workers.training.state import TrainState, share_lease

log = logging.getLogger(__name__)

CONFUSION_CLASSES = 200
"""Up to so many classes the confusion matrix is recorded; beyond, nobody reads it."""


def train_worker(payload: Mapping[str, Any], device: torch.device) -> None:
    """Train the payload's runs, one after another, in this worker group; complete ones are skipped.

    `payload["runs"]` holds `{"config": RunConfig as JSON, "url": where the run's objects go}`.
    """
    for entry in payload["runs"]:
        train(make_config(entry["config"]), entry["url"], device)


def train(config: RunConfig, run_url: str, device: torch.device) -> None:
    """Train one run to its end, or skip it if its commit log says that it is there."""
    with worker_group(device):
        torch.set_num_threads(config.compute.cpus_per_worker)
        torch.get_num_threads()  # now: what a thread of the stream sets for itself must not become this one's
        store = open_store(run_url)
        # Before the lease: a configuration that does not fit its data must not stop whoever trains the run.
        check_compute(config, device)
        data, validation = open_data(config)
        sources = make_sources(config, data, device)
        lease = share_lease(store, device)
        if lease is None:
            log.info("%s is complete", config.run)
        else:
            _train_under(lease, config, store, sources, validation, device)


def _train_under(
    lease: Lease,
    config: RunConfig,
    store: Store,
    sources: list[Source],
    validation: DatasetIndex,
    device: torch.device,
) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = _initial_model(config)
    if config.init is not None and lease.continues is None:
        _load_parent(config.init, model)
    model = shard(model, device)
    optimizer = make_optimizer(model, config.optim)
    state = TrainState(config, store, lease, sources, model, optimizer, device)
    state.resume()
    events = EventWriter(store, lease.epoch) if rank == 0 else None
    if events:
        events.write("start", state.images_seen, world_size=world_size)

    batch_size = config.train.global_batch_size
    total_images = config.num_steps * batch_size
    stream = TrainStream(
        sources,
        rank=rank,
        world_size=world_size,
        start_step=state.step,
        image_size=config.model.image_size,
        channels=config.model.channels,
        augment=config.data.augment,
        prefetch_batches=config.compute.prefetch_batches,
        prefetch_bytes=config.compute.prefetch_bytes,
        cache=cache_of(config),
        readers=config.compute.readers,
        decode_threads=_decode_threads(config),
    )
    meter = Meter(device)
    result: Evaluation | None = None
    try:
        while not state.complete:
            rate = learning_rate(config.optim, state.images_seen, total_images)
            totals = _train_step(state, next(stream), rate)
            proofs = settle_epochs(sources, state.step, device)
            state.step += 1
            meter.add(totals, batch_size)
            if events:
                for proof in proofs:
                    events.write("epoch", state.images_seen, **asdict(proof))

            evaluating = state.complete or _due(state, config.train.eval_every_images)
            committing = state.complete or _checkpoint_due(state)
            if evaluating or committing or _due(state, config.train.log_every_images):
                merge_ledgers([source.ledger for source in sources], device)
                values = meter.take(stream.times.take())
                _check_finite(values, state)
                if events:
                    events.write("metrics", state.images_seen, values={**values, "learning_rate": rate})
            if evaluating:
                images_per_rank = _microbatch_size(config) or -(-batch_size // world_size)
                result = evaluate(
                    model,
                    config.model,
                    validation,
                    batch_size=images_per_rank,
                    max_bad_fraction=config.data.max_bad_fraction,
                    decode_threads=_decode_threads(config),
                    cache=cache_of(config),
                    device=device,
                )
                if events:
                    _write_evaluation(events, state, result)
                meter.restart()
            if committing:
                state.commit(_final_metrics(state, result), events)
                meter.restart()
    finally:
        stream.close()


def _decode_threads(config: RunConfig) -> int:
    """One per core that is left to each reader; below some 64 px the interpreter is the limit and more
    threads only slow it down."""
    threads = config.compute.cpus_per_worker // max(1, config.compute.readers)
    return max(1, threads) if min(config.model.image_shape) >= 64 else 1


def _initial_model(config: RunConfig) -> nn.Module:
    """Whole and equal on every rank, from the seed."""
    torch.manual_seed(config.seed)
    return build_model(**config.model.model_dump())


def _load_parent(init: InitConfig, model: nn.Module) -> None:
    """The weights that fine-tuning starts from, for this model's resolution and classes."""
    if not isinstance(model, VisionTransformer):
        raise ConfigError("model.family: only a vit can start from another run's weights (init)")
    store, manifest = open_manifest(init.manifest, init.digest)
    source = make_config(manifest.config).model
    state = adapt_state_dict(
        load_full(store, manifest),
        source_grid=patch_grid(source.image_size, source.patch_size),
        target=model,
        new_head=init.new_head,
    )
    model.load_state_dict(state)


def _train_step(state: TrainState, batch: Batch, rate: float) -> Tensor:
    """One update. This rank's share of (loss, accuracy, gradient norm), float32 (3,), stays on the device."""
    config, device = state.config, state.device
    global_batch_size = config.train.global_batch_size
    totals = torch.zeros(3, device=device)
    images, targets = batch.images.to(device), batch.labels.to(device)
    labels, weights = targets, batch.weights.to(device)
    if config.data.augment.mixes:
        images, targets = mix(
            images,
            labels,
            batch.slots.to(device),
            augment=config.data.augment,
            seed=config.seed,
            step=state.step,
            num_classes=config.model.num_classes,
        )
    for rows in _microbatches(len(labels), _microbatch_size(config)):
        logits = state.model(normalize(images[rows]))
        losses = F.cross_entropy(
            logits, targets[rows], reduction="none", label_smoothing=config.optim.label_smoothing
        )
        loss = (losses * weights[rows]).sum() / global_batch_size
        # FSDP averages gradients over ranks; the gradient of the global batch is their sum.
        torch.autograd.backward(loss * dist.get_world_size())
        totals[0] += loss.detach()
        totals[1] += ((logits.argmax(dim=1) == labels[rows]) * weights[rows]).sum() / global_batch_size
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_norm)
    totals[2] = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / dist.get_world_size()
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    return totals


def _microbatch_size(config: RunConfig) -> int | None:
    size = config.compute.microbatch_size
    return size if isinstance(size, int) else None


def _microbatches(num_rows: int, size: int | None) -> Iterator[slice]:
    size = size or num_rows
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _check_finite(values: Mapping[str, float], state: TrainState) -> None:
    """Before anything is committed: on all ranks alike, since the values are those of all."""
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        raise ConfigError(
            f"optim.learning_rate: {state.config.run} diverged before image {state.images_seen} (loss "
            f"{values['loss']}, gradient norm {values['gradient_norm']}); choose less than "
            f"{state.config.optim.learning_rate}, or a longer optim.warmup_images"
        )


def _write_evaluation(events: EventWriter, state: TrainState, result: Evaluation) -> None:
    values = {"val_loss": result.loss, "val_accuracy": result.accuracy}
    events.write("metrics", state.images_seen, values=values)
    if result.bad_samples:
        events.write("bad_samples", state.images_seen, of="validation", samples=to_json(result.bad_samples))
    if state.complete and len(result.confusion) <= CONFUSION_CLASSES:
        events.write("confusion", state.images_seen, counts=result.confusion)


def _final_metrics(state: TrainState, result: Evaluation | None) -> dict[str, float]:
    """What a gate may ask for; only the final commit, which was just evaluated, has it."""
    if not state.complete or result is None:
        return {}
    return {"val_loss": result.loss, "val_accuracy": result.accuracy, "val_images": result.num_images}


def _due(state: TrainState, every: int) -> bool:
    """Did the last batch cross a multiple of `every` images?"""
    return state.images_seen // every != (state.images_seen - state.config.train.global_batch_size) // every


def _checkpoint_due(state: TrainState) -> bool:
    """Not when the final one is less than a quarter of an interval away."""
    every = state.config.train.checkpoint_every_images
    left = state.config.num_steps * state.config.train.global_batch_size - state.images_seen
    return _due(state, every) and left >= every / 4


class Meter:
    """Sums over steps since the last report; reading them is the loop's only wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._totals = torch.zeros(3, device=self._device)
        self._steps = self._images = 0
        self._start = time.perf_counter()

    def add(self, totals: Tensor, images: int) -> None:
        self._totals += totals
        self._steps += 1
        self._images += images

    def take(self, data: StageTimes) -> dict[str, float]:
        """Means over those steps and all ranks; `data` is what this rank's stream spent meanwhile.

        `data_wait` is a share of the time; the stages are in ms per image of this rank, of all its threads.
        """
        dist.all_reduce(self._totals)
        loss, accuracy, norm = (self._totals / max(1, self._steps)).tolist()
        seconds = time.perf_counter() - self._start
        values = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": norm,
            "images_per_second": self._images / seconds,
            "data_wait": min(1.0, data.wait / seconds),
        }
        ms_per_image = 1000 * dist.get_world_size() / max(1, self._images)
        for stage in ("fetch", "verify", "decode", "augment"):
            values[f"data_{stage}_ms"] = getattr(data, stage) * ms_per_image
        self.restart()
        return values
