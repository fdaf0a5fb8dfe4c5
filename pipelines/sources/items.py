"""The images of a source: a row each that says where its bytes are, never the bytes; and their classes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import pyarrow as pa

from workers.data.layout import check_classes
from workers.errors import ConfigError, DataError

FILE = "file"
"""Form of an item that is a run of an object's bytes, unmodified; `content` reads the others."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""As people call them, and as they are called here."""
IN_NAME = re.compile(
    r"(?:^|[-_.])(train|training|val|valid|validation|test|t10k)(?=$|[-_.\d])", re.IGNORECASE
)
BATCH = 1 << 16
SHOWN = 10

SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),
        ("label", pa.int32()),
        ("split", pa.large_string()),
        ("object", pa.large_string()),
        ("etag", pa.large_string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("form", pa.large_string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source."""

    name: str
    """Where a person finds it."""
    label: int
    split: str
    """`train`, `val`, `test`; empty where the source does not say."""
    object: str
    """An absolute path or an s3:// URL."""
    etag: str
    offset: int
    """In bytes; of a Parquet cell its row in the row group."""
    size: int
    """In bytes; of a Parquet cell its row group."""
    form: str = FILE


@dataclass(frozen=True, slots=True)
class Source:
    format: str
    items: pa.Table
    """Of SCHEMA, in the source's own order."""
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    """Some of the files that are no JPEG, PNG or WebP by their names."""
    num_ignored: int = 0


@dataclass
class Collector:
    """Gathers items whose labels are names or numbers; 170 bytes each for ImageNet, 370 at the peak."""

    where: str
    """The source, for messages."""
    format: str
    class_map: Mapping[str, int] | None = None
    ignored: list[str] = field(default_factory=list)
    num_ignored: int = 0
    _rows: list[Item] = field(default_factory=list)
    _batches: list[pa.RecordBatch] = field(default_factory=list)
    _codes: dict[str | int, int] = field(default_factory=dict)
    _first: dict[str | int, str] = field(default_factory=dict)

    def add(
        self,
        name: str,
        label: str | int,
        object: str,
        etag: str,
        offset: int,
        size: int,
        form: str = FILE,
        split: str = "",
    ) -> None:
        code = self._codes.setdefault(label, len(self._codes))
        self._first.setdefault(label, name)
        self._rows.append(Item(name, code, split, object, etag, offset, size, form))
        if len(self._rows) == BATCH:
            self._flush()

    def ignore(self, name: str) -> None:
        self.num_ignored += 1
        if len(self.ignored) < SHOWN:
            self.ignored.append(name)

    def __len__(self) -> int:
        return len(self._rows) + sum(len(batch) for batch in self._batches)

    def finish(self, names: Sequence[str] | None = None) -> Source:
        """Labels become numbers. `names` are those of labels that are numbers already."""
        self._flush()
        classes, numbers = self._number(names)
        table = pa.Table.from_batches(self._batches, SCHEMA)
        codes = pa.array([numbers[label] for label in self._codes], pa.int32())
        labels = codes.take(table["label"].combine_chunks()) if len(table) else table["label"]
        table = table.set_column(1, SCHEMA.field("label"), labels)
        return Source(self.format, table, classes, tuple(self.ignored), self.num_ignored)

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*map(astuple, self._rows), strict=True)
            try:
                self._batches.append(
                    pa.record_batch(
                        [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA
                    )
                )
            except UnicodeEncodeError:
                bad = next(row.name for row in self._rows if not _is_utf8(row.name + row.object))
                raise DataError(f"{bad!r}: its name is no UTF-8; rename the file") from None
            self._rows = []

    def _number(self, names: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str | int, int]]:
        if all(isinstance(label, int) for label in self._codes):
            labels = sorted(int(label) for label in self._codes)
            classes = self._named(labels, names)
            return classes, {label: label for label in labels}
        texts = sorted({str(label) for label in self._codes})
        if self.class_map is None:
            numbers = {text: number for number, text in enumerate(texts)}
            return tuple(texts), {label: numbers[str(label)] for label in self._codes}
        for label in self._codes:
            if str(label) not in self.class_map:
                raise DataError(
                    f"{self._first[label]}: its class {str(label)!r} is not in the class map, "
                    f"which has {_some(self.class_map)}"
                )
        return _in_order(self.class_map), {label: self.class_map[str(label)] for label in self._codes}

    def _named(self, labels: Sequence[int], names: Sequence[str] | None) -> tuple[str, ...]:
        """A number means the same wherever the set comes from, so gaps are refused unless meant."""
        if not labels:
            return ()
        if labels[0] < 0:
            raise DataError(f"{self._first[labels[0]]} has the label {labels[0]}; labels start at 0")
        if self.class_map is not None:
            names = _in_order(self.class_map)
        if names is None:
            gap = next((number for number, label in enumerate(labels) if number != label), None)
            if gap is not None:
                raise DataError(
                    f"{self.where}: labels go up to {labels[-1]}, but no image has {gap}; if that is as it "
                    f"should be, name all classes: --class-map FILE, or {_classes_file(self.where)} with "
                    f"`0 airplane` and so on, one a line"
                )
            return tuple(str(label) for label in labels)
        if labels[-1] >= len(names):
            raise DataError(
                f"{self._first[labels[-1]]} has the label {labels[-1]}, but only {len(names)} classes "
                f"are named"
            )
        return tuple(names)


def split_in(name: str) -> str:
    """`train`, `val` or `test` if a file's name says so (train-00000.parquet, photos_test.tar), else ''."""
    found = {match.lower() for match in IN_NAME.findall(Path(name).name)}
    splits = {"test" if word == "t10k" else SPLITS[word] for word in found}
    return splits.pop() if len(splits) == 1 else ""


def parse_label(text: str) -> str | int:
    """`12` is a number, and so is `12.0`, as pandas writes a column in which some are missing; `cat` and
    `007` are names."""
    match = re.fullmatch(r"(0|-?[1-9]\d{0,8})(\.0)?", text)
    return int(match[1]) if match else text


def read_class_map(path: Path) -> dict[str, int]:
    """Names to numbers: JSON as ingest writes it (`{"cat": 0}`), a JSON list, lines `0 cat`, or `cat`."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"class map {path} cannot be read: {error}") from error
    if text.lstrip()[:1] not in ("{", "["):
        lines = text.split("\n") if not text.startswith("0 ") else read_class_lines(path, text)
        names = [line.strip() for line in lines if line.strip()]
        check_classes(names, f"class map {path}")
        return {name: number for number, name in enumerate(names)}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"class map {path} is no JSON: {error}") from error
    if isinstance(values, list):
        values = (
            {name: number for number, name in enumerate(values)} if len(set(values)) == len(values) else {}
        )
    numbers = list(values.values())
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if not values or not whole or sorted(numbers) != list(range(len(numbers))):
        raise ConfigError(
            f"class map {path}: expected distinct names with the numbers 0 to n - 1, "
            f'such as {{"cat": 0, "dog": 1}}'
        )
    return {str(name): number for name, number in values.items()}


def read_class_lines(path: Path | str, text: str) -> list[str]:
    classes: list[str] = []
    for number, line in enumerate(text.splitlines()):
        label, _, name = line.strip().partition(" ")
        if label != str(number) or not name.strip() or name.strip() in classes:
            raise DataError(f"{path}, line {number + 1}: expected `{number} <a new name>`, found {line!r}")
        classes.append(name.strip())
    return classes


def _in_order(class_map: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(class_map, key=class_map.__getitem__))


def _some(names: Mapping[str, int]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def _classes_file(where: str) -> str:
    return where.rpartition("/")[0] + "/classes.txt" if "/" in where else "a classes.txt beside it"


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
