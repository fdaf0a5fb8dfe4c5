"""Smaller data sets for scale-up experiments: the first n samples of a seeded permutation, nested.

A subset is an index of its own, built once beside that of the data set and read like it; no data is
rewritten:

    _vitscale/subsets/<fingerprint>/rows/000000.bin   a row per sample, 2**18 rows in each
    _vitscale/subsets/<fingerprint>/subset.json       what it is; written last
"""

import concurrent.futures
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from workers.data.index import SAMPLE, DatasetIndex
from workers.data.order import Positions, permute, round_keys
from workers.data.pages import Pages
from workers.data.proof import MODULUS, id_sum
from workers.data.samples import runs
from workers.data.shards import Shard
from workers.errors import ConfigError, DataError
from workers.storage import NotFound, Store, join_url, open_store

ROW = np.dtype([("shard", "<u4"), ("sample", SAMPLE)])
STORED = np.dtype([("row", ROW), ("check", "V8")])
"""68 bytes. The check covers row and place, keyed with the subset's fingerprint."""

PART_ROWS = 1 << 18
"""Rows in one object, and samples handled at a time; bounds memory to some 60 MB."""
READ_ROWS = 512
"""Of the data set's index, fetched in one task."""
THREADS = 8
MAX_GAP_ROWS = 1024
"""Unwanted rows that are read through rather than by another request."""


@dataclass(frozen=True)
class SubsetFacts:
    """What subset.json holds."""

    parent: str
    """Fingerprint of the data set."""
    num_samples: int
    seed: int
    stratified: bool
    num_bytes: int
    """Of its samples, with what the tar format adds."""
    bytes_read: int
    """In an epoch: samples of the data set that lie between are read through where that saves a request."""
    num_requests: int
    """In an epoch, at the least."""
    id_sum: str
    """Hexadecimal."""

    @property
    def read_amplification(self) -> float:
        return self.bytes_read / self.num_bytes


@dataclass(frozen=True)
class Subset:
    index: DatasetIndex
    fingerprint: str
    facts: SubsetFacts

    @classmethod
    def open(cls, index: DatasetIndex, n: int, seed: int, *, stratified: bool = False) -> Self:
        """NotFound if it was not built, DataError if it is damaged."""
        fingerprint = subset_fingerprint(index.fingerprint, n, seed, stratified=stratified)
        key = f"{_folder(fingerprint)}/subset.json"
        store = open_store(index.url)
        try:
            facts = SubsetFacts(**json.loads(store.read(key)))
            int(facts.id_sum, 16)
        except (ValueError, TypeError):
            where = join_url(index.url, key)
            raise DataError(f"{where} is damaged; delete it, and it will be built again") from None
        return cls(index, fingerprint, facts)

    @property
    def url(self) -> str:
        return self.index.url

    @property
    def num_samples(self) -> int:
        return self.facts.num_samples

    @property
    def num_bytes(self) -> int:
        return self.facts.num_bytes

    @property
    def id_sum(self) -> int:
        return int(self.facts.id_sum, 16)

    @property
    def shards(self) -> Sequence[Shard]:
        return self.index.shards

    def fetch_rows(self, ordinals: Positions, store: Store | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers, int32 (n,), and rows, SAMPLE (n,), of ascending ordinals of the subset."""
        parts = []
        breaks = np.flatnonzero((np.diff(ordinals) > MAX_GAP_ROWS) | (np.diff(ordinals // PART_ROWS) > 0))
        for run in np.split(ordinals, breaks + 1):
            first = int(run[0])
            read = self._read_rows(store or self._store, first, int(run[-1]) - first + 1)
            parts.append(read[run - first])
        rows = np.concatenate(parts)
        return rows["shard"].astype(np.int32), np.ascontiguousarray(rows["sample"])

    def _read_rows(self, store: Store, start: int, count: int) -> np.ndarray:
        """Rows of one object."""
        key, width = _rows_key(self.fingerprint, start // PART_ROWS), STORED.itemsize
        for _ in range(2):  # what the network has damaged comes right the second time
            rows_here = min(PART_ROWS, self.num_samples - start // PART_ROWS * PART_ROWS)
            data = self._pages.read(store, key, rows_here * width, start % PART_ROWS * width, count * width)
            stored = np.frombuffer(data, STORED)
            rows = np.ascontiguousarray(stored["row"])
            wrong = np.flatnonzero(stored["check"] != _checks(rows, start, self.fingerprint))
            if not len(wrong):
                return rows
            self._pages.forget(key)
        where = join_url(self.url, key)
        raise DataError(
            f"{where}: row {start % PART_ROWS + wrong[0]} is damaged; delete {_folder(self.fingerprint)} "
            "there, and it will be built again"
        )

    @functools.cached_property
    def _store(self) -> Store:
        return open_store(self.url)

    @functools.cached_property
    def _pages(self) -> Pages:
        return Pages()


def build_subset(
    index: DatasetIndex,
    n: int,
    seed: int,
    *,
    stratified: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Subset:
    """The subset of `n` samples, built unless it is there; `progress(samples done, n)`.

    Costs a row of the index per sample; a stratified one reads the labels of all samples.
    """
    if not 0 < n <= index.num_samples:
        raise ConfigError(
            f"data.subset {n} is not between 1 and the {index.num_samples} samples of the data set"
        )
    try:
        return Subset.open(index, n, seed, stratified=stratified)
    except NotFound:
        pass
    chosen = _stratified(index, n, seed) if stratified else choose(index.num_samples, n, seed)
    fingerprint = subset_fingerprint(index.fingerprint, n, seed, stratified=stratified)
    store = open_store(index.url)
    total, num_bytes, bytes_read, num_requests = 0, 0, 0, 0
    for start in range(0, n, PART_ROWS):
        numbers, samples = _fetch(index, chosen[start : start + PART_ROWS])
        total = (total + id_sum(samples["id"])) % MODULUS
        num_bytes += int(samples["size"].sum())
        for run in runs(numbers, samples):
            first, last = samples[run.start], samples[run.stop - 1]
            bytes_read += int(last["offset"] + last["size"] - first["offset"])
            num_requests += 1
        _write_rows(store, fingerprint, start, numbers, samples)
        if progress:
            progress(min(start + PART_ROWS, n), n)
    facts = SubsetFacts(
        parent=index.fingerprint,
        num_samples=n,
        seed=seed,
        stratified=stratified,
        num_bytes=num_bytes,
        bytes_read=bytes_read,
        num_requests=num_requests,
        id_sum=f"{total:016x}",
    )
    store.write(f"{_folder(fingerprint)}/subset.json", json.dumps(asdict(facts), indent=1).encode())
    return Subset(index, fingerprint, facts)


def choose(num_samples: int, n: int, seed: int) -> Positions:
    """Ascending samples of the index, (n,) int64; those of a smaller n are among those of a larger one."""
    keys = round_keys("subset", seed)
    chosen = np.arange(n, dtype=np.int64)
    for start in range(0, n, PART_ROWS):
        chosen[start : start + PART_ROWS] = permute(chosen[start : start + PART_ROWS], num_samples, keys)
    chosen.sort()
    return chosen


def choose_stratified(labels: np.ndarray, n: int, seed: int) -> Positions:
    """Ascending samples, (n,) int64, each class as near to its share of all as whole samples allow; nested.

    The r-th sample of a class of m, in seeded order, stands at (r + 1/2) / m; the n first are taken.
    """
    places = np.empty(len(labels), np.float64)
    by_label = np.argsort(labels, kind="stable")
    values, firsts = np.unique(labels[by_label], return_index=True)
    for value, members in zip(values.tolist(), np.split(by_label, firsts[1:]), strict=True):
        keys = round_keys("subset", seed, "class", value)
        ranks = permute(np.arange(len(members), dtype=np.int64), len(members), keys)
        places[members] = (ranks + 0.5) / len(members)
    return np.sort(np.lexsort((labels, places))[:n]).astype(np.int64)


def subset_fingerprint(fingerprint: str, n: int, seed: int, *, stratified: bool = False) -> str:
    """Identifies the subset as `fingerprint` does the whole data set."""
    identity = f"subset\0{fingerprint}\0{n}\0{seed}\0{'stratified' if stratified else 'uniform'}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _stratified(index: DatasetIndex, n: int, seed: int) -> Positions:
    labels = np.empty(index.num_samples, np.int32)
    for start in range(0, index.num_samples, PART_ROWS):
        part = np.arange(start, min(start + PART_ROWS, index.num_samples), dtype=np.int64)
        labels[part] = _fetch(index, part)[1]["label"]
    return choose_stratified(labels, n, seed)


def _fetch(index: DatasetIndex, ordinals: Positions) -> tuple[np.ndarray, np.ndarray]:
    """As `index.fetch_rows`, several requests at a time."""
    pieces = np.split(ordinals, range(READ_ROWS, len(ordinals), READ_ROWS))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        numbers, rows = zip(*pool.map(index.fetch_rows, pieces), strict=True)
    return np.concatenate(numbers), np.concatenate(rows)


def _write_rows(store: Store, fingerprint: str, start: int, numbers: np.ndarray, samples: np.ndarray) -> None:
    stored = np.empty(len(samples), STORED)
    rows = stored["row"]
    rows["shard"], rows["sample"] = numbers, samples
    stored["check"] = _checks(rows, start, fingerprint)
    store.write(_rows_key(fingerprint, start // PART_ROWS), stored.tobytes())


def _checks(rows: np.ndarray, first: int, fingerprint: str) -> np.ndarray:
    """V8 (n,): keyed digest of each row and its place."""

    def digests() -> Iterator[bytes]:
        key, data, width = bytes.fromhex(fingerprint), rows.tobytes(), ROW.itemsize
        for at in range(len(rows)):
            row = data[at * width : (at + 1) * width] + (first + at).to_bytes(8, "little")
            yield hashlib.blake2b(row, digest_size=8, key=key).digest()

    return np.frombuffer(b"".join(digests()), "V8")


def _folder(fingerprint: str) -> str:
    return f"_vitscale/subsets/{fingerprint[:32]}"


def _rows_key(fingerprint: str, part: int) -> str:
    return f"{_folder(fingerprint)}/rows/{part:06d}.bin"
