"""CSV, TSV or JSON lines that name image files and their labels, and the images beside them.

Paths are relative to the table's folder, absolute, or s3:// URLs; what is not there may be in a tar there.
"""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.sources.columns import CLASS_NAME, IMAGE, LABEL, SPLIT, choose, split_named
from pipelines.sources.files import File, RangedFile, find, is_image, is_remote, list_files
from pipelines.sources.items import SHOWN, Collector, Source, parse_label, split_in
from pipelines.sources.tars import members
from workers.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
BUFFER = 1 << 20

Row = tuple[int, Mapping[str, Any]]
"""A line's number and its values."""
Place = tuple[str, str, int, int]
"""Object, etag, offset and size."""


@dataclass
class Columns:
    image: str
    label: str
    split: str | None
    name: str | None
    """Of a column with the names of numbered labels."""


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLES)


def table_source(
    collector: Collector, files: Sequence[File], image_column: str | None, label_column: str | None
) -> Source:
    names: dict[int, set[str]] = {}
    for file in files:
        places = Places(file)
        missing: list[str] = []
        columns: Columns | None = None
        for line, row in _rows(file):
            where = f"{file.object}, line {line}"
            columns = columns or _columns(file, list(row), image_column, label_column)
            path, label = _text(where, row, columns.image), _label(where, row, columns.label)
            split = split_named(where, str(row[columns.split])) if columns.split else ""
            split = split or (split_in(file.name) if len(files) > 1 else "")
            if columns.name and isinstance(label, int):
                names.setdefault(label, set()).add(str(row.get(columns.name)))
            place = places.find(path)
            if place is None:
                missing.append(f"line {line}: {path}")
            else:
                collector.add(path, label, *place, split=split)
        if missing:
            shown = "\n  ".join(missing[:SHOWN])
            more = f"\n  and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise DataError(f"{file.object} names {len(missing)} files that are not there:\n  {shown}{more}")
    if not len(collector):
        raise DataError(f"{collector.where} has no rows")
    return collector.finish(_names(names))


def _names(names: Mapping[int, set[str]]) -> list[str] | None:
    """Of the labels 0 to n - 1, if each has just one and no two the same."""
    numbers = sorted(names)
    found = [next(iter(names[number])) for number in numbers if len(names[number]) == 1]
    complete = numbers == list(range(len(numbers))) and len(set(found)) == len(numbers)
    return found if complete and found and all(found) else None


def _columns(file: File, columns: list[str], image: str | None, label: str | None) -> Columns:
    chosen = choose(file.object, columns, label, LABEL, "label")
    split = next((name for name in columns if name.lower() == SPLIT), None)
    name = next((c for c in columns if c.lower() in CLASS_NAME and c != chosen), None)
    return Columns(choose(file.object, columns, image, IMAGE, "image"), chosen, split, name)


def _rows(file: File) -> Iterator[Row]:
    raw = io.BufferedReader(RangedFile(file.object, file.size, file.etag), BUFFER)
    with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        try:
            if file.name.lower().endswith((".csv", ".tsv")):
                yield from _csv(file, text)
            else:
                yield from _json_lines(file, text)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.object}: no UTF-8 text ({error.reason} near byte {error.start})"
            ) from None


def _csv(file: File, text: io.TextIOWrapper) -> Iterator[Row]:
    head = text.readline()
    text.seek(0)
    counts = {delimiter: head.count(delimiter) for delimiter in "\t;,"}
    reader = csv.reader(text, delimiter=max(counts, key=lambda name: (counts[name], name == ",")))
    try:
        header = next(reader, [])
        if len(header) < 2 or len(set(header)) < len(header):
            raise DataError(f"{file.object}: its first line should name two or more distinct columns")
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(
                    f"{file.object}, line {reader.line_num}: {len(values)} values, the header "
                    f"has {len(header)}"
                )
            if values:
                yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{file.object}, line {reader.line_num}: {error}") from None


def _json_lines(file: File, text: io.TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file.object}, line {number}: no JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{file.object}, line {number}: expected an object such as {{...}}")
        yield number, values


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value or "\0" in value:
        raise DataError(f"{where}: column {column!r} has {value!r}, expected a file's path")
    return value


def _label(where: str, row: Mapping[str, Any], column: str) -> str | int:
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as pandas writes numbers of a column in which some are missing
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: column {column!r} has {value!r}, expected a number or a name")
    return parse_label(value.strip()) if isinstance(value, str) else value


class Places:
    """Where the images that a table names are. S3 is listed once per folder, not asked for each file."""

    def __init__(self, table: File) -> None:
        self._folder = table.object.rpartition("/")[0]
        self._listed: dict[str, dict[str, File]] = {}
        self._in_tars: dict[str, Place] | None = None

    def find(self, path: str) -> Place | None:
        if is_remote(path):
            file = self._look_up(path)
        elif is_remote(self._folder):
            key = posixpath.normpath(posixpath.join(self._folder.removeprefix("s3://"), path))
            file = self._look_up(f"s3://{key}")
        else:
            file = find(os.path.normpath(Path(self._folder) / path))
        if file:
            return file.object, file.etag, 0, file.size
        return self._members().get(path)

    def _look_up(self, where: str) -> File | None:
        # By the folder that the table's own is in, if it is: one listing serves a tree of classes.
        inside = where.startswith(self._folder + "/")
        folder = self._folder if inside else where.rpartition("/")[0]
        if folder not in self._listed:
            self._listed[folder] = {file.object: file for file in list_files(folder)}
        return self._listed[folder].get(where)

    def _members(self) -> dict[str, Place]:
        if self._in_tars is None:
            self._in_tars = {}
            for file in self._tars():
                for member in members(file):
                    if member.is_file and is_image(member.name):
                        place = (file.object, file.etag, member.data_offset, member.size)
                        self._in_tars[member.name.removeprefix("./")] = place
        return self._in_tars

    def _tars(self) -> list[File]:
        if is_remote(self._folder):
            return [f for f in list_files(self._folder) if f.path.endswith(".tar") and "/" not in f.path]
        found = [find(str(path)) for path in sorted(Path(self._folder).glob("*.tar"))]
        return [file for file in found if file]
