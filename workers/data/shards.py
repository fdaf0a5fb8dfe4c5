"""The shard table: typed columns in memory, Parquet pieces of 65,536 rows in the store.

A million shards take some 200 MB and half a second to read, since nothing is kept as an object per shard.
Pieces are named by their digest: a new table never touches the old one, and a reader knows what it has.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from workers.data.pool import read_ahead
from workers.errors import DataError
from workers.storage import NotFound, Store, join_url

PIECE_ROWS = 1 << 16
ROW = np.dtype(
    [
        ("size", "<i8"),
        ("num_samples", "<i8"),
        ("sha256", "V32"),
        ("records_sha256", "V32"),
        ("id_sum", "<u8"),
        ("max_label", "<i4"),
        ("records_mark", "<u8"),
    ]
)
"""Of one shard. `size`: bytes. `id_sum`: workers/data/proof.py. `max_label`: -1 if it has none.
`records_mark`: of its records object as the store listed it, see `mark`; with the ETag the only column
that depends on the place, and so no part of the content."""
CONTENT = tuple(name for name in ROW.names or () if name != "records_mark")


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    """Key below the URL of the data set."""
    size: int
    """Bytes."""
    etag: str
    """Of the store where it was indexed; no part of the fingerprint."""
    sha256: str
    num_samples: int
    first: int
    """Ordinal of its first sample in the data set."""
    records_sha256: str
    """Of its records object."""


class Strings(Sequence[str]):
    """Many texts, packed: their UTF-8 and 4 bytes each."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.pieces: list[pa.Array] = []
        self._pending: list[str] = []
        for text in texts:
            self.append(text)
        self.seal()

    def append(self, text: str) -> None:
        """Seen from the next `seal` on."""
        self._pending.append(text)
        if len(self._pending) == PIECE_ROWS:
            self.seal()

    def seal(self) -> None:
        if self._pending:
            self.add(pa.array(self._pending, pa.string()))
            self._pending = []

    def add(self, piece: pa.Array) -> None:
        """Every piece but the last has PIECE_ROWS."""
        self.pieces.append(piece)

    def __len__(self) -> int:
        return (len(self.pieces) - 1) * PIECE_ROWS + len(self.pieces[-1]) if self.pieces else 0

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        text: str = self.pieces[number // PIECE_ROWS][number % PIECE_ROWS].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            yield from piece.to_pylist()


class ShardTable(Sequence[Shard]):
    """All shards in the order of their names; makes a Shard when asked for one."""

    def __init__(self, rows: np.ndarray, names: Strings, etags: Strings) -> None:
        """`rows`: ROW, (number of shards,)."""
        self.rows = rows
        self.names = names
        self.etags = etags
        self.firsts: npt.NDArray[np.int64] = np.zeros(len(rows) + 1, np.int64)
        """(number of shards + 1,): the ordinal of each shard's first sample, and the number of all."""
        np.cumsum(rows["num_samples"], out=self.firsts[1:])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        number %= len(self)
        row = self.rows[number]
        return Shard(
            name=self.names[number],
            size=int(row["size"]),
            etag=self.etags[number],
            sha256=row["sha256"].tobytes().hex(),
            num_samples=int(row["num_samples"]),
            first=int(self.firsts[number]),
            records_sha256=row["records_sha256"].tobytes().hex(),
        )

    def content(self) -> Iterator[bytes]:
        """The digest of each piece of 65,536 rows, by value: Parquet's bytes depend on who writes them."""
        for number, names in enumerate(self.names.pieces):
            digest = hashlib.sha256()
            rows = self.rows[number * PIECE_ROWS : (number + 1) * PIECE_ROWS]
            offsets = np.frombuffer(names.buffers()[1], "<i4")[names.offset :][: len(names) + 1]
            digest.update(np.diff(offsets).astype("<u4").tobytes())
            digest.update(memoryview(names.buffers()[2] or b"")[offsets[0] : offsets[-1]])
            for column in CONTENT:
                digest.update(rows[column].tobytes())
            yield digest.digest()


def mark(key: str, size: int, etag: str) -> int:
    """64 bits of an object as a store lists it; objects are compared and looked up by them."""
    identity = f"{key}\0{size}\0{etag}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little")


def piece_key(home: str, digest: str) -> str:
    return f"{home}/shards/{digest}.parquet"


def write_table(store: Store, home: str, table: ShardTable) -> list[str]:
    """Digests of the pieces, which are their names below `home`."""
    digests = []
    for number, (names, etags) in enumerate(zip(table.names.pieces, table.etags.pieces, strict=True)):
        rows = table.rows[number * PIECE_ROWS : (number + 1) * PIECE_ROWS]
        columns = {"name": names, "etag": etags}
        for column in ROW.names or ():
            columns[column] = _to_arrow(rows[column])
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd")
        data = buffer.getvalue()
        digests.append(hashlib.sha256(data).hexdigest())
        store.write(piece_key(home, digests[-1]), data)
    return digests


def read_table(store: Store, home: str, digests: Sequence[str], num_shards: int) -> ShardTable:
    """Piece by piece, the next one on its way, each checked before it is parsed; DataError names a bad one.

    Holds two pieces of 7 MB, and no second copy of the columns.
    """
    if len(digests) != -(-num_shards // PIECE_ROWS):
        raise DataError(f"{join_url(store.url, home)} has {len(digests)} pieces of {num_shards} shards")
    rows = np.empty(num_shards, ROW)
    names, etags = Strings(), Strings()
    with read_ahead(_read(store, piece_key(home, digest)) for digest in digests) as stored:
        for number, (digest, data) in enumerate(zip(digests, stored, strict=True)):
            key = piece_key(home, digest)
            piece = rows[number * PIECE_ROWS : (number + 1) * PIECE_ROWS]
            if hashlib.sha256(data).hexdigest() != digest:
                raise DataError(f"{join_url(store.url, key)} is {'damaged' if data else 'missing'}")
            # Not pq.read_table, which imports pyarrow.dataset first: 13 MB, 70 ms.
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
            if table.num_rows != len(piece):
                raise DataError(
                    f"{join_url(store.url, key)} has {table.num_rows} rows, expected {len(piece)}"
                )
            for column in ROW.names or ():
                piece[column] = _to_numpy(table[column], ROW[column])
            names.add(_packed(table["name"]))
            etags.add(_packed(table["etag"]))
            del table
            pa.default_memory_pool().release_unused()
    return ShardTable(rows, names, etags)


def _read(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except NotFound:
        return b""


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.dtype.kind != "V":
        return pa.array(np.ascontiguousarray(values))
    kind = pa.binary(values.dtype.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())])


def _to_numpy(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> np.ndarray:
    values = column.combine_chunks()
    if dtype.kind != "V":
        return np.asarray(values.to_numpy(zero_copy_only=False))
    return np.frombuffer(values.buffers()[1], dtype)[values.offset :][: len(values)]


def _packed(column: pa.ChunkedArray) -> pa.Array:
    """Just its bytes: what Parquet's reader leaves is up to twice as large."""
    values = column.combine_chunks().cast(pa.string())
    offsets = np.frombuffer(values.buffers()[1], "<i4")[values.offset :][: len(values) + 1]
    data = bytes(memoryview(values.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    buffers = [None, pa.py_buffer((offsets - offsets[0]).tobytes()), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)
