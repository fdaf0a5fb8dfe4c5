"""Training, as one rank of a worker group: `train` reads from top to bottom.

Knows neither Ray nor a tracking server; `workers/ray_entry.py` calls it on a cluster.
"""

import gc
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from workers.config import RunConfig, make_config
from workers.data.index import DatasetIndex
from workers.data.mixture import Source
from workers.data.stream import TrainStream
from workers.models import build_model
from workers.storage import Store, open_store
from workers.training.badsteps import BadSteps
from workers.training.checkpoint import Training
from workers.training.collectives import worker_group
from workers.training.commits import Lease, Window
from workers.training.committer import Committer
from workers.training.drill import BATCHES, Drill
from workers.training.ema import Average
from workers.training.evaluate import Evaluation, evaluate
from workers.training.feed import Feed
from workers.training.freeze import freeze
from workers.training.gauges import Listener
from workers.training.inputs import cache_of, check_compute, make_sources, open_data
from workers.training.loss import initial_head_bias
from workers.training.meter import Meter
from workers.training.metrics import EventWriter
from workers.training.microbatch import choose_microbatch_size
from workers.training.optim import learning_rate, make_optimizers
from workers.training.parallel import DTYPES, parallelize, reshard
from workers.training.parent import describe_resize, load_parent
from workers.training.peak import peak_flops
from workers.training.peak_memory import hardware_label, peak_bytes, reset_peak
from workers.training.profile import Profile
from workers.training.progress import Progress
from workers.training.proofs import merge_ledgers, settle_epochs
from workers.training.pulse import Pulse
from workers.training.reports import evaluation_metrics, write_evaluation, write_probes
from workers.training.rollback import announce
from workers.training.shard_place import ShardPlace
from workers.training.state import TrainState, roll_back, share_lease
from workers.training.step import train_step
from workers.training.stragglers import Stragglers
from workers.training.watchdog import watched
from workers.training.whole import saved_logits

log = logging.getLogger(__name__)


def train_worker(payload: Mapping[str, Any], device: torch.device, listener: Listener | None = None) -> None:
    """Train the payload's runs, one after another, in this worker group; complete ones are skipped.

    `payload["runs"]` holds `{"config": RunConfig as JSON, "url": where the run's objects go}`. A request to
    stop ends them all. The listener hears what the first rank writes of them.
    """
    for entry in payload["runs"]:
        if not train(make_config(entry["config"]), entry["url"], device, listener):
            return


def train(config: RunConfig, run_url: str, device: torch.device, listener: Listener | None = None) -> bool:
    """Train one run to its end, or skip it if its commit log says that it is there.

    False if it was asked to stop before: it is committed, and goes on from there another time.
    """
    with worker_group(device):
        torch.set_num_threads(config.compute.cpus_per_worker)
        _set_determinism(config.compute.deterministic)
        torch.get_num_threads()  # now: what a thread of the stream sets for itself must not become this one's
        store = open_store(run_url)
        # Before the lease: a configuration that does not fit its data must not stop whoever trains the run.
        check_compute(config, device)
        data, validation = open_data(config)
        sources = make_sources(config, data, device)
        lease = share_lease(store, device)
        if lease is None:
            log.info("%s is complete", config.run)
            return True
        while True:
            with watched(config.compute, store.url, lease.epoch, device) as progress:
                complete, window = _train_under(
                    lease, config, store, sources, validation, device, progress, listener
                )
            if window is None:
                return complete
            gc.collect()  # the model that it leaves behind has no place beside the next
            before = window.first * config.train.global_batch_size
            lease = roll_back(store, lease, window, before, device)
            log.warning("%s goes back behind steps %s and skips them", config.run, window)
            sources = make_sources(config, data, device)


def _train_under(
    lease: Lease,
    config: RunConfig,
    store: Store,
    sources: list[Source],
    validation: DatasetIndex,
    device: torch.device,
    progress: Progress,
    listener: Listener | None,
) -> tuple[bool, Window | None]:
    """Whether the run is complete; steps before which it has to go back, since the loss rose there."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch_size = config.train.global_batch_size
    reset_peak(device)
    model = _initial_model(config)
    resize: dict[str, float] = {}
    if config.init is not None and lease.continues is None:
        load_parent(config.init, model)
        if config.init.new_head:
            _set_head_bias(config, model)
        resize = describe_resize(config.init, model, config.model, validation, device)
    freeze(model, config.optim.freeze)
    model = parallelize(model, config.compute, config.train.precision, device)
    share = sum(source.share(world_size) for source in sources)
    microbatch_size = choose_microbatch_size(model, config, share, device)
    optimizers = make_optimizers(model, config.optim)
    average = Average(model, config.optim.ema_images) if config.optim.ema_images else None
    training = Training(model, optimizers, average.tensors if average else {})
    state = TrainState(config, store, lease, sources, training, ShardPlace.of(config.compute), device)
    if config.fork is not None and lease.continues is None:
        state.fork(config.fork)
    else:
        state.resume()
    peak = peak_flops(device, DTYPES[config.train.precision], config.compute.peak_tflops)
    tell = partial(listener, config.run) if listener else None
    events = EventWriter(store, lease.epoch, tell) if rank == 0 else None
    committer = Committer(
        store, lease, state.place, events, parent=state.parent, parent_digest=state.parent_digest
    )
    if events:
        events.start()
        skipped = [list(window) for window in lease.skipped]
        facts = {"world_size": world_size, "peak_tflops": peak / 1e12, "skipped": skipped}
        hardware = hardware_label(device, config.compute.cpus_per_worker)
        events.write("start", state.images_seen, **facts, hardware=hardware)
        if resize:
            events.write("metrics", state.images_seen, values=resize)

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
        pin_memory=device.type == "cuda",
    )
    feed = Feed(device)
    bad_steps = BadSteps(config, sources, state.bad_steps)
    meter = Meter(device, flops_per_image=3 * config.model.computed_flops, peak_flops=peak * world_size)
    stragglers = Stragglers(model, device)
    profile = Profile(store, lease.epoch, config.compute.profile_steps if rank == 0 else 0)
    pulse = Pulse(store, lease.epoch)
    drill = Drill(config.compute.drill, lease.epoch)
    stopping, window = False, None
    results: dict[str, Evaluation] = {}
    try:
        while not state.complete and not stopping:
            committer.check()
            drill.before_step(state.step)
            rate = learning_rate(config.optim, state.images_seen, total_images)
            progress.step(state.step)
            with progress.phase("data"):
                read = next(stream)
                drill.record(read)
                batch = feed.to_device(read)
            if not lease.skips(state.step):
                totals = train_step(
                    model,
                    optimizers,
                    batch,
                    config,
                    step=state.step,
                    rate=rate,
                    microbatch_size=microbatch_size,
                )
                if not progress.compiled:
                    totals.tolist()  # none goes on to a later step and waits there for who still compiles
                    progress.compiled = True
                if average:
                    average.update(batch_size, state.images_seen + batch_size, totals[3])
                meter.add(state.step, totals, batch_size)
            proofs = settle_epochs(sources, state.step, device)
            state.step += 1
            profile.step(state.images_seen)
            if events:
                for proof in proofs:
                    events.write("epoch", state.images_seen, **asdict(proof))

            stopping = pulse.stops() and not state.complete
            evaluating = state.complete or (not stopping and _due(state, config.train.eval_every_images))
            committing = state.complete or stopping or _checkpoint_due(state)
            if evaluating or committing or _due(state, config.train.log_every_images):
                merge_ledgers([source.ledger for source in sources], device)
                report = meter.take(stream.times.take())
                slow = stragglers.find(report, batch_size)
                digests = drill.settle(device)
                if events and digests:
                    first = state.step - len(digests)
                    events.write(BATCHES, state.images_seen, first_step=first, digests=digests)
                if events:
                    values = {**report.values, "learning_rate": rate}
                    events.write("metrics", state.images_seen, values=values)
                    for one in slow:
                        events.write("straggler", state.images_seen, **asdict(one))
                bad_steps.settle(report.steps, events)
                if spike := state.history.find(report.steps, config.train):
                    announce(spike, config, sources, lease.skipped, events)
                    window = spike.window
                    break
            if evaluating:
                images = microbatch_size or share
                with progress.phase("evaluate"):
                    results[""] = _evaluate(config, model, validation, images, device, progress)
                    if average:
                        with average.swapped(model):
                            results["average_"] = _evaluate(
                                config, model, validation, images, device, progress
                            )
                    if events:
                        write_evaluation(events, state, results)
                meter.restart()
            if committing:
                with progress.phase("save"):
                    if not stopping:
                        write_probes(events, state, model, validation)
                    # Only the final commit was just evaluated: what a gate may ask for.
                    if state.complete:
                        logits = saved_logits(model, config.model)
                        if events:
                            peak_memory = peak_bytes(device, stream.reader_pids)
                            events.write("memory", state.images_seen, peak_bytes=peak_memory)
                        state.commit(committer, events, metrics=evaluation_metrics(results), probe=logits)
                    else:
                        state.commit(committer, events, metrics={}, probe={})
                meter.restart()
        pulse.close()
        with progress.phase("save"):
            committer.wait()
    finally:
        committer.close()
        if events:
            events.close()
        profile.close()
        stream.close()
    return state.complete and window is None, window


def _evaluate(
    config: RunConfig,
    model: nn.Module,
    validation: DatasetIndex,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Evaluation:
    """`batch_size` images per rank and forward."""
    result = evaluate(
        model,
        config.model,
        validation,
        batch_size=batch_size,
        max_bad_fraction=config.data.max_bad_fraction,
        decode_threads=_decode_threads(config),
        cache=cache_of(config),
        device=device,
        progress=progress.evaluated,
    )
    reshard(model)
    return result


def _set_determinism(deterministic: bool) -> None:
    """Operations that give the same bits each time, or an error that names one which cannot."""
    if deterministic:
        # cuBLAS asks for it; read when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def _decode_threads(config: RunConfig) -> int:
    """One per core that is left to each reader; below some 64 px the interpreter is the limit and more
    threads only slow it down."""
    threads = config.compute.cpus_per_worker // max(1, config.compute.readers)
    return max(1, threads) if min(config.model.image_shape) >= 64 else 1


def _initial_model(config: RunConfig) -> nn.Module:
    """Whole and equal on every rank, from the seed."""
    torch.manual_seed(config.seed)
    model = build_model(**config.model.model_dump())
    _set_head_bias(config, model)
    return model


def _set_head_bias(config: RunConfig, model: nn.Module) -> None:
    bias = initial_head_bias(config.optim, config.model.num_classes)
    nn.init.constant_(model.get_parameter("head.bias"), bias)


def _due(state: TrainState, every: int) -> bool:
    """Did the last batch cross a multiple of `every` images?"""
    return state.images_seen // every != (state.images_seen - state.config.train.global_batch_size) // every


def _checkpoint_due(state: TrainState) -> bool:
    """Not when the final one is less than a quarter of an interval away."""
    every = state.config.train.checkpoint_every_images
    left = state.config.num_steps * state.config.train.global_batch_size - state.images_seen
    return _due(state, every) and left >= every / 4
