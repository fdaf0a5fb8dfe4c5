"""The data of a run, as its configuration names it: opened, checked, ordered."""

import torch
import torch.distributed as dist

from workers.config import DataConfig, RunConfig
from workers.data.index import DatasetIndex, open_pinned
from workers.data.mixture import Source, make_order, share_out
from workers.data.samples import Cache, check_cache
from workers.data.subset import Subset, build_subset
from workers.errors import ConfigError, DataError
from workers.training.collectives import first_text


def check_compute(config: RunConfig, device: torch.device) -> None:
    """ConfigError, on all ranks alike, if one of them cannot read as `compute` says.

    Called before the lease is taken: a mistake here must not stop whoever trains the run.
    """
    problem = ""
    fewest = config.data.lanes // dist.get_world_size()
    if dist.get_world_size() % (config.compute.shard_workers or 1):
        problem = (
            f"compute.shard_workers {config.compute.shard_workers} does not divide the "
            f"{dist.get_world_size()} workers that there are; ask for as many as do"
        )
    elif config.compute.readers > fewest:
        problem = (
            f"compute.readers {config.compute.readers}: a worker has {fewest} of data.lanes "
            f"{config.data.lanes}; ask for fewer readers, or raise data.lanes"
        )
    elif cache := cache_of(config):
        try:
            check_cache(cache)
        except ConfigError as error:
            problem = f"compute.cache_directory: {error}"
    if problem := first_text(problem, device):
        raise ConfigError(problem)


def cache_of(config: RunConfig) -> Cache | None:
    directory = config.compute.cache_directory
    return Cache(directory, config.compute.cache_bytes) if directory else None


def open_data(config: RunConfig) -> tuple[list[DatasetIndex], DatasetIndex]:
    """The indexes of the training sources, `data.url` first, and of the validation set."""
    data = config.data
    indexes = [open_pinned("data.fingerprint", data.url, data.fingerprint)]
    indexes += [
        open_pinned(f"data.mix.{number}.fingerprint", source.url, source.fingerprint)
        for number, source in enumerate(data.mix)
    ]
    validation = open_pinned("data.validation_fingerprint", data.validation_url, data.validation_fingerprint)
    for index in (*indexes, validation):
        index.check_layout(data.image_key, data.label)
        if not index.classes:
            raise ConfigError(
                f"{index.source} was indexed without labels; run `vitscale index {index.source}` with --label"
            )
    first = indexes[0]
    if config.model.num_classes != len(first.classes):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, the data has {len(first.classes)} classes"
        )
    for other in indexes[1:]:
        if other.classes != first.classes:
            raise ConfigError(
                f"data.mix: the classes of {other.url} are not those of {first.url}; index both with the "
                "same ones"
            )
    if validation.classes != first.classes[: len(validation.classes)]:
        raise ConfigError(
            f"data.validation_url: the classes of {validation.url} are not those of {first.url}; "
            "index both with the same ones"
        )
    return indexes, validation


def make_sources(config: RunConfig, indexes: list[DatasetIndex], device: torch.device) -> list[Source]:
    """What global batches are made of; all ranks call it, and the first builds a subset that is missing."""
    data = config.data
    weights = [data.weight, *(source.weight for source in data.mix)]
    counts = share_out(weights, config.train.global_batch_size, data.lanes)
    sources = []
    for index, count in zip(indexes, counts, strict=True):
        samples = index if data.subset is None else _subset(index, data, device)
        order = make_order(data, samples, config.seed)
        sources.append(Source.of(samples, order, count, max_bad_fraction=data.max_bad_fraction))
    return sources


def _subset(index: DatasetIndex, data: DataConfig, device: torch.device) -> Subset:
    assert data.subset is not None
    problem = ""
    if dist.get_rank() == 0:
        try:
            build_subset(index, data.subset, data.subset_seed, stratified=data.stratified)
        except (ConfigError, DataError) as error:
            problem = str(error)
    if problem := first_text(problem, device):
        raise (ConfigError if problem.startswith("data.subset") else DataError)(problem)
    return Subset.open(index, data.subset, data.subset_seed, stratified=data.stratified)
