"""The global batches of one rank: read, verify, decode, augment, collate, some batches ahead.

Nothing is written to disk, no more is held than one window of samples per owned lane or a share of the
tail, and global batches depend on the order alone: not on world size, threads, or where a stream began.
"""

import concurrent.futures
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from workers.config import AugmentConfig
from workers.data.decode import Pixels
from workers.data.index import DatasetIndex
from workers.data.order import Order, Positions
from workers.data.samples import RawSample, SampleReader, StageTimes
from workers.data.transforms import DecodeTimes, eval_transform, sample_rng, train_transform
from workers.errors import ConfigError, DataError

READERS = 8
"""Requests under way at a time; they wait much and compute little."""

LOAD_SAMPLES = 256
"""Samples asked for at a time, or a chunk if that has more: small data sets need not do with small reads."""


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor
    """(n, C, H, W) uint8."""
    labels: torch.Tensor
    """(n,) int64."""
    weights: torch.Tensor
    """(n,) float32: 1, or 0 for padding, which repeats the first sample to give all ranks the same n."""
    ids: npt.NDArray[np.uint64]
    """(n,) ids of the index."""
    num_real: int
    """Samples that are not padding; they come first."""


class TrainStream:
    """Endless: the nth batch from `start_step` on is this rank's share of that global batch."""

    def __init__(
        self,
        index: DatasetIndex,
        order: Order,
        *,
        subset: Positions | None,
        global_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int,
        image_size: int,
        channels: Literal[1, 3],
        augment: AugmentConfig,
        prefetch_batches: int,
        decode_threads: int = 1,
    ) -> None:
        """`subset` is what `order` runs over, if not the whole index. Two `decode_threads` give 1.7 times
        the images of one for photographs, but 0.8 times for images of 32 x 32, which the interpreter limits.
        """
        if global_batch_size % order.lanes:
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} is not a multiple of data.lanes {order.lanes}"
            )
        self.times = StageTimes()
        reader = SampleReader(index, subset, self.times)
        if reader.num_samples != order.num_samples:
            raise DataError(
                f"the order is one of {order.num_samples} samples, the data has {reader.num_samples}"
            )
        slots = order.slots(rank, world_size)
        share = global_batch_size // order.lanes * -(-order.lanes // world_size)
        start = start_step * global_batch_size
        self._samples = _Lookahead(
            reader,
            _train_loads(order, start, rank, world_size),
            budget=len(slots) * order.window_chunks * order.chunk_samples,
        )
        self._assembler = _Assembler(image_size, channels, decode_threads, self.times)

        def batch(step: int) -> Batch:
            span = range(step * global_batch_size, (step + 1) * global_batch_size)
            positions = order.owned(span, rank, world_size).tolist()
            samples = self._samples.take(positions)

            def augmented(row: int, out: Pixels, times: DecodeTimes) -> None:
                rng = sample_rng(order.seed, positions[row] // order.num_samples, samples[row].id)
                train_transform(
                    samples[row].image,
                    size=image_size,
                    channels=channels,
                    augment=augment,
                    rng=rng,
                    out=out,
                    times=times,
                )

            return self._assembler.batch(samples, share, augmented)

        self._batches = _Background(map(batch, itertools.count(start_step)), prefetch_batches)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """DataError names the shard and the sample that is at fault."""
        started = time.perf_counter()
        batch = next(self._batches)
        self.times.add(wait=time.perf_counter() - started)
        return batch

    def close(self) -> None:
        """The threads end after the read or the batch that they are at; nobody waits for that."""
        self._batches.close()
        self._samples.close()
        self._assembler.close()


def validation_batches(
    index: DatasetIndex,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    image_size: int,
    channels: Literal[1, 3],
    prefetch: int,
    decode_threads: int = 1,
) -> Iterator[Batch]:
    """Every sample of the data set once over all ranks; each rank has as many batches of `batch_size`."""
    own = range(rank * index.num_samples // world_size, (rank + 1) * index.num_samples // world_size)
    most = -(-index.num_samples // world_size)
    samples = _Lookahead(
        SampleReader(index, None, StageTimes()),
        _validation_loads(own),
        budget=4 * LOAD_SAMPLES,
    )
    assembler = _Assembler(image_size, channels, decode_threads, StageTimes())

    def batch(number: int) -> Batch:
        taken = samples.take(own[number * batch_size : (number + 1) * batch_size])

        def whole(row: int, out: Pixels, times: DecodeTimes) -> None:
            eval_transform(taken[row].image, size=image_size, channels=channels, out=out, times=times)

        return assembler.batch(taken, batch_size, whole)

    batches = _Background(map(batch, range(-(-most // batch_size))), prefetch)
    try:
        yield from batches
    finally:
        batches.close()
        samples.close()
        assembler.close()


@dataclass(frozen=True)
class _Load:
    """Samples that are read together; `start` is the first position that draws from their block."""

    start: int
    positions: Positions
    ordinals: Positions
    """Ascending."""


def _train_loads(order: Order, position: int, rank: int, world_size: int) -> Iterator[_Load]:
    """All that the rank needs from `position` on, in the order of need."""
    for block in order.blocks(position):
        first = max(block.start, position)
        positions = order.owned(range(first, block.stop), rank, world_size)
        ordinals = order.samples(positions)
        ascending = np.argsort(ordinals)
        size = max(order.chunk_samples, LOAD_SAMPLES)
        for start in range(0, len(ascending), size):
            piece = ascending[start : start + size]
            yield _Load(first, positions[piece], ordinals[piece])


def _validation_loads(own: range) -> Iterator[_Load]:
    for start in range(own.start, own.stop, LOAD_SAMPLES):
        ordinals = np.arange(start, min(start + LOAD_SAMPLES, own.stop), dtype=np.int64)
        yield _Load(start, ordinals, ordinals)


class _Lookahead:
    """Samples by position, read ahead of need while no more than `budget` are held or under way."""

    def __init__(self, reader: SampleReader, loads: Iterator[_Load], budget: int) -> None:
        self._reader = reader
        self._loads = loads
        self._next = next(loads, None)
        self._budget = budget
        self._pool = concurrent.futures.ThreadPoolExecutor(READERS, "vitscale-read")
        self._held: dict[int, concurrent.futures.Future[dict[int, RawSample]]] = {}

    def take(self, positions: Sequence[int]) -> list[RawSample]:
        """The samples at ascending `positions`; they are no longer held then."""
        last = positions[-1] if positions else -1
        while self._next is not None and (self._next.start <= last or self._fits(self._next)):
            future = self._pool.submit(self._read, self._next)
            self._held.update(dict.fromkeys(self._next.positions.tolist(), future))
            self._next = next(self._loads, None)
        return [self._held.pop(position).result().pop(position) for position in positions]

    def close(self) -> None:
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fits(self, load: _Load) -> bool:
        return len(self._held) + len(load.positions) <= self._budget

    def _read(self, load: _Load) -> dict[int, RawSample]:
        return dict(zip(load.positions.tolist(), self._reader.read(load.ordinals), strict=True))


_Transform = Callable[[int, Pixels, DecodeTimes], None]
"""Writes the pixels of a row of the batch to an array (C, H, W)."""


class _Assembler:
    """Samples to batches."""

    def __init__(
        self, image_size: int, channels: Literal[1, 3], decode_threads: int, times: StageTimes
    ) -> None:
        self._shape = (channels, image_size, image_size)
        self._threads = decode_threads
        self._times = times
        self._pool = concurrent.futures.ThreadPoolExecutor(decode_threads, "vitscale-decode")

    def batch(self, samples: Sequence[RawSample], size: int, transform: _Transform) -> Batch:
        """Padded to `size` rows."""
        num_real = len(samples)
        images = np.zeros((size, *self._shape), np.uint8)
        labels, ids, weights = np.zeros(size, np.int64), np.zeros(size, np.uint64), np.zeros(size, np.float32)
        labels[:num_real] = [sample.label for sample in samples]
        ids[:num_real] = [sample.id for sample in samples]
        weights[:num_real] = 1

        def fill(first: int) -> None:
            self._fill(images, samples, range(first, num_real, self._threads), transform)

        if self._threads == 1:
            fill(0)
        else:
            deque(self._pool.map(fill, range(self._threads)), maxlen=0)
        if num_real:
            images[num_real:], labels[num_real:], ids[num_real:] = images[0], labels[0], ids[0]
        tensors = torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(weights)
        return Batch(*tensors, ids, num_real)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(
        self,
        images: npt.NDArray[np.uint8],
        samples: Sequence[RawSample],
        rows: range,
        transform: _Transform,
    ) -> None:
        times = DecodeTimes()
        for row in rows:
            try:
                transform(row, images[row], times)
            except DataError as error:
                raise DataError(f"{samples[row].shard}: sample {samples[row].key!r}: {error}") from error
        self._times.add(decode=times.decode, augment=times.augment)


class _Background:
    """The batches of an iterator, made in a thread, at most `depth` ahead."""

    def __init__(self, batches: Iterator[Batch], depth: int) -> None:
        self._batches = batches
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "vitscale-batch")
        self._ahead = deque(self._pool.submit(next, batches) for _ in range(depth))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead[0].result()  # a failed one stays first, and fails again
        self._ahead.popleft()
        self._ahead.append(self._pool.submit(next, self._batches))
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()
