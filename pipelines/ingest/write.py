"""One shard: its images read in the order of their places, written in the plan's, uploaded, recorded."""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.ingest.ahead import map_ahead
from pipelines.ingest.encode import Encoding
from pipelines.ingest.examine import THREADS, digest_of
from pipelines.ingest.ranges import Placed, read_run, runs
from pipelines.ingest.work import Work, from_bytes, rows_of
from pipelines.sources.items import SCHEMA, Item
from workers.errors import DataError

OWNER = {"user": "vitscale", "group": "vitscale", "mtime": 0}


class HashingFile:
    """A file that is only written to, and the digest of that."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def write_shard(work: Work, name: str, encoding: Encoding) -> int:
    """The number of images; the shard is `<split>/<name>`, the record of it written after it."""
    rows = list(rows_of(from_bytes(work.store.read(f"{work.plan}/shards/{name}.parquet"))))
    key = f"{name.partition('-')[0]}/{name}"
    with tempfile.TemporaryDirectory(prefix="vitscale-ingest-") as folder:
        path = Path(folder) / "shard.tar"
        try:
            # Pillow warns of oddities that it reads all the same.
            with (
                warnings.catch_warnings(action="ignore"),
                path.open("wb") as file,
                (Path(folder) / "spool").open("w+b") as spool,
            ):
                tar = HashingFile(file)
                _fill(tar, spool, rows, encoding)
        except OSError as error:
            raise DataError(f"cannot write {key} by way of {path}: {error}") from error
        work.store.upload(key, path)
    record = {"size": tar.size, "sha256": tar.sha256.hexdigest(), "etag": work.store.head(key).etag}
    work.store.write(f"{work.plan}/written/{name}.json", json.dumps(record).encode())
    return len(rows)


def _fill(tar: HashingFile, spool: BinaryIO, rows: Sequence[Mapping[str, Any]], encoding: Encoding) -> None:
    """What comes before its turn waits in `spool`, so memory holds a few images however large the shard."""
    waiting: dict[int, tuple[int, int, str]] = {}
    due = 0
    # Here, because it imports torch, 200 MB and 2 s that processes which only examine can do without.
    from webdataset import TarWriter

    with TarWriter(tar, encoder=False, **OWNER) as writer:

        def write(place: int, data: bytes, extension: str) -> None:
            row = rows[place]
            writer.write({"__key__": row["key"], extension: data, "cls": str(row["label"]).encode()})

        for place, data, extension in _images(rows, encoding):
            if place == due:
                write(place, data, extension)
                due += 1
            else:
                waiting[place] = (spool.tell(), len(data), extension)
                spool.write(data)
            while due in waiting:
                start, size, found = waiting.pop(due)
                spool.seek(start)
                write(due, spool.read(size), found)
                spool.seek(0, 2)
                due += 1


def _images(rows: Sequence[Mapping[str, Any]], encoding: Encoding) -> Iterator[tuple[int, bytes, str]]:
    items = [Item(**{name: row[name] for name in SCHEMA.names}) for row in rows]

    def make(run: Sequence[Placed]) -> list[tuple[int, bytes, str]]:
        made = []
        for place, item, data in read_run(run):
            row = rows[place]
            if digest_of(data) != row["digest"]:
                raise DataError(f"{item.name} changed while it was ingested; ingest again")
            made.append((place, *encoding.encode(data, row["width"], row["height"], row["extension"])))
        return made

    for images in map_ahead(make, runs(items), threads=THREADS):
        yield from images
