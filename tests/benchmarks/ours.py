"""vitscale's own contenders, and what else a benchmark asks of its stream in a process of its own.

    python -m tests.benchmarks.ours run vitscale SOURCE SKIP IMAGES
    python -m tests.benchmarks.ours first-batch URL POSITION BATCH
    python -m tests.benchmarks.ours memory URL EPOCHS,EPOCHS,...

`open_stream` and `decode_batches` are the only places that know the interfaces of workers.data.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from tests.benchmarks import photos
from tests.benchmarks.contender import BATCH, SIZE, Measurement, Source, measure, report
from workers.config import AugmentConfig, DataConfig
from workers.data.index import DatasetIndex
from workers.data.mixture import Source as MixedSource
from workers.data.mixture import make_order
from workers.data.stream import TrainStream
from workers.data.transforms import sample_rng, train_transform

CONTENDERS = [
    *("vitscale-memory", "vitscale"),
    *("vitscale-2-threads", "vitscale-2-readers", "vitscale-2-ranks"),
]

SEED = 0


DEFAULTS = DataConfig(url="", validation_url="")
SMALL = DataConfig(url="", validation_url="", lanes=4, chunk_samples=16, window_chunks=2)
"""For small sets, of which the default windows would hold a whole epoch."""


def open_stream(
    index: DatasetIndex,
    blocks: DataConfig = DEFAULTS,
    *,
    batch: int = BATCH,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    decode_threads: int = 1,
    readers: int = 0,
    image_size: int = SIZE,
) -> TrainStream:
    """Batches of `batch` per rank, digests verified, RandomResizedCrop and flip."""
    order = make_order(blocks, index, SEED)
    return TrainStream(
        [MixedSource.of(index, order, batch * world_size, max_bad_fraction=0)],
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        image_size=image_size,
        channels=3,
        augment=AugmentConfig(),
        prefetch_batches=2,
        decode_threads=decode_threads,
        readers=readers,
    )


def decode_batches(files: list[bytes]) -> Iterator[torch.Tensor]:
    """The stream's way from bytes to batches, without the stream: endless."""
    augment = AugmentConfig()
    for epoch in itertools.count():
        for start in range(0, len(files) - BATCH + 1, BATCH):
            images = np.zeros((BATCH, 3, SIZE, SIZE), np.uint8)
            for row in range(BATCH):
                rng = sample_rng(SEED, epoch, start + row)
                train_transform(
                    files[start + row], size=SIZE, channels=3, augment=augment, rng=rng, out=images[row]
                )
            yield torch.from_numpy(images)


def run(contender: str, source: Source, skip: int, images: int) -> Measurement:
    torch.set_num_threads(1)
    if contender == "vitscale-memory":
        files = [jpeg for shard in source.shards for _, jpeg, _ in photos.read(Path(source.folder, shard))]
        return measure(decode_batches(files), BATCH, images)
    if contender == "vitscale-2-ranks":
        return _run_ranks(source.url, skip // 2, images // 2)
    options = {"vitscale-2-threads": {"decode_threads": 2}, "vitscale-2-readers": {"readers": 2}}
    stream = open_stream(DatasetIndex.open(source.url), **options.get(contender, {}))
    with contextlib.closing(stream):
        return measure((batch.images for batch in stream), skip, images)


def _run_ranks(url: str, skip: int, images: int) -> Measurement:
    """Two ranks in processes of their own, each with half of the images."""
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.SimpleQueue()
    ranks = [
        spawn.Process(target=_run_rank, args=(url, rank, skip, images, barrier, results)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    one, other = results.get(), results.get()
    return Measurement(
        images=one.images + other.images,
        seconds=max(one.seconds, other.seconds),
        cpu_seconds=one.cpu_seconds + other.cpu_seconds,
        loopback_bytes=max(one.loopback_bytes, other.loopback_bytes),
    )


def _run_rank(url: str, rank: int, skip: int, images: int, barrier, results) -> None:
    torch.set_num_threads(1)
    with contextlib.closing(open_stream(DatasetIndex.open(url), rank=rank, world_size=2)) as stream:
        results.put(measure((batch.images for batch in stream), skip, images, barrier.wait))


def first_batch(url: str, position: int, batch: int) -> None:
    """Seconds from opening the index to the first batch; what is imported and connected is so before."""
    torch.set_num_threads(1)
    DatasetIndex.open(url)
    started = time.perf_counter()
    index = DatasetIndex.open(url)
    stream = open_stream(index, blocks=SMALL, batch=batch, start_step=position // batch)
    with contextlib.closing(stream):
        next(stream)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


def consumed(index: DatasetIndex, blocks: DataConfig, position: int) -> list[tuple[str, int, int]]:
    """Shard, first byte and end of the samples before a position of the first epoch."""
    numbers, rows = index.records(0, index.num_samples)
    before = make_order(blocks, index, SEED).samples(np.arange(position, dtype=np.int64))
    return [
        (index.shards[numbers[at]].name, int(rows["offset"][at]), int(rows["offset"][at] + rows["size"][at]))
        for at in before
    ]


def window_bytes(index: DatasetIndex, blocks: DataConfig) -> float:
    """Mean bytes of one window of every lane."""
    _, rows = index.records(0, index.num_samples)
    return float(rows["size"].mean()) * blocks.lanes * (blocks.chunk_samples or 0) * blocks.window_chunks


def memory(url: str, epochs: list[int]) -> None:
    """Resident bytes after so many epochs, of images of 64 px."""
    torch.set_num_threads(1)
    index = DatasetIndex.open(url)
    resident, images = {}, 0
    with contextlib.closing(open_stream(index, blocks=SMALL, image_size=64)) as stream:
        for after in epochs:
            while images < after * index.num_samples:
                images += len(next(stream).ids)
            time.sleep(0.5)  # what is read ahead has come
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            resident[after] = psutil.Process().memory_info().rss
    print(json.dumps(resident))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", contender, source, skip, images]:
            report(run(contender, Source(**json.loads(source)), int(skip), int(images)))
        case ["first-batch", url, position, batch]:
            first_batch(url, int(position), int(batch))
        case ["memory", url, epochs]:
            memory(url, [int(after) for after in epochs.split(",")])
        case _:
            sys.exit(__doc__)
