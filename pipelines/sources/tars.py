"""Tars: WebDataset shards with .cls, .txt or .json labels, and those with members `<name>_<label>.jpg`."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.sources.files import (
    IMAGES,
    PIECE_BYTES,
    File,
    find,
    is_image,
    is_remote,
    pieces,
    read_whole,
    unpacked,
)
from pipelines.sources.items import FILE, SPLITS, Collector, Source, parse_label, read_class_lines, split_in
from workers.data.tar import Member, split_name, walk
from workers.errors import DataError

LABELLED = re.compile(r"_(\d{1,9})\.[a-z]+$", re.IGNORECASE)
LABEL_FILES = ("cls", "json", "txt")
"""Where a WebDataset sample may have its label, in the order in which they are believed."""
JSON_FIELDS = ("label", "class", "category", "target", "cls")
PACKED = "packed"
"""Form of an item that is a run of bytes of a compressed archive's content."""
AHEAD = 4
"""Archives that are listed at a time; what is waited for is S3."""

Found = tuple[str, str | int, int, int]
"""Name, label, offset and size of an image."""


def is_packed(file: File) -> bool:
    return file.name.endswith((".tar.gz", ".tgz"))


def tar_source(collector: Collector, files: Sequence[File], kind: str, field: str | None) -> Source:
    """`kind` is `wds` or `tar`, `field` that of a .json label."""

    def read(file: File) -> list[Found]:
        found = _samples(file, field) if kind == "wds" else _named(file)
        return list(found)

    with ThreadPoolExecutor(AHEAD) as pool:
        for start in range(0, len(files), AHEAD):
            batch = files[start : start + AHEAD]
            for file, found in zip(batch, pool.map(read, batch), strict=True):
                _collect(collector, file, found, several=len(files) > 1)
    if not len(collector):
        raise DataError(f"{collector.where} holds no images ({', '.join(IMAGES)})")
    return collector.finish(_class_names(files[0]))


def _collect(collector: Collector, file: File, found: Iterable[Found], *, several: bool) -> None:
    folder = file.path.rpartition("/")[0].rpartition("/")[2].lower()
    split = SPLITS.get(folder, "") or split_in(file.name)
    if not several:
        split = ""  # one archive alone is the whole set, whatever it is called
    form = f"{PACKED} {file.size}" if is_packed(file) else FILE
    for name, label, offset, size in found:
        shown = f"{file.path}/{name}" if several else name
        collector.add(shown, label, file.object, file.etag, offset, size, form, split)


def members(file: File) -> Iterator[Member]:
    """Of a tar, or of a tar inside a gzip file; offsets are those of the unpacked archive."""
    return walk(file.name, _content(file) if is_packed(file) else pieces(file))


def _content(file: File) -> Iterator[bytes]:
    content, at = unpacked(file.object, file.size, file.etag), 0
    while piece := content.read(at, PIECE_BYTES):
        yield piece
        at += len(piece)


def tar_kind(file: File) -> str:
    """`wds` if the first image's name has a label file beside it, else `tar`."""
    names: list[str] = []
    for member in members(file):
        if member.is_file:
            names.append(member.name)
        keys = [split_name(name) for name in names]
        images = {parts[0] for parts, name in zip(keys, names, strict=True) if parts and is_image(name)}
        labels = {parts[0] for parts in keys if parts and parts[1] in LABEL_FILES}
        if images & labels:
            return "wds"
        if len(names) > 16:
            break
    return "tar"


def _named(file: File) -> Iterator[Found]:
    for member in members(file):
        if not member.is_file or not is_image(member.name) or _is_hidden(member.name):
            continue
        match = LABELLED.search(member.name)
        if not match:
            raise DataError(
                f"{file.name}: the name of {member.name!r} ends in no label, expected <name>_<label>.jpg, or "
                f"WebDataset samples with a .cls, .json or .txt file each"
            )
        yield member.name, int(match[1]), member.data_offset, member.size


def _samples(file: File, field: str | None) -> Iterator[Found]:
    """Files of one key, which stand in a row."""
    key, files = "", dict[str, Member]()
    for member in members(file):
        parts = split_name(member.name) if member.is_file else None
        if parts is None:
            continue
        if parts[0] != key:
            yield from _sample(file, key, files, field)
            key, files = parts[0], {}
        files[parts[1]] = member
    yield from _sample(file, key, files, field)


def _sample(file: File, key: str, files: dict[str, Member], field: str | None) -> Iterator[Found]:
    images = [member for member in files.values() if is_image(member.name)]
    if not images:
        return
    if len(images) > 1:
        raise DataError(f"{file.name}: sample {key!r} has {len(images)} images, expected one")
    extension = next((name for name in LABEL_FILES if name in files), None)
    if extension is None:
        raise DataError(
            f"{file.name}: sample {key!r} has no label, expected a .cls, .json or .txt file; its extensions "
            f"are {', '.join(files)}"
        )
    label = _label(f"{file.name}: {files[extension].name}", extension, files[extension].data, field)
    yield images[0].name, label, images[0].data_offset, images[0].size


def _label(where: str, extension: str, data: bytes, field: str | None) -> str | int:
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"{where}: the label is no UTF-8 text") from None
    if extension == "json":
        try:
            values = json.loads(text)
        except ValueError:
            raise DataError(f"{where} is no JSON") from None
        if isinstance(values, dict):
            name = field or next((name for name in JSON_FIELDS if name in values), None)
            if name not in values:
                raise DataError(f"{where} has no {name or 'label'!r}, only {', '.join(values) or 'nothing'}")
            values = values[name]
        if isinstance(values, bool) or not isinstance(values, int | str):
            raise DataError(f"{where}: the label is {values!r}, expected a number or a name")
        return values
    if not text or "\n" in text or len(text) > 200:
        raise DataError(f"{where}: the label is {text[:50]!r}, expected a number or a name")
    return parse_label(text)


def _class_names(file: File) -> list[str] | None:
    """Of a `classes.txt` beside the first archive: `0 airplane` on each line."""
    beside = file.object.rpartition("/")[0] + "/classes.txt"
    found = find(beside)
    if found is None:
        return None
    name = beside if is_remote(beside) else str(Path(beside))
    return read_class_lines(name, read_whole(found).decode("utf-8", "replace"))


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")
