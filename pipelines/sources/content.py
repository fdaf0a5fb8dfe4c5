"""The image file that an item stands for: a run of bytes, a Parquet cell, or pixels made a lossless PNG."""

import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from pipelines.sources import digits, parquet
from pipelines.sources.files import read_range, read_unpacked
from pipelines.sources.items import FILE, Item
from pipelines.sources.tars import PACKED
from workers.errors import DataError


def is_ranged(item: Item) -> bool:
    """Whether its bytes can be read, again and in any order, without what lies before them."""
    return item.form == FILE


def contents(items: Sequence[Item]) -> Iterator[bytes]:
    """Of items that are not ranged, in their order, one at a time in memory."""
    for _, same in itertools.groupby(items, key=lambda item: (item.object, item.form)):
        run = list(same)
        kind, *words = run[0].form.split(" ")
        if kind == parquet.FORM:
            size, column = int(words[0]), " ".join(words[1:])
            rows = [(item.size, item.offset) for item in run]
            yield from parquet.cells(rows, run[0].object, size, run[0].etag, column)
        else:
            for item in run:
                yield _content(item, kind, words)


def _content(item: Item, kind: str, words: Sequence[str]) -> bytes:
    if kind == digits.FORM:
        return to_png(digits.digit(item.offset))
    if kind == PACKED:
        return read_unpacked(item.object, int(words[0]), item.etag, item.offset, item.size)
    height, width = int(words[0]), int(words[1])
    if words[2:]:
        data = read_unpacked(item.object, int(words[3]), item.etag, item.offset, item.size)
    else:
        data = read_range(item.object, item.offset, item.size, item.etag)
    pixels = np.frombuffer(data, np.uint8)
    if kind == "grey":
        return to_png(pixels.reshape(height, width))
    if kind == "planes":
        return to_png(pixels.reshape(3, height, width).transpose(1, 2, 0))
    raise DataError(f"{item.name}: unknown form {item.form!r}; was it listed by a newer version?")


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3). Stored, not deflated: what deflate gives differs between versions of zlib,
    and so would every digest."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
