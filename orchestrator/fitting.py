"""Settings with which a run fits the memory that its workers have."""

from collections.abc import Iterator

from orchestrator.host_memory import HostMemory, host_memory
from workers.config import RunConfig, make_config
from workers.data.index import DatasetIndex
from workers.models.memory import TrainingMemory, rank_images, training_memory

MODES = ("none", "selective", "full")


def needed_bytes(memory: TrainingMemory, host: HostMemory) -> int:
    """Of the device that decides: a GPU, or the host where that trains."""
    return host.total if host.tensors else memory.peak


def suggestions(config: RunConfig, workers: int, data: DatasetIndex | None, limit: int) -> Iterator[str]:
    """The largest microbatch that fits in each mode of recomputation, the least recomputation first; then
    with the state of the run shared by all workers, if it is not."""
    for shard in dict.fromkeys((config.compute.shard_workers, None)):
        for mode in MODES:
            images = _largest_microbatch(config, workers, data, limit, mode, shard)
            if images is None:
                continue
            settings = {"activation_checkpointing": mode, "microbatch_size": images, "shard_workers": shard}
            changed = [
                f"--set compute.{name}={'null' if value is None else value}"
                for name, value in settings.items()
                if value != getattr(config.compute, name)
            ]
            yield " ".join(changed)


def _largest_microbatch(
    config: RunConfig, workers: int, data: DatasetIndex | None, limit: int, mode: str, shard: int | None
) -> int | None:
    share = rank_images(config, workers)
    sizes = sorted({-(-share // parts) for parts in (2**power for power in range(share.bit_length() + 1))})
    for images in reversed(sizes):
        changed = {"activation_checkpointing": mode, "microbatch_size": images, "shard_workers": shard}
        values = config.model_dump(mode="json")
        candidate = make_config({**values, "compute": values["compute"] | changed})
        need = needed_bytes(training_memory(candidate, workers), host_memory(candidate, workers, data))
        if need <= limit:
            return int(images)
    return None
