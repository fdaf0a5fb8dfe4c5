"""IDX, the format of MNIST: `X-images-idx3-ubyte[.gz]` with `X-labels-idx1-ubyte[.gz]`."""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.sources.files import File, gunzip, pieces, read_range
from pipelines.sources.items import Collector, Source, split_in
from workers.errors import DataError

IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801
"""Unsigned bytes in three dimensions, and in one."""
NAME = re.compile(r"(images|labels)([-.]idx[13]-ubyte)?(\.gz)?$")
MAX_SIDE = 4096


@dataclass(frozen=True)
class Array:
    """The header of an IDX file that is complete."""

    shape: tuple[int, ...]
    start: int
    """Of its data, in bytes from the start of the content."""
    labels: bytes
    """The data itself, of labels only."""


def idx_source(collector: Collector, files: Sequence[File]) -> Source:
    by_path = {file.path: file for file in files}
    # All files first: that one is cut off matters more than that another is missing.
    images = {path: _read(file) for path, file in by_path.items() if "images" in file.name}
    if not images:
        raise DataError(f"{collector.where} has no IDX file of images (<name>-images-idx3-ubyte)")
    for path, array in images.items():
        file = by_path[path]
        partner = _partner(file, by_path)
        labels = _read(partner)
        if labels.shape[0] != array.shape[0]:
            raise DataError(
                f"{file.object} has {array.shape[0]} images, {partner.object} has {labels.shape[0]} labels"
            )
        count, height, width = array.shape
        form = f"grey {height} {width}" + (f" packed {file.size}" if _is_packed(file) else "")
        for number in range(count):
            at = array.start + number * height * width
            name, label = f"{file.path}[{number}]", labels.labels[number]
            collector.add(name, label, file.object, file.etag, at, height * width, form, split_in(file.name))
    return collector.finish()


def _partner(file: File, by_path: dict[str, File]) -> File:
    """The labels of a file of images."""
    stem = file.path.replace("images", "labels").removesuffix(".gz")
    for old, new in (("idx3", "idx1"), ("", "")):
        for end in ("", ".gz"):
            if found := by_path.get(stem.replace(old, new) + end if old else stem + end):
                return found
    raise DataError(f"{file.object}: there is no {stem.replace('idx3', 'idx1')}[.gz] with its labels")


def _is_packed(file: File) -> bool:
    return read_range(file.object, 0, min(2, file.size), file.etag) == b"\x1f\x8b"


def _read(file: File) -> Array:
    """Reads it whole, so that a truncated one is told at once; keeps labels only."""
    content = gunzip(file) if _is_packed(file) else pieces(file)
    head, length, start, end = b"", 0, 4, 0
    shape: tuple[int, ...] = ()
    labels = bytearray()
    try:
        for piece in content:
            length += len(piece)
            if not shape:
                head += piece
                if len(head) < 16:
                    continue
                shape, start = _header(file, head)
                end = start + _size(shape)
                piece = head[start:]
            if len(shape) == 1:
                labels += piece
            if length > end:
                raise DataError(f"{file.object}: bytes after its {shape[0]} entries; is it an IDX file?")
    except DataError as error:
        if "truncated" in str(error) and len(shape) == 3:
            whole = (length - start) // (shape[1] * shape[2])
            raise DataError(f"{error} (its images 0 to {whole - 1} of {shape[0]} are there)") from None
        raise
    if not shape and len(head) >= 8:
        shape, start = _header(file, head)
        end, labels = start + _size(shape), bytearray(head[start:])
    if not shape or length < end:
        raise DataError(f"{file.object}: truncated at byte {length} of {end or 'its header'}; copy it again")
    return Array(shape, start, bytes(labels))


def _header(file: File, head: bytes) -> tuple[tuple[int, ...], int]:
    magic = int.from_bytes(head[:4], "big")
    wanted = IMAGES_MAGIC if "images" in file.name else LABELS_MAGIC
    if magic != wanted:
        raise DataError(
            f"{file.object}: starts with {magic:#010x}, expected {wanted:#010x}: no such IDX file"
        )
    rank = magic & 0xFF
    shape = struct.unpack(f">{rank}I", head[4 : 4 + 4 * rank])
    if rank == 3 and not (0 < shape[1] <= MAX_SIDE and 0 < shape[2] <= MAX_SIDE):
        raise DataError(f"{file.object}: images of {shape[1]} x {shape[2]} pixels")
    return shape, 4 + 4 * rank


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
