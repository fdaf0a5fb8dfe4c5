"""What an epoch asks of the store of its data set, without reading any of it."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from workers.config import RunConfig
from workers.data.index import SAMPLE, STORED, DatasetIndex
from workers.data.lookahead import Load, mean_bytes, train_loads
from workers.data.mixture import make_order
from workers.data.pages import KEPT_BYTES, PAGE_BYTES
from workers.data.samples import HELD_BYTES, runs

LOOKED_AT = 200_000
"""Samples of whose reads those of an epoch are told."""
ROWS_PER_PAGE = PAGE_BYTES // STORED.itemsize


@dataclass(frozen=True)
class Reads:
    """Of a data set, over all workers."""

    gets: int
    """Of ranges of shards, in each epoch."""
    num_bytes: int
    """That they bring: samples, and what lies between them."""
    row_gets: int
    """Of the index's rows, in the first epoch."""
    rows_again: bool
    """Also in those after it: a worker keeps rows of a million samples."""
    held_by: int = 0
    """Readers that hold a data set as small as this once it was read; 0: each epoch reads it anew."""

    def total(self, epochs: float) -> int:
        """GETs of so many epochs."""
        rows = epochs if self.rows_again else min(1.0, epochs)
        return round(self.gets * self.passes(epochs) + self.row_gets * rows)

    def passes(self, epochs: float) -> float:
        """How often all samples are read: readers have others in the next epoch, until they hold all."""
        if not self.held_by or epochs <= 1:
            return epochs
        return self.held_by * (1.0 - math.pow(1 - 1 / self.held_by, epochs))


def epoch_reads(config: RunConfig, data: DatasetIndex, workers: int) -> Reads:
    """By the real order and the real rule of what comes in one request, with samples of a shard taken as of
    one size. Of large data sets by the first blocks of some workers."""
    order, looked = make_order(config.data, data, config.seed), 0
    gets = num_bytes = row_gets = 0
    for rank in range(workers):
        slots = order.slots(rank, workers)
        pages: OrderedDict[tuple[int, int], None] = OrderedDict()
        for load in _epoch(train_loads(order, 0, slots, mean_bytes(data)), order.num_samples):
            numbers, rows = _about(data, load)
            found = runs(numbers, rows)
            gets += len(found)
            ends = rows["offset"] + rows["size"]
            num_bytes += sum(int(ends[run.stop - 1] - rows["offset"][run.start]) for run in found)
            row_gets += _missing(pages, data, load)
            looked += len(load.positions)
            if looked >= LOOKED_AT * (rank + 1) / workers:
                break
    scale = data.num_samples / max(1, looked)
    again = data.num_samples / workers * STORED.itemsize > KEPT_BYTES
    held_by = workers * max(1, config.compute.readers) if data.num_bytes <= HELD_BYTES else 0
    return Reads(round(gets * scale), round(num_bytes * scale), round(row_gets * scale), again, held_by)


def _epoch(loads: Iterator[Load], num_samples: int) -> Iterator[Load]:
    for load in loads:
        if load.start >= num_samples:
            return
        yield load


def _about(data: DatasetIndex, load: Load) -> tuple[np.ndarray, np.ndarray]:
    """Shards and rows of a load's samples."""
    numbers, places = data.locate(load.ordinals)
    counts = np.diff(data.shards.firsts)[numbers]
    sizes = data.shards.rows["size"][numbers] // np.maximum(1, counts)
    rows = np.zeros(len(numbers), SAMPLE)
    rows["offset"], rows["size"] = places * sizes, sizes
    return numbers, rows


def _missing(pages: "OrderedDict[tuple[int, int], None]", data: DatasetIndex, load: Load) -> int:
    """Requests for pages of rows that a process does not have."""
    numbers, places = data.locate(load.ordinals)
    wanted = dict.fromkeys(zip(numbers.tolist(), (places // ROWS_PER_PAGE).tolist(), strict=True))
    missing = [page for page in wanted if page not in pages]
    pages.update(dict.fromkeys(missing))
    while len(pages) > KEPT_BYTES // PAGE_BYTES:
        pages.popitem(last=False)
    return sum((shard, page - 1) not in missing for shard, page in missing)
