"""One shard read from end to end: its rows for the index, its digest, its labels."""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from workers.data.index import SAMPLE, STORED, pack_rows, records_key, unpack_rows
from workers.data.layout import NO_LABEL, Labels, Layout
from workers.data.pool import read_ahead
from workers.data.proof import id_sum
from workers.data.shards import ROW, mark
from workers.data.tar import TarSample, samples
from workers.errors import DataError
from workers.storage import ObjectInfo, Store, join_url, open_store

PIECE_BYTES = 8 << 20
PACKED = struct.Struct("<QQQQIi16s")
"""SAMPLE, ten times as fast as numpy makes it of tuples."""
assert PACKED.size == SAMPLE.itemsize


@dataclass(frozen=True, slots=True)
class ShardTask:
    """All that a process needs to index a shard, or to give it other labels."""

    root: str
    home: str
    layout: Layout
    classes: tuple[str, ...] | None
    """None: names are numbered as they come, and follow the rows in the records object."""
    info: ObjectInfo
    row: bytes = b""
    """ROW of the shard as it was indexed before, for `survey` and `relabel`."""
    number: int = 0
    """Of the shard."""


@dataclass(frozen=True, slots=True)
class ShardRow:
    row: bytes
    """ROW."""
    named: bool
    """Whether a label was a name."""
    names: tuple[str, ...] = ()
    """Labels without a list of classes: what each number stands for."""


def index_shard(task: ShardTask) -> ShardRow:
    """Reads the shard and writes its records; UnusableShard names the key or byte at fault."""
    store, info = open_store(task.root), task.info
    whole = hashlib.sha256()
    labels = Labels(task.layout, task.classes)
    rows = bytearray()
    with read_ahead(pieces(store, info)) as data:
        for sample in samples(info.key, _digested(data, whole)):
            rows += _row(info.key, sample, task.layout, labels)
    names = tuple(labels.names) if task.classes is None else ()
    row = _write(store, task, np.frombuffer(rows, SAMPLE), whole.hexdigest(), names)
    return ShardRow(row, labels.named, names)


def survey(task: ShardTask) -> ShardRow:
    """The names in use in a shard that has not changed, by its records, whose labels number `classes`."""
    assert task.classes is not None
    rows, _ = _read(task)
    names = tuple(task.classes[label] for label in np.unique(rows["label"]).tolist())
    return ShardRow(task.row, True, names)


def relabel(task: ShardTask, numbers: dict[str, int]) -> ShardRow:
    """The records anew, with the `numbers` of the names; these are `classes`, or follow the rows."""
    rows, names = _read(task)
    row = np.frombuffer(task.row, ROW)[0]
    renumbered = np.array([numbers.get(name, NO_LABEL) for name in names], "<i4")
    rows = rows.copy()
    rows["label"] = renumbered[rows["label"]]
    return ShardRow(_write(open_store(task.root), task, rows, row["sha256"].tobytes().hex(), ()), True, ())


def pieces(store: Store, info: ObjectInfo) -> Iterator[bytes]:
    for start in range(0, info.size, PIECE_BYTES):
        yield store.read_range(info.key, start, min(PIECE_BYTES, info.size - start), info.etag)


def _digested(data: Iterator[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for piece in data:
        digest.update(piece)
        yield piece


def _row(shard: str, sample: TarSample, layout: Layout, labels: Labels) -> bytes:
    image = layout.image(shard, sample)
    identity = f"{shard}\0{sample.key}".encode("utf-8", "surrogateescape")
    return PACKED.pack(
        int.from_bytes(hashlib.blake2b(identity).digest()[:8], "little"),
        sample.offset,
        sample.size,
        image.data_offset,
        image.size,
        labels.number(shard, sample),
        sample.digest,
    )


def _write(store: Store, task: ShardTask, rows: np.ndarray, sha256: str, names: Sequence[str]) -> bytes:
    """Writes the records object; ROW, as bytes."""
    records = pack_rows(rows, sha256) + (json.dumps(names).encode() if names else b"")
    digest = hashlib.sha256(records)
    key = records_key(task.home, task.info.key, digest.hexdigest())
    store.write(key, records)
    written = store.head(key)
    row = np.zeros((), ROW)
    row["size"], row["num_samples"] = task.info.size, len(rows)
    row["sha256"] = np.void(bytes.fromhex(sha256))
    row["records_sha256"] = np.void(digest.digest())
    row["id_sum"] = id_sum(rows["id"])
    row["max_label"] = rows["label"].max(initial=NO_LABEL)
    row["records_mark"] = mark(key, written.size, written.etag)
    return row.tobytes()


def _read(task: ShardTask) -> tuple[np.ndarray, Sequence[str]]:
    """The rows of a records object and what their labels stand for; DataError if it is damaged."""
    row = np.frombuffer(task.row, ROW)[0]
    sha256, digest = row["sha256"].tobytes().hex(), row["records_sha256"].tobytes().hex()
    key = records_key(task.home, task.info.key, digest)
    data = open_store(task.root).read(key)
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(f"{join_url(task.root, key)} is damaged; index with --fresh")
    length = int(row["num_samples"]) * STORED.itemsize
    rows, _ = unpack_rows(data[:length], 0, sha256)
    names = task.classes if task.classes is not None else json.loads(data[length:] or b"[]")
    return rows, names
