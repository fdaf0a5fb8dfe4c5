"""What a worker keeps in the host's memory, in closed form."""

from dataclasses import dataclass
from math import ceil

from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.data.lookahead import mean_bytes
from workers.data.mixture import make_order
from workers.data.samples import HELD_BYTES
from workers.models.memory import rank_images, training_memory, uses_fsdp

WORKER_BYTES = 518 << 20
"""Python 3.11, torch 2.13 for CPUs and Ray 2.60, in a worker that has trained the smallest ViT: resident,
measured on x86-64 Linux. 411 MiB are there after the imports; the rest comes with Ray's connections and the
first steps, which import torch's compiler and touch their kernels. Torch with CUDA takes more."""
READER_BYTES = 263 << 20
"""Likewise, of a reader process."""
KEPT, KEPT_BY_FSDP = 0.1, 0.35
"""Of the step's tensors: what glibc keeps of those that are freed. Seen: 10 to 17 % for ViT-Ti on one worker;
with FSDP, whose buffers have 1 to 30 MB, 28 to 46 % for ViT-S, 55 % for ViT-B, which
MALLOC_MMAP_THRESHOLD_=1048576 took away. Chosen so that the plans of six runs fit, see `make bench-plan`."""
COPIED_BATCHES = 2
"""Of reader processes' batches; `workers/data/readers.py`."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one worker."""

    process: int
    """Interpreter and libraries, of worker and readers."""
    tensors: int
    """Of the training step, where the device is the CPU."""
    allocator: int
    """What the C library keeps of these."""
    snapshots: int
    """Of weights, moments and average: one checkpoint. One before it that the store has not taken yet lies in
    the spool, on the disk, but for its average (`workers/training/committer.py`)."""
    lookahead: int
    """Samples that are read ahead, at most."""
    batches: int
    """Decoded, ahead of the loop."""

    @property
    def total(self) -> int:
        return self.process + self.tensors + self.allocator + self.snapshots + self.lookahead + self.batches


def host_memory(config: RunConfig, workers: int, data: DatasetIndex | None) -> HostMemory:
    """Of `data` None: the budget for reading ahead, as configured."""
    compute, cuda = config.compute, config.compute.gpus_per_worker > 0
    memory = training_memory(config, workers)
    height, width = config.model.image_shape
    batch = rank_images(config, workers) * config.model.channels * height * width
    ahead = compute.prefetch_batches + (COPIED_BATCHES if compute.readers else 1)
    kept = KEPT_BY_FSDP if uses_fsdp(config, workers, cuda=cuda) else KEPT
    return HostMemory(
        process=WORKER_BYTES + compute.readers * READER_BYTES,
        tensors=0 if cuda else memory.peak,
        allocator=0 if cuda else int(kept * memory.peak),
        snapshots=memory.parameters + memory.optimizer + memory.average,
        lookahead=_lookahead(config, workers, data),
        batches=ahead * batch,
    )


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
