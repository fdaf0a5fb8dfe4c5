"""Verified samples: what the index names, read from the store by ranges and checked before it is parsed.

boto3 or a file gives the bytes, the index their digests, webdataset the grouping of a tar's files into
samples.
"""

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from workers.data.index import DatasetIndex
from workers.data.order import Positions
from workers.data.tar import BLOCK, IMAGE_EXTENSIONS
from workers.errors import DataError
from workers.storage import join_url, open_store

MAX_GAP_BYTES = 64 << 10
"""Unwanted bytes between two ranges that are read through: cheaper than another request of 10 ms."""
MAX_GAP_ROWS = 1024
"""The same for rows of the index, 64 bytes each."""


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

    def take(self) -> "StageTimes":
        """What has summed up since the last call."""
        with self._lock:
            taken = StageTimes(self.fetch, self.verify, self.decode, self.augment, self.wait)
            self.fetch = self.verify = self.decode = self.augment = self.wait = 0.0
        return taken


class RawSample(NamedTuple):
    image: bytes
    """The image file as it is in the shard."""
    label: int
    id: int
    shard: str
    """URL."""
    key: str


class SampleReader:
    """Samples of a data set by ordinal; given a `subset`, by their place in that."""

    def __init__(self, index: DatasetIndex, subset: Positions | None, times: StageTimes) -> None:
        self.num_samples = index.num_samples if subset is None else len(subset)
        self._index = index
        self._subset = subset
        self._times = times
        self._store = open_store(index.url)
        self._closed = False

    def close(self) -> None:
        """Reads under way end after the request that they are at."""
        self._closed = True

    def read(self, ordinals: Positions) -> list[RawSample]:
        """The samples of ascending `ordinals`, (n,), in that order; neighbours come in one request.

        DataError names the shard, and the sample or byte, that is not what the index says.
        """
        wanted = ordinals if self._subset is None else self._subset[ordinals]
        started = time.perf_counter()
        numbers, rows = self._rows(wanted)
        self._times.add(fetch=time.perf_counter() - started)
        ends = rows["offset"] + rows["size"]
        near = (numbers[1:] == numbers[:-1]) & (rows["offset"][1:] <= ends[:-1] + MAX_GAP_BYTES)
        samples: list[RawSample] = []
        for run in np.split(np.arange(len(wanted)), np.flatnonzero(~near) + 1):
            if self._closed:
                raise DataError("the stream was closed")
            samples += self._read_run(int(numbers[run[0]]), wanted[run], rows[run])
        return samples

    def _rows(self, wanted: Positions) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and rows of the index, of ascending ordinals."""
        numbers, rows = [], []
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > MAX_GAP_ROWS) + 1):
            first = int(run[0])
            run_numbers, run_rows = self._index.records(first, int(run[-1]) - first + 1)
            numbers.append(run_numbers[run - first])
            rows.append(run_rows[run - first])
        return np.concatenate(numbers), np.concatenate(rows)

    def _read_run(self, number: int, ordinals: Positions, rows: np.ndarray) -> list[RawSample]:
        """Samples of one shard, near enough to each other for one request."""
        shard = self._index.shards[number]
        url = join_url(self._index.url, shard.name)
        start = int(rows["offset"][0])
        length = int(rows["offset"][-1] + rows["size"][-1]) - start
        began = time.perf_counter()
        data = self._store.read_range(shard.name, start, length, shard.etag)
        fetched = time.perf_counter()
        whole, pieces = memoryview(data), []
        ranges = zip(rows["offset"].tolist(), rows["size"].tolist(), rows["digest"].tolist(), strict=True)
        for ordinal, (offset, size, digest) in zip(ordinals.tolist(), ranges, strict=True):
            piece: bytes | memoryview = whole[offset - start : offset - start + size]
            if _digest(piece) != digest:
                # What the network or a cache has damaged comes right the second time.
                piece = self._store.read_range(shard.name, offset, size, shard.etag)
                if _digest(piece) != digest:
                    raise DataError(
                        f"{url}: sample {ordinal} of the data set, {size} bytes from byte {offset}, is not "
                        f"what was indexed: the shard is damaged; restore it, or index it as it is now"
                    )
            pieces.append(piece)
        groups = list(group_by_keys(_files(url, b"".join(pieces))))
        if len(groups) != len(rows):
            raise DataError(f"{url}: {len(groups)} samples from byte {start}, {len(rows)} were indexed there")
        samples = [
            RawSample(_image(group), label, sample_id, url, group["__key__"])
            for group, label, sample_id in zip(
                groups, rows["label"].tolist(), rows["id"].tolist(), strict=True
            )
        ]
        self._times.add(fetch=fetched - began, verify=time.perf_counter() - fetched)
        return samples


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _image(group: dict[str, Any]) -> bytes:
    image: bytes = next(group[extension] for extension in IMAGE_EXTENSIONS if extension in group)
    return image


def _files(url: str, data: bytes) -> Iterator[dict[str, Any]]:
    """The files of tar records, as webdataset's tar_file_expander gives them and 20 times as fast.

    It takes 20 µs per header, as much as decoding a small image takes. Plain headers are walked here,
    for `data` is verified; from the first unusual one on, tar_file_expander does the work.
    """
    at = 0
    while at < len(data):
        header = data[at : at + BLOCK]
        start = at + BLOCK
        digits = header[124:136].strip(b" \0")
        size = int(digits, 8) if digits.isdigit() else -1
        stop = start + size
        is_file, is_extended = header[156] == ord("0"), header[156] == ord("x")
        unusual_name = header[345] or header.startswith(b"__")
        unusual_fields = is_extended and (b" path=" in data[start:stop] or b" size=" in data[start:stop])
        if size < 0 or unusual_name or unusual_fields or not (is_file or is_extended):
            rest = {"url": url, "stream": io.BytesIO(data[at:])}
            yield from tar_file_expander([rest], eof_value=None)
            return
        if is_file:
            name = header[:100].rstrip(b"\0").decode("utf-8", "surrogateescape")
            yield {"fname": name, "data": data[start:stop], "__url__": url}
        at = start + -(-size // BLOCK) * BLOCK
