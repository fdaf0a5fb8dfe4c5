"""The index over plain WebDataset shards: where each sample lies, its label and its digest.

Shards are never rewritten; `_vitscale/` beside them holds

    samples/<shard name>.<digest>.bin   a fixed-width row per sample: any run of samples is one ranged read
    shards/<digest>.parquet             a row per shard, see workers/data/shards.py
    index.json                          format, fingerprint, classes, layout, digests of the pieces; last

A stream checks the digest of a sample's bytes, but that says nothing of a flipped label in the sample's
row. So each row ends in a check of its own, keyed with its shard's sha256 and its place: a damaged row,
or one of another shard or version, is refused without reading any other.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from workers.data.layout import Layout
from workers.data.location import Location, locate
from workers.data.pages import Pages
from workers.data.shards import ShardTable, read_table
from workers.errors import ConfigError, DataError
from workers.storage import NotFound, Store, Truncated, join_url, open_store

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
the first 16 bytes of blake3 of that range."""

STORED = np.dtype([("sample", SAMPLE), ("check", "V8")])
"""A row of a records object: 64 bytes."""

FORMAT = 3
MAX_GAP_ROWS = 1024
"""Unwanted rows between two of a shard that are read through, 64 KB: cheaper than another request."""
FIELDS = {
    "fingerprint": str,
    "classes": list,
    "named": bool,
    "given": bool,
    "image_key": str,
    "label": str,
    "num_shards": int,
    "pieces": list,
}
"""Of index.json. `named`: labels were names, not numbers; `given`: the classes were listed by a person."""


class NewerFormat(DataError):
    """The index was written by a later version; never overwrite it."""


class DatasetIndex:
    """Opening it reads the shard table, never a sample: O(shards), some 200 bytes and 0.5 µs for each."""

    def __init__(self, location: Location, header: dict[str, Any], shards: ShardTable) -> None:
        self.source = location.source
        """The URL that opens this index: `url`, or the brace list that was indexed."""
        self.url = location.root
        """Of the store that shard names are relative to."""
        self.home = location.home
        """Key below `url` of what belongs to the index."""
        self.classes: tuple[str, ...] = tuple(header["classes"])
        self.named: bool = header["named"]
        self.given: bool = header["given"]
        self.image_key: str = header["image_key"]
        self.label: str = header["label"]
        self.shards = shards
        self.num_samples = int(shards.firsts[-1])
        self.num_bytes = int(shards.rows["size"].sum())
        self.id_sum = int(shards.rows["id_sum"].sum(dtype=np.uint64))
        """Over all samples, modulo 2**64; see workers/data/proof.py."""
        self.fingerprint = fingerprint(self.classes, shards)
        """Identifies shards, samples, labels and class names wherever they lie."""

    @classmethod
    def open(cls, url: str) -> Self:
        """DataError if there is no index, or none that can be trusted."""
        location = locate(url)
        store = open_store(location.root)
        header = read_header(store, location)
        again = f"run `vitscale index {url}`"
        try:
            shards = read_table(store, location.home, header["pieces"], header["num_shards"])
        except NotFound:
            raise
        except DataError as error:
            raise DataError(f"{error}; {again}") from None
        index = cls(location, header, shards)
        if index.fingerprint != header["fingerprint"]:
            where = join_url(location.root, location.home, "index.json")
            raise DataError(f"{where} is damaged; {again}")
        return index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DatasetIndex):
            return NotImplemented
        return (self.source, self.fingerprint) == (other.source, other.fingerprint)

    def __hash__(self) -> int:
        return hash((self.source, self.fingerprint))

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds connections and locks."""
        return {name: value for name, value in vars(self).items() if name not in ("_store", "_pages")}

    def check_layout(self, image_key: str | None, label: str | None) -> None:
        """ConfigError if data.image_key or data.label, where given, are not those of the index."""
        wanted = Layout.of(image_key or self.image_key, label or self.label)
        for field, found, expected in (
            ("image_key", self.image_key, wanted.image_key),
            ("label", self.label, wanted.label),
        ):
            if found != expected:
                option = field.replace("_", "-")
                raise ConfigError(
                    f"data.{field} is {expected!r}, but {self.source} was indexed with {found!r}; change it, "
                    f"or run `vitscale index {self.source} --{option} '{expected}'`"
                )

    def locate(self, ordinals: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Shard numbers and rows within the shards of (n,) ordinals in any order; reads nothing."""
        if len(ordinals) and not 0 <= ordinals.min() <= ordinals.max() < self.num_samples:
            raise IndexError(f"samples {ordinals.min()} to {ordinals.max()} of {self.num_samples}")
        firsts = self.shards.firsts
        numbers = np.searchsorted(firsts, ordinals, side="right") - 1
        return numbers.astype(np.int32), ordinals - firsts[numbers]

    def records(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], np.ndarray]:
        """Shard numbers, int32 (count,), and rows, SAMPLE (count,), of the samples from ordinal `start` on.

        One ranged read per shard touched. DataError names a row that is damaged."""
        if start < 0 or count < 0 or start + count > self.num_samples:
            raise IndexError(f"samples {start} to {start + count} of {self.num_samples}")
        return self.fetch_rows(np.arange(start, start + count, dtype=np.int64))

    def fetch_rows(
        self, ordinals: npt.NDArray[np.int64], store: Store | None = None
    ) -> tuple[npt.NDArray[np.int32], np.ndarray]:
        """The same for ascending ordinals, (n,): one ranged read for those of a shard that lie near.

        `store`: another way to what is below `url`, such as one that stops when its reader is closed."""
        numbers, places = self.locate(ordinals)
        rows = np.empty(len(ordinals), SAMPLE)
        apart = (np.diff(numbers) != 0) | (np.diff(places) > MAX_GAP_ROWS)
        for start, stop in _runs(apart, len(ordinals)):
            first = int(places[start])
            count = int(places[stop - 1]) - first + 1
            read = self._read_rows(store or self._store, int(numbers[start]), first, count)
            rows[start:stop] = read[places[start:stop] - first]
        return numbers, rows

    def _read_rows(self, store: Store, number: int, row: int, count: int) -> np.ndarray:
        shard = self.shards[number]
        key, width = records_key(self.home, shard.name, shard.records_sha256), STORED.itemsize
        again = f"run `vitscale index {self.source}`"
        for _ in range(2):  # what the network has damaged comes right the second time
            try:
                data = self._pages.read(store, key, shard.num_samples * width, row * width, count * width)
            except (NotFound, Truncated) as error:
                raise DataError(f"{error}; {again}") from None
            rows, wrong = unpack_rows(data, row, shard.sha256)
            if not len(wrong):
                return rows
            self._pages.forget(key)
        where = join_url(self.url, key)
        raise DataError(f"{where}: row {wrong[0]} is damaged; {again}")

    @functools.cached_property
    def _store(self) -> Store:
        return open_store(self.url)

    @functools.cached_property
    def _pages(self) -> Pages:
        return Pages()


def open_pinned(field: str, url: str, expected: str | None) -> DatasetIndex:
    """ConfigError if it has another fingerprint than `field` of a configuration says; None says any."""
    index = DatasetIndex.open(url)
    if expected not in (None, index.fingerprint):
        raise ConfigError(
            f"{field} is {expected}, but {url} has {index.fingerprint}: the data changed since "
            "the configuration was made, or is other data; restore it, or set the field to null to take "
            "what is there"
        )
    return index


def fingerprint(classes: Sequence[str], shards: ShardTable) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, list(classes)]).encode())
    for piece in shards.content():
        digest.update(piece)
    return digest.hexdigest()


def header_of(index: DatasetIndex, pieces: Sequence[str]) -> bytes:
    """The bytes of index.json."""
    facts = {"num_samples": index.num_samples, "num_shards": len(index.shards), "pieces": list(pieces)}
    values = {name: getattr(index, name) for name in FIELDS if name not in facts}
    return json.dumps({"format": FORMAT, **values, **facts}, indent=1).encode()


def read_header(store: Store, location: Location) -> dict[str, Any]:
    where, again = (
        join_url(location.root, location.home, "index.json"),
        f"run `vitscale index {location.source}`",
    )
    try:
        header = json.loads(store.read(f"{location.home}/index.json"))
        version = int(header["format"])
    except NotFound:
        raise DataError(
            f"{location.source} is not indexed: no {where}; if the address is right and shards are there, "
            f"{again}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{where} is damaged; {again}") from None
    if version > FORMAT:
        raise NewerFormat(f"{where} has format {version}, this version reads {FORMAT}; update vitscale")
    if version < FORMAT:
        raise DataError(f"{where} has the old format {version}; {again}")
    wrong = [name for name, kind in FIELDS.items() if type(header.get(name)) is not kind]
    if wrong:
        raise DataError(f"{where} lacks {', '.join(wrong)}; {again}")
    return dict(header)


def records_key(home: str, shard: str, records_sha256: str) -> str:
    """Named by content, too: a new index never overwrites what an old one points to."""
    return f"{home}/samples/{shard}.{records_sha256[:16]}.bin"


def pack_rows(rows: np.ndarray, sha256: str) -> bytes:
    """A records object: SAMPLE (n,), each with its check, of the shard with that digest."""
    stored = np.empty(len(rows), STORED)
    stored["sample"] = rows
    stored["check"] = _checks(rows, 0, sha256)
    return stored.tobytes()


def unpack_rows(data: bytes, first_row: int, sha256: str) -> tuple[np.ndarray, npt.NDArray[np.int64]]:
    """SAMPLE (n,), and the numbers of the rows that are damaged."""
    stored = np.frombuffer(data, STORED)
    rows = np.ascontiguousarray(stored["sample"])
    return rows, first_row + np.flatnonzero(stored["check"] != _checks(rows, first_row, sha256))


def _runs(apart: npt.NDArray[np.bool_], count: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the stretches of `count` items that `apart`, (count - 1,), parts."""
    if count:
        stops = [*(np.flatnonzero(apart) + 1).tolist(), count]
        yield from zip([0, *stops[:-1]], stops, strict=True)


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
