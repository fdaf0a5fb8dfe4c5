"""What torch itself counts of a training step's memory, on each rank of a gloo group or on a GPU."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from workers.config import RunConfig, make_config
from workers.models import build_model
from workers.training.checkpoint import Training
from workers.training.ema import Average
from workers.training.feed import DeviceBatch
from workers.training.freeze import freeze
from workers.training.manifest import AVERAGE, STATE
from workers.training.optim import make_optimizers
from workers.training.parallel import parallelize
from workers.training.rows import local
from workers.training.step import train_step


@dataclass(frozen=True)
class Counted:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    peak: int
    """Of all tensors, at any moment of the second step."""


def count_step(values: dict[str, Any]) -> Counted:
    """Of the real model, sharding, optimizer and step, with images of noise."""
    config = make_config(values)
    cuda = config.compute.gpus_per_worker > 0
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = build_model(**config.model.model_dump())
    freeze(model, config.optim.freeze)
    model = parallelize(model, config.compute, config.train.precision, device)
    optimizers = make_optimizers(model, config.optim)
    average = Average(model, config.optim.ema_images) if config.optim.ema_images else None
    training = Training(model, optimizers, average.tensors if average else {})
    batch = _batch(config, device)

    def step(number: int) -> None:
        size = config.compute.microbatch_size
        assert size != "auto"
        totals = train_step(model, optimizers, batch, config, step=number, rate=1e-3, microbatch_size=size)
        if average:
            average.update(config.train.global_batch_size, config.train.global_batch_size, totals[3])

    step(0)
    by_kind = {
        prefix: sum(local(value.detach()).untyped_storage().nbytes() for value in tensors.values())
        for prefix, tensors in training.tensors().items()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(local(parameter.detach()).untyped_storage().nbytes() for parameter in trained)
    kinds = (by_kind[""], by_kind[STATE], by_kind.get(AVERAGE, 0))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step(1)
        return Counted(kinds[0], gradients, *kinds[1:], torch.cuda.max_memory_allocated())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(1)
    batches = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
    return Counted(kinds[0], gradients, *kinds[1:], sum(kinds) + batches + _highest(profiler))


def _batch(config: RunConfig, device: torch.device) -> DeviceBatch:
    rows = math.ceil(config.train.global_batch_size / dist.get_world_size())
    shape = (rows, config.model.channels, *config.model.image_shape)
    return DeviceBatch(
        images=torch.randint(256, shape, dtype=torch.uint8, device=device),
        labels=torch.zeros(rows, dtype=torch.int64, device=device),
        weights=torch.ones(rows, device=device),
        slots=torch.zeros(rows, dtype=torch.int64, device=device),
        ids=np.arange(rows, dtype=np.uint64),
    )


def _highest(profiler: profile) -> int:
    """Of the running sum of what torch's allocator gave and took back, in bytes."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in events)]).max())
