"""The index over plain WebDataset shards: where each sample lies, its label and its digest.

Shards are never rewritten; `URL/_vitscale/` beside them holds

    samples/<shard name>.bin   a fixed-width row per sample, so any run of samples is one ranged read
    shards.parquet             a row per shard: name, bytes, etag, sha256, num_samples, records_sha256
    index.json                 format, fingerprint, classes, digest of shards.parquet; written last

A stream checks the digest of a sample's bytes, but that says nothing of a flipped label in the sample's
row. So each row ends in a check of its own, keyed with its shard's sha256 and its place: a damaged row,
or one of another shard or version, is refused without reading any other.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.data.tar import TarSample, find_image, find_label, samples
from workers.errors import DataError
from workers.storage import NotFound, ObjectInfo, Store, join_url, open_store

logger = logging.getLogger(__name__)

SAMPLE = np.dtype(
    [
        ("id", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("image_offset", "<u8"),
        ("image_size", "<u4"),
        ("label", "<i4"),
        ("digest", "V16"),
    ]
)
"""One sample. `id`: first 8 bytes of blake2b(shard name, NUL, key). `offset`, `size`: byte range in the
shard of all records of its members. `image_offset` counts from the shard's start, too. `digest`:
blake2b-16 of the bytes of that range."""

STORED = np.dtype([("sample", SAMPLE), ("check", "V8")])
"""A row of a records file: 64 bytes."""

FORMAT = 1
HEADER, TABLE = "_vitscale/index.json", "_vitscale/shards.parquet"
COLUMNS = {
    "name": ("name", pa.string()),
    "bytes": ("size", pa.int64()),
    "etag": ("etag", pa.string()),
    "sha256": ("sha256", pa.string()),
    "num_samples": ("num_samples", pa.int64()),
    "records_sha256": ("records_sha256", pa.string()),
}
"""Of the shard table, with the field of Shard and the type of each."""
PIECE_BYTES = 8 << 20
THREADS = 4
MAX_UNNAMED_CLASSES = 1 << 20
"""Labels from here on are taken for a mistake unless `classes` are given."""


class NewerFormat(DataError):
    """The index was written by a later version; never overwrite it."""


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    size: int
    """Bytes."""
    etag: str
    """Of the store where it was indexed; no part of the fingerprint."""
    sha256: str
    num_samples: int
    first: int
    """Ordinal of its first sample in the data set."""
    records_sha256: str
    """Of its records file."""


@dataclass(frozen=True)
class DatasetIndex:
    url: str
    fingerprint: str
    """Identifies shards, samples, labels and class names wherever they lie."""
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    num_samples: int

    @classmethod
    def open(cls, url: str) -> Self:
        """Reads two objects, never a sample; DataError if there is no index, or none that can be trusted."""
        store = open_store(url)
        header = _read_header(store, url)
        try:
            table = store.read(TABLE)
        except NotFound:
            table = b""
        if hashlib.sha256(table).hexdigest() != header["shards_sha256"]:
            raise DataError(f"{join_url(url, TABLE)} is not what {HEADER} says; run `vitscale index {url}`")
        index = cls._of(url, header["classes"], _from_table(table))
        if index.fingerprint != header["fingerprint"]:
            raise DataError(f"{join_url(url, HEADER)} is damaged; run `vitscale index {url}`")
        return index

    @classmethod
    def _of(cls, url: str, classes: Sequence[str], shards: Sequence[Shard]) -> Self:
        num_samples = sum(shard.num_samples for shard in shards)
        return cls(url, _fingerprint(classes, shards), tuple(classes), tuple(shards), num_samples)

    def records(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers, int32 (count,), and rows, SAMPLE (count,), of the samples from ordinal `start` on.

        One ranged read per shard touched. DataError names a row that is damaged."""
        if start < 0 or count < 0 or start + count > self.num_samples:
            raise IndexError(f"samples {start} to {start + count} of {self.num_samples}")
        rows = np.empty(count, SAMPLE)
        numbers = np.empty(count, np.int32)
        number = int(np.searchsorted(self._firsts, start, side="right")) - 1
        done = 0
        while done < count:
            shard = self.shards[number]
            row = start + done - shard.first
            taken = min(count - done, shard.num_samples - row)
            if taken:
                rows[done : done + taken] = self._read_rows(shard, row, taken)
                numbers[done : done + taken] = number
            done += taken
            number += 1
        return numbers, rows

    def _read_rows(self, shard: Shard, row: int, count: int) -> np.ndarray:
        key, width = _records_key(shard.name), STORED.itemsize
        data = self._store.read_range(key, row * width, count * width)
        stored = np.frombuffer(data, STORED)
        rows = np.ascontiguousarray(stored["sample"])
        wrong = np.flatnonzero(stored["check"] != _checks(rows, row, shard.sha256))
        if len(wrong):
            where = join_url(self.url, key)
            raise DataError(f"{where}: row {row + wrong[0]} is damaged; run `vitscale index {self.url}`")
        return rows

    @functools.cached_property
    def _store(self) -> Store:
        return open_store(self.url)

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.array([shard.first for shard in self.shards], np.int64)


def build_index(
    url: str,
    *,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetIndex:
    """Index all `*.tar` directly under `url`; DataError names the first shard and key that cannot be used.

    Shards that have not changed since they were last indexed are not read again. `classes` names the
    labels 0, 1, ...; without it the names of the last index stay, or else each label is its own name.
    `progress(shards done, all shards)` is called in this thread.
    """
    store = open_store(url)
    tars = [info for info in store.list() if "/" not in info.key and info.key.endswith(".tar")]
    if not tars:
        raise DataError(f"no *.tar directly under {url}; expected WebDataset shards there")
    last_classes, known = _last_index(store, url)
    classes = last_classes if classes is None else classes
    if classes is not None and (not classes or len(set(classes)) < len(classes)):
        raise DataError(f"classes must be distinct names, at least one, got {list(classes)!r}")
    limit = len(classes) if classes is not None else MAX_UNNAMED_CLASSES

    def index_shard(info: ObjectInfo) -> tuple[Shard, int]:
        return _reuse(store, info, known.get(info.key), limit) or _index_shard(store, info, limit)

    shards: list[Shard] = []
    first, max_label = 0, -1
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for shard, label in pool.map(index_shard, sorted(tars, key=lambda info: info.key)):
            shards.append(dataclasses.replace(shard, first=first))
            first += shard.num_samples
            max_label = max(max_label, label)
            if progress:
                progress(len(shards), len(tars))
    if not first:
        raise DataError(f"the shards under {url} hold no samples")
    index = DatasetIndex._of(url, _numbered(max_label + 1) if classes is None else classes, shards)
    _write(store, index)
    return index


def _last_index(store: Store, url: str) -> tuple[Sequence[str] | None, dict[str, Shard]]:
    """Its class names, if somebody gave them, and its shards by name."""
    try:
        classes = _read_header(store, url)["classes"]
    except NewerFormat:
        raise
    except DataError:
        return None, {}
    try:
        known = {shard.name: shard for shard in DatasetIndex.open(url).shards}
    except DataError as error:
        logger.warning("reading all shards again: %s", error)
        known = {}
    return (None if tuple(classes) == _numbered(len(classes)) else classes), known


def _reuse(store: Store, info: ObjectInfo, known: Shard | None, limit: int) -> tuple[Shard, int] | None:
    """The shard as it was indexed and its largest label, if neither it nor its records changed since."""
    if known is None or (known.size, known.etag) != (info.size, info.etag):
        return None
    try:
        records = store.read(_records_key(info.key))
    except NotFound:
        return None
    if hashlib.sha256(records).hexdigest() != known.records_sha256:
        return None
    max_label = int(np.frombuffer(records, STORED)["sample"]["label"].max(initial=-1))
    # A label beyond these classes: reading the shard again names its key.
    return (known, max_label) if max_label < limit else None


def _index_shard(store: Store, info: ObjectInfo, limit: int) -> tuple[Shard, int]:
    """The shard and its largest label; its records are written."""
    whole = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for start in range(0, info.size, PIECE_BYTES):
            piece = store.read_range(info.key, start, min(PIECE_BYTES, info.size - start), info.etag)
            whole.update(piece)
            yield piece

    rows = np.array([_row(info.key, sample, limit) for sample in samples(info.key, pieces())], SAMPLE)
    stored = np.empty(len(rows), STORED)
    stored["sample"] = rows
    stored["check"] = _checks(rows, 0, whole.hexdigest())
    records = stored.tobytes()
    store.write(_records_key(info.key), records)
    digest = hashlib.sha256(records).hexdigest()
    shard = Shard(info.key, info.size, info.etag, whole.hexdigest(), len(rows), 0, digest)
    return shard, int(rows["label"].max(initial=-1))


def _row(shard: str, sample: TarSample, limit: int) -> tuple[int, int, int, int, int, int, bytes]:
    image = find_image(shard, sample)
    identity = f"{shard}\0{sample.key}".encode("utf-8", "surrogateescape")
    return (
        int.from_bytes(hashlib.blake2b(identity).digest()[:8], "little"),
        sample.offset,
        sample.size,
        image.data_offset,
        image.size,
        find_label(shard, sample, limit),
        sample.digest,
    )


def _checks(rows: np.ndarray, first_row: int, sha256: str) -> np.ndarray:
    """V8 (n,): keyed digest of each row and its place; 1 µs a row."""
    key, data, width = bytes.fromhex(sha256), rows.tobytes(), SAMPLE.itemsize
    checks = (
        hashlib.blake2b(
            data[at * width : (at + 1) * width] + (first_row + at).to_bytes(8, "little"),
            digest_size=8,
            key=key,
        ).digest()
        for at in range(len(rows))
    )
    return np.frombuffer(b"".join(checks), "V8")


def _write(store: Store, index: DatasetIndex) -> None:
    table = _to_table(index.shards)
    header = {
        "format": FORMAT,
        "fingerprint": index.fingerprint,
        "classes": index.classes,
        "num_samples": index.num_samples,
        "shards_sha256": hashlib.sha256(table).hexdigest(),
    }
    store.write(TABLE, table)
    store.write(HEADER, json.dumps(header, indent=1).encode())


def _read_header(store: Store, url: str) -> dict[str, Any]:
    where, again = join_url(url, HEADER), f"run `vitscale index {url}`"
    try:
        header = json.loads(store.read(HEADER))
        version = int(header["format"])
        missing = {"fingerprint", "classes", "shards_sha256"} - header.keys()
    except NotFound:
        raise DataError(f"{url} is not indexed: no {HEADER} there; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{where} is damaged; {again}") from None
    if version > FORMAT:
        raise NewerFormat(f"{where} has format {version}, this version reads {FORMAT}; update vitscale")
    if missing:
        raise DataError(f"{where} lacks {', '.join(sorted(missing))}; {again}")
    return dict(header)


def _fingerprint(classes: Sequence[str], shards: Sequence[Shard]) -> str:
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for shard in shards:
        row = [shard.name, shard.size, shard.sha256, shard.num_samples, shard.records_sha256]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _to_table(shards: Sequence[Shard]) -> bytes:
    columns = {
        column: pa.array([getattr(shard, name) for shard in shards], kind)
        for column, (name, kind) in COLUMNS.items()
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _from_table(data: bytes) -> list[Shard]:
    table = pq.read_table(io.BytesIO(data)).to_pydict()
    columns = {name: table[column] for column, (name, _) in COLUMNS.items()}
    firsts = np.cumsum([0, *columns["num_samples"]])[:-1].tolist()
    rows = zip(*columns.values(), firsts, strict=True)
    return [Shard(**dict(zip((*columns, "first"), row, strict=True))) for row in rows]


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(count))


def _records_key(shard: str) -> str:
    return f"_vitscale/samples/{shard}.bin"
