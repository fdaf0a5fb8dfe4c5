"""The first look at each image: its digest, its size, and whether it can be decoded whole."""

import hashlib
import io
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from pipelines.ingest.ahead import map_ahead
from pipelines.ingest.ranges import Placed, read_run, runs
from pipelines.ingest.work import Work, from_bytes, rows_of, to_bytes
from pipelines.sources.content import contents, is_ranged
from pipelines.sources.files import object_of
from pipelines.sources.items import FILE, SCHEMA, Item
from workers.storage import join_url

CHUNK = 512
"""Images that are examined as one task, and found out once."""
THREADS = 4
"""In each process: what they wait for is the source."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""By what the bytes are, whatever the file is called."""
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(SyntaxError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow's decoders raise on damaged files."""
FOUND = pa.schema(
    [
        ("digest", pa.binary(16)),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("extension", pa.large_string()),
        ("problem", pa.large_string()),
    ]
)


class Found(NamedTuple):
    digest: bytes
    """blake2b-16 of the image's bytes: the first half decides the split, the second the order."""
    bytes: int
    width: int = 0
    height: int = 0
    extension: str = ""
    problem: str = ""
    """Why it cannot be decoded."""


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def chunks(table: pa.Table) -> Iterator[pa.Table]:
    """Of about CHUNK images; never part of a Parquet row group, which would be read for each."""
    groups = table["size"].to_numpy()
    changes = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    is_cell = np.array([form.startswith("cell") for form in table["form"].unique().to_pylist()])
    start = 0
    while start < len(table):
        end = min(start + CHUNK, len(table))
        if is_cell.any():
            later = np.searchsorted(changes, end)
            end = int(changes[later]) if later < len(changes) else len(table)
        yield table.slice(start, end - start)
        start = end


def examine_chunk(work: Work, number: int) -> int:
    """The number of images; the result is `examined/<number>`."""
    key = f"{number:06d}.parquet"
    table = from_bytes(work.store.read(f"{work.root}/listed/{key}"))
    items = [Item(**row) for row in rows_of(table)]
    ranged = all(is_ranged(item) for item in items)
    if ranged:
        found = examine(items, decode=True)
    else:
        with tempfile.TemporaryDirectory(prefix="vitscale-ingest-") as folder:
            path = Path(folder) / "images"
            with path.open("wb") as spool:
                found = examine(items, decode=True, spool=spool)
            table = _unpacked(work, number, path, table, found)
    columns = [
        pa.array(values, field.type) for values, field in zip(zip(*found, strict=True), FOUND, strict=True)
    ]
    for field, column in zip(FOUND, columns, strict=True):
        table = table.append_column(field, column)
    work.store.write(f"{work.root}/examined/{key}", to_bytes(table))
    return len(items)


def _unpacked(work: Work, number: int, path: Path, table: pa.Table, found: Sequence[Found]) -> pa.Table:
    """Items as what they are in a new object beside: runs of bytes, so that shards can mix them."""
    key = f"{work.root}/unpacked/{number:06d}"
    work.store.upload(key, path)
    ends = np.cumsum([image.bytes for image in found])
    sizes = np.array([image.bytes for image in found], np.int64)
    columns = {
        "object": pa.array([object_of(join_url(work.url, key))] * len(found), SCHEMA.field("object").type),
        "etag": pa.array([work.store.head(key).etag] * len(found), SCHEMA.field("etag").type),
        "offset": pa.array(ends - sizes),
        "size": pa.array(sizes),
        "form": pa.array([FILE] * len(found), SCHEMA.field("form").type),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), column)
    return table


def examine(items: Sequence[Item], *, decode: bool, spool: BinaryIO | None = None) -> list[Found]:
    """Of each item; their bytes go to `spool`, too, if there is one."""
    # Pillow warns of oddities that it reads all the same; too many pixels are refused in _decode.
    with warnings.catch_warnings(action="ignore"):
        if all(is_ranged(item) for item in items):
            return _examine_ranged(items, decode)
        found = []

        def look(data: bytes) -> tuple[bytes, Found]:
            return data, examine_one(data, decode=decode)

        for data, image in map_ahead(look, contents(items), threads=THREADS):
            if spool:
                spool.write(data)
            found.append(image)
        return found


def _examine_ranged(items: Sequence[Item], decode: bool) -> list[Found]:
    def look(run: Sequence[Placed]) -> list[tuple[int, Found]]:
        return [(place, examine_one(data, decode=decode)) for place, _, data in read_run(run)]

    found: dict[int, Found] = {}
    for images in map_ahead(look, runs(items), threads=THREADS):
        found.update(images)
    return [found[place] for place in range(len(items))]


def examine_one(data: bytes, *, decode: bool) -> Found:
    digest, problem = digest_of(data), ""
    try:
        if decode:
            return Found(digest, len(data), *_decode(data))
    except UnidentifiedImageError:
        problem = "not a JPEG, PNG or WebP image"
    except UNREADABLE as error:
        problem = f"{type(error).__name__}: {error}"
    return Found(digest, len(data), problem=problem)


def _decode(data: bytes) -> tuple[int, int, str]:
    """Width, height and extension; whatever Pillow raises if these bytes are not a whole image."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        image.load()
        return image.width, image.height, EXTENSIONS[image.format or ""]
