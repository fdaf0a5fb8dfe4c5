"""What a worker keeps in the host's memory, in closed form."""

from dataclasses import dataclass
from math import ceil

from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.data.lookahead import mean_bytes
from workers.data.mixture import make_order
from workers.data.samples import HELD_BYTES
from workers.models.memory import TrainingMemory, rank_images, training_memory

WORKER_BYTES = 411 << 20
"""Python 3.11, torch 2.13 for CPUs, Ray 2.60 and this package imported, in a gloo group: resident, measured
on x86-64 Linux. Torch with CUDA takes more."""
READER_BYTES = 263 << 20
"""Likewise, of a reader process."""
SNAPSHOTS = 2
"""Checkpoints on their way to the store; `workers/training/committer.py`."""
COPIED_BATCHES = 2
"""Of reader processes' batches; `workers/data/readers.py`."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one worker."""

    process: int
    """Interpreter and libraries, of worker and readers."""
    tensors: int
    """Of the training step, where the device is the CPU."""
    snapshots: int
    """Of weights, moments and average, until commits are in the store."""
    lookahead: int
    """Samples that are read ahead, at most."""
    batches: int
    """Decoded, ahead of the loop."""

    @property
    def total(self) -> int:
        return self.process + self.tensors + self.snapshots + self.lookahead + self.batches


def host_memory(config: RunConfig, workers: int, data: DatasetIndex | None) -> HostMemory:
    """Of `data` None: the budget for reading ahead, as configured."""
    compute, cuda = config.compute, config.compute.gpus_per_worker > 0
    memory = training_memory(config, workers)
    height, width = config.model.image_shape
    batch = rank_images(config, workers) * config.model.channels * height * width
    ahead = compute.prefetch_batches + (COPIED_BATCHES if compute.readers else 1)
    return HostMemory(
        process=WORKER_BYTES + compute.readers * READER_BYTES,
        tensors=0 if cuda else memory.peak,
        snapshots=min(SNAPSHOTS, _commits(config)) * _rows_bytes(memory),
        lookahead=_lookahead(config, workers, data),
        batches=ahead * batch,
    )


def _rows_bytes(memory: TrainingMemory) -> int:
    return memory.parameters + memory.optimizer + memory.average


def _commits(config: RunConfig) -> int:
    return 1 + config.num_steps * config.train.global_batch_size // config.train.checkpoint_every_images


def _lookahead(config: RunConfig, workers: int, data: DatasetIndex | None) -> int:
    """The budget, or a window of each lane; no more than this block and the next; all of a small data set."""
    if data is None:
        return config.compute.prefetch_bytes
    if data.num_bytes <= HELD_BYTES:
        return data.num_bytes * max(1, config.compute.readers)
    order = make_order(config.data, data, config.seed)
    lanes = ceil(order.lanes / workers)
    window = int(lanes * order.window_chunks * order.chunk_samples * mean_bytes(data))
    return min(max(config.compute.prefetch_bytes, window), 2 * window)
