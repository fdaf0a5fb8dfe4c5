"""Samples to batches: decode, augment, put substitutes in the place of bad samples, collate."""

import concurrent.futures
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from workers.data.quarantine import TRIES, BadSample, substitutes
from workers.data.samples import RawSample, SampleReader, Samples, StageTimes
from workers.data.transforms import DecodeTimes
from workers.errors import DataError

Pixels = npt.NDArray[np.uint8]
Transform = Callable[[bytes, "Row", Pixels, DecodeTimes], None]
"""Writes the pixels of an image file, as they are for a row, to an array (C, H, W); DataError if it cannot
be decoded."""


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor
    """(n, C, H, W) uint8."""
    labels: torch.Tensor
    """(n,) int64."""
    weights: torch.Tensor
    """(n,) float32: 1, or 0 for what does not count: padding, which repeats the first sample to give all
    ranks the same n, and bad samples of a validation set."""
    slots: torch.Tensor
    """(n,) int64: source and lane of each row, -1 for padding; which rows share a slot does not depend on the
    world size."""
    ids: npt.NDArray[np.uint64]
    """(n,) ids of the index; of the samples that are due, whatever stands in for them."""
    num_real: int
    """Samples that are not padding; they come first."""
    bad: tuple[tuple[int, BadSample], ...] = ()
    """Samples of this batch that cannot be used, each with the number of its source."""


class Row(NamedTuple):
    """What is due in one row of a batch."""

    raw: RawSample
    epoch: int
    slot: int
    decoder: "Decoder"


class Arrays:
    """The memory of a batch of `size` rows: its own, or a part of a buffer that processes share."""

    def __init__(
        self,
        size: int,
        shape: tuple[int, int, int],
        buffer: memoryview | None = None,
        *,
        pin_memory: bool = False,
    ) -> None:
        """`shape` of an image. Pinned memory of its own, for copies to a GPU that nobody waits for."""
        memory = buffer or _memory(self.num_bytes(size, shape), pin_memory)
        start = size * math.prod(shape)
        self.images = np.frombuffer(memory[:start], np.uint8).reshape(size, *shape)
        wide = [memory[start + 8 * size * nth :][: 8 * size] for nth in range(4)]
        self.labels, self.slots = (np.frombuffer(part, np.int64) for part in wide[:2])
        self.ids, self.weights = np.frombuffer(wide[2], np.uint64), np.frombuffer(wide[3], np.float64)

    @staticmethod
    def num_bytes(size: int, shape: tuple[int, int, int]) -> int:
        return size * (math.prod(shape) + 4 * 8)

    def batch(self, num_real: int, bad: Sequence[tuple[int, BadSample]]) -> Batch:
        """Padded after so many rows. Shares this memory."""
        for array in (self.images, self.labels, self.ids):
            array[num_real:] = array[0] if num_real else 0
        self.weights[num_real:], self.slots[num_real:] = 0, -1
        return Batch(
            images=torch.from_numpy(self.images),
            labels=torch.from_numpy(self.labels),
            weights=torch.from_numpy(self.weights).float(),
            slots=torch.from_numpy(self.slots),
            ids=self.ids,
            num_real=num_real,
            bad=tuple(bad),
        )


def _memory(num_bytes: int, pin_memory: bool) -> memoryview:
    if pin_memory:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().data
    return np.empty(num_bytes, np.uint8).data


class Assembler:
    """Rows to the arrays of a batch, in so many threads."""

    def __init__(self, threads: int, times: StageTimes) -> None:
        self._threads = threads
        self._times = times
        self._pool = single_threaded(threads, "vitscale-decode")

    def fill(self, arrays: Arrays, rows: Sequence[Row], places: Sequence[int]) -> list[tuple[int, BadSample]]:
        """Each row at its place; those that cannot be used, with their sources."""

        def fill(first: int) -> list[tuple[int, BadSample]]:
            times, found = DecodeTimes(), []
            for at in range(first, len(rows), self._threads):
                row, place = rows[at], places[at]
                label, bad = row.decoder.decode(row, arrays.images[place], times)
                if bad:
                    found.append((row.decoder.source, bad))
                if label is None:
                    arrays.images[place] = 0
                arrays.labels[place] = label or 0
                arrays.weights[place] = label is not None
                arrays.ids[place], arrays.slots[place] = row.raw.id, row.slot
            self._times.add(decode=times.decode, augment=times.augment)
            return found

        if self._threads == 1:
            return fill(0)
        return [bad for found in self._pool.map(fill, range(self._threads)) for bad in found]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Decoder:
    """Decodes the samples of one data set, or what stands in for them."""

    def __init__(
        self,
        source: int,
        data: Samples,
        reader: SampleReader,
        transform: Transform,
        *,
        substitute: bool,
    ) -> None:
        """`source`: number of the data set in the mix. Without `substitute` a bad sample is left out."""
        self.source = source
        self._data = data
        self._reader = reader
        self._transform = transform
        self._substitute = substitute
        self._names: dict[int, tuple[str, str]] = {}
        """Shard and key of bad samples by ordinal."""

    def decode(self, row: Row, out: Pixels, times: DecodeTimes) -> tuple[int | None, BadSample | None]:
        """The label of what is in `out` then, None if it is left out; and what was wrong."""
        reason = self._try(row.raw, row, out, times)
        if not reason:
            return row.raw.label, None
        if not self._substitute:
            return None, self._bad(row.raw, reason, None)
        for ordinal in substitutes(row.raw.ordinal, self._data.num_samples, self._data.fingerprint):
            (other,) = self._reader.read(np.array([ordinal], np.int64))
            if ordinal != row.raw.ordinal and not self._try(other, row, out, times):
                return other.label, self._bad(row.raw, reason, ordinal)
        bad = self._bad(row.raw, reason, None)
        raise DataError(f"{bad.where}: {reason}; and so are all {TRIES} that could replace it")

    def _bad(self, raw: RawSample, reason: str, substitute: int | None) -> BadSample:
        if raw.ordinal not in self._names:
            self._names[raw.ordinal] = self._reader.key(raw.ordinal)
        shard, key = self._names[raw.ordinal]
        return BadSample(self._data.url, shard, key, raw.ordinal, reason, substitute)

    def _try(self, raw: RawSample, row: Row, out: Pixels, times: DecodeTimes) -> str:
        """Why it did not work."""
        if raw.defect:
            return raw.defect
        try:
            self._transform(raw.image, row, out, times)
        except DataError as error:
            return str(error)
        return ""


class Background:
    """The batches of an iterator, made in a thread, at most `depth` ahead."""

    def __init__(self, batches: Iterator[Batch], depth: int, times: StageTimes) -> None:
        self._batches = batches
        self._times = times
        self._pool = single_threaded(1, "vitscale-batch")
        self._ahead = deque(self._pool.submit(next, batches) for _ in range(depth))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        batch = self._ahead[0].result()  # a failed one stays first, and fails again
        self._times.add(wait=time.perf_counter() - started)
        self._ahead.popleft()
        self._ahead.append(self._pool.submit(next, self._batches))
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()


def single_threaded(threads: int, name: str) -> concurrent.futures.ThreadPoolExecutor:
    """Threads in which torch's own operations use no others: those are for the model."""
    return concurrent.futures.ThreadPoolExecutor(
        threads, name, initializer=torch.set_num_threads, initargs=(1,)
    )
