"""Parquet with the images' bytes in it, as Hugging Face lays it out: a struct {bytes, path}, or binary."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources.columns import IMAGE, LABEL, SPLIT, choose, split_named
from pipelines.sources.files import File, RangedFile
from pipelines.sources.items import SPLITS, Collector, Source, split_in
from workers.errors import ConfigError, DataError

FORM = "cell"
BUFFER = 1 << 20
ROWS_AT_A_TIME = 64


def open_parquet(where: str, size: int, etag: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(io.BufferedReader(RangedFile(where, size, etag), BUFFER))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: no Parquet file, or damaged ({error})") from None


def parquet_source(
    collector: Collector, files: Sequence[File], image_column: str | None, label_column: str | None
) -> Source:
    names: list[str] | None = None
    for number, file in enumerate(files):
        parquet = open_parquet(file.object, file.size, file.etag)
        schema = parquet.schema_arrow
        image = _image_column(file, schema, image_column)
        label = _label_column(file, schema, label_column)
        own = _class_names(schema, label)
        if number and own != names:
            raise DataError(f"{file.object} names other classes than {files[0].object}")
        names = own
        _check_label(file, schema.field(label))
        _collect(collector, file, parquet, image, label, several=len(files) > 1)
    if not len(collector):
        raise DataError(f"{collector.where} has no rows")
    return collector.finish(names)


def _collect(
    collector: Collector, file: File, parquet: pq.ParquetFile, image: str, label: str, *, several: bool
) -> None:
    split_column = next((n for n in parquet.schema_arrow.names if n.lower() == SPLIT), None)
    columns = [label, *([split_column] if split_column else [])]
    folder = file.path.rpartition("/")[0].rpartition("/")[2].lower()
    default = (SPLITS.get(folder) or split_in(file.name)) if several else ""
    row = 0
    for group in range(parquet.num_row_groups):
        values = _read(file, parquet, group, columns)
        labels = values[label].to_pylist()
        splits = values[split_column].to_pylist() if split_column else [default] * len(labels)
        for at, (value, split) in enumerate(zip(labels, splits, strict=True)):
            where = f"{file.path}, row {row}"
            if value is None or value == -1:
                raise DataError(f"{where}: column {label!r} has no label ({value}); leave such files out")
            chosen = split_named(where, str(split)) if split_column else split
            name = f"{file.path}[{row}]"
            collector.add(
                name, value, file.object, file.etag, at, group, f"{FORM} {file.size} {image}", chosen
            )
            row += 1


def cells(items: Sequence[tuple[int, int]], where: str, size: int, etag: str, column: str) -> Iterator[bytes]:
    """The images at ascending (row group, row in it), a few rows in memory at a time.

    An empty one stands for a null."""
    parquet = open_parquet(where, size, etag)
    wanted = iter(items)
    item = next(wanted, None)
    while item is not None:
        group, at = item[0], 0
        for batch in parquet.iter_batches(ROWS_AT_A_TIME, [group], [column], use_threads=False):
            values = batch.column(0)
            while item is not None and item[0] == group and item[1] < at + len(values):
                value = values[item[1] - at].as_py()
                yield (value.get("bytes") if isinstance(value, dict) else value) or b""
                item = next(wanted, None)
            at += len(values)
            if item is None or item[0] != group:
                break
        else:
            if item is not None and item[0] == group:
                raise DataError(f"{where}: row group {group} has no row {item[1]}")


def _read(file: File, parquet: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
    try:
        return parquet.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.object}: row group {group} is damaged ({error})") from None


def _image_column(file: File, schema: pa.Schema, asked: str | None) -> str:
    """The one of Hugging Face's type Image, or of images' type and name."""
    usable = [field.name for field in schema if _holds_images(field.type)]
    if asked is not None and asked in schema.names and asked not in usable:
        raise ConfigError(
            f"--image-column: {file.object}: column {asked!r} is {schema.field(asked).type}, no bytes"
        )
    if asked is None:
        typed = [n for n, kind in _features(schema).items() if kind.get("_type") == "Image" and n in usable]
        if len(typed) == 1 or len(usable) == 1:
            return (typed or usable)[0]
    if not usable:
        raise DataError(f"{file.object} has no column of images' bytes: {', '.join(schema.names)}")
    return choose(file.object, usable, asked, IMAGE, "image")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(
            _is_binary(kind.field(i).type) for i in range(kind.num_fields) if kind.field(i).name == "bytes"
        )
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _label_column(file: File, schema: pa.Schema, asked: str | None) -> str:
    if asked is None:
        typed = [n for n, kind in _features(schema).items() if kind.get("_type") == "ClassLabel"]
        if len(typed) == 1 and typed[0] in schema.names:
            return typed[0]
    return choose(file.object, schema.names, asked, LABEL, "label")


def _check_label(file: File, field: pa.Field) -> None:
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    if not any(is_kind(field.type) for is_kind in texts):
        raise DataError(f"{file.object}: column {field.name!r} is {field.type}; labels are numbers or names")


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    names = _features(schema).get(column, {}).get("names")
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What Hugging Face's own metadata says of the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
