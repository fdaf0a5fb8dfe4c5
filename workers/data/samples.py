"""Verified samples: what the index names, read from the store by ranges and checked before it is decoded.

A sample that is not what was indexed is read once more; if it is wrong again it comes with its `defect`
instead of an image, so that whoever consumes it can put another in its place. What is no fault of the
data (a network, credentials, a shard that somebody replaced) is an error.
"""

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from workers.cache import CachedStore
from workers.data.order import Positions
from workers.data.shards import Shard
from workers.data.tar import split_name, walk
from workers.errors import DataError
from workers.storage import NotFound, Store, Truncated, open_store

MIN_GAP_BYTES, MAX_GAP_BYTES, MAX_GAP_SAMPLES = 64 << 10, 512 << 10, 4
"""Unwanted bytes between two ranges that are read through, up to so many times the sample before: a request
costs 1.5 ms of CPU here and takes 10 to 100 ms, in which they come as well."""
HELD_BYTES = 64 << 20
"""Of a data set that each reader holds in memory once it was read: a small part of a large one lies
scattered, and would cost a request for almost each sample in each of its many epochs."""
MAX_RUN_BYTES = 16 << 20
"""Of one request: bounds what is held besides the samples that are wanted."""


class Samples(Protocol):
    """A data set, or a part of one, whose samples are numbered from 0."""

    @property
    def url(self) -> str:
        """Of the store that shard names are relative to."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Of all samples, with what the tar format adds; an estimate will do."""

    @property
    def id_sum(self) -> int:
        """Over all ids, see `workers.data.proof`."""

    @property
    def shards(self) -> Sequence[Shard]: ...
    def fetch_rows(self, ordinals: Positions, store: Store | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers, int32 (n,), and rows, SAMPLE (n,), of ascending ordinals; read by `store`."""


@dataclass
class StageTimes:
    """Seconds per stage, summed over threads; `wait` is what the consumer spent waiting for a batch."""

    fetch: float = 0.0
    verify: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    wait: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **seconds: float) -> None:
        with self._lock:
            for stage, more in seconds.items():
                setattr(self, stage, getattr(self, stage) + more)

    def seconds(self) -> dict[str, float]:
        return {stage: getattr(self, stage) for stage in ("fetch", "verify", "decode", "augment", "wait")}

    def take(self) -> "StageTimes":
        """What has summed up since the last call."""
        with self._lock:
            taken = StageTimes(self.fetch, self.verify, self.decode, self.augment, self.wait)
            self.fetch = self.verify = self.decode = self.augment = self.wait = 0.0
        return taken


class Cache(NamedTuple):
    """Where what is read of shards is kept on this node, and how much."""

    directory: str
    limit_bytes: int


def check_cache(cache: Cache) -> None:
    """ConfigError if it cannot be used on this node."""
    CachedStore(open_store("file:///"), Path(cache.directory), cache.limit_bytes)


class RawSample(NamedTuple):
    ordinal: int
    image: bytes
    """The image file as it is in the shard; nothing if there is a `defect`."""
    label: int
    id: int
    defect: str = ""
    """Why it cannot be used."""


class SampleReader:
    """Samples of a data set by ordinal."""

    def __init__(
        self, data: Samples, times: StageTimes, cache: Cache | None = None, *, held_bytes: int = 0
    ) -> None:
        """Samples of a data set of at most `held_bytes` are read once and held, those with a defect not."""
        self._data = data
        self._times = times
        self._closed = False
        self._held: dict[int, RawSample] | None = {} if data.num_bytes <= held_bytes else None
        self._store = open_store(data.url, stopped=lambda: self._closed)
        if cache is not None:
            self._store = CachedStore(self._store, Path(cache.directory), cache.limit_bytes)

    def close(self) -> None:
        """Reads under way end after the request that they are at."""
        self._closed = True

    def read(self, ordinals: Positions) -> list[RawSample]:
        """The samples of ascending `ordinals`, (n,), in that order; neighbours come in one request."""
        if self._held is None:
            return self._fetch(ordinals)
        missing = [ordinal for ordinal in ordinals.tolist() if ordinal not in self._held]
        fetched = {sample.ordinal: sample for sample in self._fetch(np.array(missing, np.int64))}
        self._held |= {ordinal: sample for ordinal, sample in fetched.items() if not sample.defect}
        return [fetched.get(ordinal) or self._held[ordinal] for ordinal in ordinals.tolist()]

    def _fetch(self, ordinals: Positions) -> list[RawSample]:
        if not len(ordinals):
            return []
        started = time.perf_counter()
        numbers, rows = self._data.fetch_rows(ordinals, self._store)
        self._times.add(fetch=time.perf_counter() - started)
        samples: list[RawSample] = []
        for run in runs(numbers, rows):
            if self._closed:
                raise DataError("the stream was closed")
            samples += self._read_run(int(numbers[run.start]), ordinals[run], rows[run])
        return samples

    def key(self, ordinal: int) -> tuple[str, str]:
        """Shard and key of a sample, for a person to find it; reads the sample."""
        numbers, rows = self._data.fetch_rows(np.array([ordinal], np.int64), self._store)
        shard, row = self._data.shards[int(numbers[0])], rows[0]
        try:
            record = self._store.read_range(shard.name, int(row["offset"]), int(row["size"]), shard.etag)
            names = (split_name(member.name) for member in walk(shard.name, [record]) if member.is_file)
            return shard.name, next(parts[0] for parts in names if parts)
        except (DataError, StopIteration):
            return shard.name, f"from byte {int(row['offset'])}"

    def _read_run(self, number: int, ordinals: Positions, rows: np.ndarray) -> list[RawSample]:
        """Samples of one shard, near enough to each other for one request."""
        shard = self._data.shards[number]
        start = int(rows["offset"][0])
        length = int(rows["offset"][-1] + rows["size"][-1]) - start
        began = time.perf_counter()
        try:
            data = memoryview(self._store.read_range(shard.name, start, length, shard.etag))
        except (NotFound, Truncated):
            data = memoryview(b"")  # one by one: what lies before the end can still be had
        fetched = time.perf_counter()
        samples = []
        for ordinal, row in zip(ordinals.tolist(), rows.tolist(), strict=True):
            sample_id, offset, size, image_offset, image_size, label, digest = row
            piece = data[offset - start : offset - start + size]
            defect = ""
            if _digest(piece) != digest:
                # What the network or a cache has damaged comes right the second time.
                piece, defect = self._read_again(number, offset, size, digest)
            image = bytes(piece[image_offset - offset : image_offset - offset + image_size])
            samples.append(RawSample(ordinal, image, label, sample_id, defect))
        self._times.add(fetch=fetched - began, verify=time.perf_counter() - fetched)
        return samples

    def _read_again(self, number: int, offset: int, size: int, digest: bytes) -> tuple[memoryview, str]:
        """The sample's bytes, or nothing and why."""
        shard = self._data.shards[number]
        self._store.forget(shard.name, offset, size, shard.etag)
        try:
            piece = memoryview(self._store.read_range(shard.name, offset, size, shard.etag))
        except (NotFound, Truncated) as error:
            return memoryview(b""), str(error)
        if _digest(piece) == digest:
            return piece, ""
        return memoryview(b""), (
            f"its {size} bytes from byte {offset} are not what was indexed: the shard is damaged; restore "
            "it, or index it as it is now"
        )


def runs(numbers: np.ndarray, rows: np.ndarray) -> list[slice]:
    """Ascending samples that are read in one request each: of one shard, with small gaps at most."""
    ends = rows["offset"] + rows["size"]
    gaps = np.clip(MAX_GAP_SAMPLES * rows["size"][:-1], MIN_GAP_BYTES, MAX_GAP_BYTES)
    near = (numbers[1:] == numbers[:-1]) & (rows["offset"][1:] <= ends[:-1] + gaps)
    borders = [0]
    for at in range(1, len(rows)):
        if not near[at - 1] or ends[at] - rows["offset"][borders[-1]] > MAX_RUN_BYTES:
            borders.append(at)
    return [slice(start, stop) for start, stop in itertools.pairwise([*borders, len(rows)])]


def _digest(data: memoryview) -> bytes:
    return blake3(data).digest(length=16)
