"""Samples by position, read ahead of need within a budget of bytes."""

import concurrent.futures
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from workers.data.order import Order, Positions
from workers.data.samples import RawSample, SampleReader, Samples

READERS = 8
"""Requests under way at a time; they wait much and compute little."""

LOAD_BYTES = 4 << 20
"""Of samples that are read together, if a chunk has less: small images need not come by small reads."""


@dataclass(frozen=True)
class Load:
    """Samples that are read together."""

    block: int
    """Blocks are counted from where the stream began; no position draws from two."""
    start: int
    """First position that draws from the block."""
    positions: Positions
    ordinals: Positions
    """Ascending."""


def train_loads(order: Order, position: int, slots: range, mean_bytes: float) -> Iterator[Load]:
    """All that the owner of these slots needs from `position` on, in the order of need."""
    size = max(order.chunk_samples, int(LOAD_BYTES / mean_bytes))
    number = 0
    for block in order.blocks(position):
        first = max(block.start, position)
        positions = order.owned(range(first, block.stop), slots)
        ordinals = order.samples(positions)
        ascending = np.argsort(ordinals)
        for start in range(0, len(ascending), size):
            piece = ascending[start : start + size]
            yield Load(number, first, positions[piece], ordinals[piece])
        number += len(positions) > 0


def validation_loads(own: range, mean_bytes: float) -> Iterator[Load]:
    size = max(1, int(LOAD_BYTES / mean_bytes))
    for start in range(own.start, own.stop, size):
        ordinals = np.arange(start, min(start + size, own.stop), dtype=np.int64)
        yield Load(0, start, ordinals, ordinals)


class Lookahead:
    """Reads loads in threads.

    Beyond what is needed now, a load begins if it fits into the budget and is not further ahead than the
    next block: small images would otherwise be read for many epochs to come.
    """

    def __init__(self, reader: SampleReader, data: Samples, loads: Iterator[Load], budget_bytes: int) -> None:
        self._reader = reader
        self._mean_bytes = mean_bytes(data)
        self._loads = loads
        self._next = next(loads, None)
        self._budget = budget_bytes
        self._pool = concurrent.futures.ThreadPoolExecutor(READERS, "vitscale-read")
        self._pending: dict[int, concurrent.futures.Future[dict[int, RawSample]]] = {}
        """By position, those of one load share a future."""
        self._block = 0
        """Where the samples that are taken come from."""
        self._starts: deque[int] = deque()
        """First positions of the blocks after that one that are being read."""
        self._bytes = 0.0
        """Of samples held, and by estimate of those under way."""
        self._lock = threading.Lock()

    def take(self, positions: Sequence[int]) -> list[RawSample]:
        """The samples at ascending `positions`; they are no longer held then."""
        last = positions[-1] if positions else -1
        while self._starts and self._starts[0] <= last:
            self._block += 1
            self._starts.popleft()
        while self._next is not None and (self._next.start <= last or self._may_begin(self._next)):
            if self._next.block == self._block + 1 + len(self._starts):
                self._starts.append(self._next.start)
            self._count(self._estimate(self._next))
            future = self._pool.submit(self._read, self._next)
            self._pending.update(dict.fromkeys(self._next.positions.tolist(), future))
            self._next = next(self._loads, None)
        samples = [self._pending.pop(position).result().pop(position) for position in positions]
        self._count(-sum(len(sample.image) for sample in samples))
        return samples

    def close(self) -> None:
        self._reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _estimate(self, load: Load) -> float:
        return len(load.positions) * self._mean_bytes

    def _may_begin(self, load: Load) -> bool:
        fits = self._bytes + self._estimate(load) <= self._budget
        return fits and load.block <= self._block + 1

    def _count(self, more: float) -> None:
        with self._lock:
            self._bytes += more

    def _read(self, load: Load) -> dict[int, RawSample]:
        samples = self._reader.read(load.ordinals)
        self._count(sum(len(sample.image) for sample in samples) - self._estimate(load))
        return dict(zip(load.positions.tolist(), samples, strict=True))


def mean_bytes(data: Samples) -> float:
    return max(1.0, data.num_bytes / data.num_samples)
