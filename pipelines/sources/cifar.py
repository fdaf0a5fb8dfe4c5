"""CIFAR-10 and CIFAR-100 as their authors distribute them: Python batches or binary, packed or a folder."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.sources.files import File, read_whole
from pipelines.sources.inert_pickle import Array, read_batch
from pipelines.sources.items import Collector, Source
from pipelines.sources.tars import is_packed, members
from workers.errors import ConfigError, DataError

PIXELS = 3 * 32 * 32
"""Bytes of an image: its red plane, then the green, then the blue one."""
MAX_BATCH_BYTES = 256 << 20
"""CIFAR-100's training batch has 155 MB; one batch at a time is in memory."""
PYTHON_BATCH = re.compile(r"(^|/)(data_batch_\d|test_batch|train|test)$")
BINARY_BATCH = re.compile(r"(^|/)(data_batch_\d|test_batch|train|test)\.bin$")
META = re.compile(
    r"(^|/)(batches\.meta|meta|batches\.meta\.txt|fine_label_names\.txt|coarse_label_names\.txt)$"
)
LABELS = {"fine": ("fine_labels", "labels"), "coarse": ("coarse_labels",)}
NAMES = {"fine": ("fine_label_names", "label_names"), "coarse": ("coarse_label_names",)}


@dataclass(frozen=True)
class Part:
    """A file, inside an archive or by itself."""

    path: str
    object: str
    etag: str
    start: int
    """Of its bytes, in the object's content."""
    packed: str
    """Added to the form of items of a compressed archive."""
    read: Callable[[], bytes]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def is_cifar(path: str) -> bool:
    """Of a file in an archive or a folder: is its path one of CIFAR's own?"""
    return (
        re.search(r"(^|/)(data_batch_1(\.bin)?|batches\.meta|cifar-100-(python|binary)/.+)$", path)
        is not None
    )


def cifar_source(collector: Collector, files: Sequence[File], label: str | None) -> Source:
    """`label` is `fine` or `coarse`, of CIFAR-100."""
    which = (label or "fine").removesuffix("_labels").removesuffix("_label")
    if which not in LABELS:
        raise ConfigError(f"--label-column {label}: CIFAR has `fine` and, as CIFAR-100, `coarse`")
    names: list[str] | None = None
    for part in _parts(files):
        if META.search(part.path):
            names = _names(part, which) or names
        elif BINARY_BATCH.search(part.path):
            _binary(collector, part, which)
        elif PYTHON_BATCH.search(part.path):
            _python(collector, part, which)
    if not len(collector):
        raise DataError(f"{collector.where}: no batches of CIFAR (data_batch_1, train, test.bin, ...)")
    return collector.finish(names)


def _parts(files: Sequence[File]) -> Iterator[Part]:
    wanted = [file for file in files if any(p.search(file.path) for p in (META, PYTHON_BATCH, BINARY_BATCH))]
    yield from (_plain_part(file) for file in wanted)
    for file in files:
        if file in wanted or not file.name.endswith((".tar", ".tar.gz", ".tgz")):
            continue
        packed = f" packed {file.size}" if is_packed(file) else ""
        for member in members(file):
            if member.is_file:
                read = functools.partial(bytes, member.data)
                yield Part(member.name, file.object, file.etag, member.data_offset, packed, read)


def _plain_part(file: File) -> Part:
    return Part(file.path, file.object, file.etag, 0, "", lambda: read_whole(file, MAX_BATCH_BYTES))


def _names(part: Part, which: str) -> list[str] | None:
    data = part.read()
    if part.name.endswith(".txt"):
        wanted = part.name in ("batches.meta.txt", f"{which}_label_names.txt")
        return data.decode("utf-8", "replace").split() if wanted else None
    values = read_batch(part.path, data)
    return next((values[name] for name in NAMES[which] if isinstance(values.get(name), list)), None)


def _split(part: Part) -> str:
    return "test" if part.name.startswith("test") else "train"


def _python(collector: Collector, part: Part, which: str) -> None:
    values = read_batch(part.path, part.read())
    labels: Any = next((values[name] for name in LABELS[which] if name in values), None)
    array, files = values.get("data"), values.get("filenames")
    if not isinstance(array, Array) or array.shape[1:] != (PIXELS,) or not isinstance(labels, list):
        raise DataError(f"{part.path}: no batch of CIFAR: expected `data` of n x {PIXELS} and {which} labels")
    if len(labels) != array.shape[0] or not all(type(label) is int for label in labels):
        raise DataError(
            f"{part.path}: {array.shape[0]} images, {len(labels)} labels, or labels of other kinds"
        )
    named = files if isinstance(files, list) and len(files) == len(labels) else None
    offsets = (array.offset + number * PIXELS for number in range(len(labels)))
    names = (f"{part.path}[{n}]" + (f" {named[n]}" if named else "") for n in range(len(labels)))
    _add(collector, part, zip(names, labels, offsets, strict=True))


def _binary(collector: Collector, part: Part, which: str) -> None:
    """A byte of label, or two of CIFAR-100 (coarse, fine), before each image."""
    data = part.read()
    width = (2 if part.name in ("train.bin", "test.bin") else 1) + PIXELS
    if len(data) % width:
        whole = len(data) // width
        raise DataError(
            f"{part.path}: truncated at byte {len(data)}, inside image {whole} ({width} bytes each); "
            f"copy it again"
        )
    if which == "coarse" and width == 1 + PIXELS:
        raise ConfigError("--label-column coarse: CIFAR-10 has no coarse labels")
    at = 0 if which == "coarse" else width - PIXELS - 1
    labels = data[at::width]
    offsets = (number * width + width - PIXELS for number in range(len(labels)))
    names = (f"{part.path}[{number}]" for number in range(len(labels)))
    _add(collector, part, zip(names, labels, offsets, strict=True))


def _add(collector: Collector, part: Part, rows: Iterable[tuple[str, int, int]]) -> None:
    form, split = f"planes 32 32{part.packed}", _split(part)
    for name, label, offset in rows:
        collector.add(name, label, part.object, part.etag, part.start + offset, PIXELS, form, split)
