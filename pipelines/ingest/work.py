"""Where an ingest keeps what it is at: its marker, and the tables of its phases, below the destination.

    _vitscale/ingest.json                     says first that all here is ours, last that it is complete
    _vitscale/ingest/items.parquet            where each image went
    _vitscale/ingest/<listing>/listed/        the source's images, some hundreds in each table
    _vitscale/ingest/<listing>/examined/      the same with digests and what is wrong with them
    _vitscale/ingest/<listing>/unpacked/      images that a compressed source does not give in any order
    _vitscale/ingest/<listing>/<plan>/        a table per shard, plan.json (written last), records of shards

Each is written whole and once, so whatever is there counts. The folders are named after the digests of what
they are about: what a forgotten process of an earlier attempt still writes never mixes with ours.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.errors import ConfigError, DataError
from workers.storage import NotFound, Store, join_url, open_store

FORMAT = 2
MARKER = "_vitscale/ingest.json"
FOLDER = "_vitscale/ingest"
ITEMS = f"{FOLDER}/items.parquet"
CLASSES = "classes.json"
SPLIT_NAMES = ("train", "val", "test")


@dataclass(frozen=True)
class Marker:
    listing: str
    """Digest of the list of images with their sizes and versions: the source is as it was."""
    source: str
    """Digest of their contents and labels, known when all is done: the same images elsewhere count too."""
    options: dict[str, Any]
    report: dict[str, Any] | None
    """None until all is done."""

    def to_bytes(self) -> bytes:
        return json.dumps({"format": FORMAT, **vars(self)}, indent=1).encode()


def read_marker(store: Store) -> Marker | None:
    """None if nothing is there; ConfigError if something is that no ingest left."""
    try:
        values = json.loads(store.read(MARKER))
        if not isinstance(values, dict) or "format" not in values:
            raise ValueError("no marker")
        if values.pop("format") != FORMAT:
            raise ConfigError(
                f"{store.url} was ingested by another version of vitscale; choose another destination"
            )
        return Marker(**values)
    except NotFound:
        if found := next(iter(store.list()), None):
            raise ConfigError(
                f"{store.url} is not empty (it holds {found.key}) and no ingest wrote it; "
                f"choose another destination"
            ) from None
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{join_url(store.url, MARKER)} is damaged; choose another destination") from None


class Work:
    """The tables of one ingest."""

    def __init__(self, url: str, listing: str, options: dict[str, Any]) -> None:
        self.store = open_store(url)
        self.url = url
        self.root = f"{FOLDER}/{listing[:16]}"
        plan = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
        self.plan = f"{self.root}/{plan}"

    def begin(self, marker: Marker, last: Marker | None) -> None:
        """All below the destination is ours now. What an interrupted ingest of the same images found out
        stays, and so do its shards; of other images nothing does."""
        if last is None or (last.listing, last.options) != (marker.listing, marker.options):
            self.store.write(MARKER, marker.to_bytes())
        if last is None or last.listing != marker.listing:
            for info in list(self.store.list()):
                if info.key != MARKER:
                    self.store.delete(info.key)

    def tidy(self, shards: Collection[str]) -> None:
        """Only planned shards stay; an index that may know of others goes before those do."""
        for split in SPLIT_NAMES:
            found = {info.key for info in self.store.list(f"{split}/")}
            index = {key for key in found if key.startswith(f"{split}/_vitscale/")}
            others = found - index - set(shards)
            if others or not found & set(shards):
                for key in [*sorted(index), *sorted(others)]:
                    self.store.delete(key)

    def end(self, marker: Marker) -> None:
        self.store.write(MARKER, marker.to_bytes())
        clean(self.store)

    def has(self, folder: str) -> set[str]:
        """Names in a folder of the work."""
        prefix = f"{folder}/"
        return {info.key.removeprefix(prefix) for info in self.store.list(prefix)}


def clean(store: Store) -> None:
    """Of a complete ingest only the marker and the table of items stay."""
    for info in list(store.list(f"{FOLDER}/")):
        if info.key != ITEMS:
            store.delete(info.key)


def to_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_bytes(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data), use_threads=False)


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=4096):
        yield from batch.to_pylist()
