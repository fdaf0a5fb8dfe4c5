"""Which image goes where: splits, duplicates, order and shards, decided once, before any shard is written."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.ingest.encode import Encoding
from pipelines.ingest.work import ITEMS, SPLIT_NAMES, Work, to_bytes
from workers.errors import ConfigError, DataError

MIN_SHARDS = 4
"""Of a split that has as many images: readers share out shards."""
SHOWN = 10
"""Images that an error lists."""
KEPT = 1000
"""Lines of each kind that the report keeps."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlanOptions:
    """What decides which image goes where, with the encoding all that changes a shard's bytes."""

    validation: float = 0.2
    shard_bytes: int = 256 << 20
    skip_unreadable: bool = False
    drop_duplicates: bool = False
    test_as_validation: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation: expected a share between 0 and 1, got {self.validation}")
        if self.shard_bytes <= 0:
            raise ConfigError(f"shard_bytes: expected a positive number, got {self.shard_bytes}")


@dataclass
class Plan:
    shards: dict[str, list[str]]
    """Names of each split's."""
    source: str
    """Digest of all images and labels, in whatever order and place they were found."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Fields of the report that are known by now."""
    codecs: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @property
    def keys(self) -> list[str]:
        return [f"{split}/{name}" for split, names in self.shards.items() for name in names]


def make_plan(
    work: Work,
    table: pa.Table,
    classes: Sequence[str],
    options: PlanOptions,
    encoding: Encoding,
) -> Plan:
    """Writes a table for each shard, then where each image went, then the plan itself."""
    table = sort(table)
    source = source_digest(table, classes)
    facts: dict[str, Any] = {}
    table = _readable(table, options.skip_unreadable, facts)
    splits = _splits(table, options)
    dropped = _duplicates(table, splits, options.drop_duplicates, facts)
    chosen = {
        split: np.flatnonzero((splits == split) & ~dropped)
        for split in SPLIT_NAMES
        if (splits == split).any()
    }
    _check(table, chosen, classes, options.validation)
    counts: dict[str, int] = {}
    plan = Plan({}, source, {**facts, "num_images": counts})
    items = []
    for split, rows in chosen.items():
        plan.shards[split] = []
        for number, shard in enumerate(_shards(table, rows, options.shard_bytes, encoding)):
            name = f"{split}-{number:06d}.tar"
            plan.shards[split].append(name)
            counts[name] = len(shard)
            part = table.take(pa.array(shard))
            keys = pa.array([f"{number:06d}-{place:06d}" for place in range(len(shard))], pa.large_string())
            part = part.append_column("key", keys)
            work.store.write(f"{work.plan}/shards/{name}.parquet", to_bytes(part))
            items.append(_where(part, split, name, classes))
    work.store.write(ITEMS, to_bytes(pa.concat_tables(items)))
    return plan


def sort(table: pa.Table) -> pa.Table:
    """By the digests of content, so that shards mix classes and the source's own order leaves no trace."""
    table = table.sort_by([("name", "ascending"), ("label", "ascending")])
    order = np.argsort(_halves(table)[:, 1], kind="stable")
    return table.take(pa.array(order))


def source_digest(table: pa.Table, classes: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for batch in table.select(["name", "label", "split", "digest"]).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            digest.update(json.dumps([row["name"], row["label"], row["split"], row["digest"].hex()]).encode())
    return digest.hexdigest()


def _halves(table: pa.Table) -> npt.NDArray[np.uint64]:
    """Of the digests, (n, 2); in the order of their bytes."""
    whole = b"".join(table["digest"].to_pylist())
    return np.frombuffer(whole, ">u8").reshape(-1, 2).astype(np.uint64)


def _readable(table: pa.Table, skip: bool, facts: dict[str, Any]) -> pa.Table:
    names, problems = table["name"].to_pylist(), table["problem"].to_pylist()
    lines = sorted(f"{name}: {problem}" for name, problem in zip(names, problems, strict=True) if problem)
    if lines and not skip:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        first = (
            f"{len(lines)} of {len(table)} images cannot be read; repair or remove them, or leave them out "
            f"with --skip-unreadable:"
        )
        raise DataError("\n  ".join([first, *lines[:SHOWN], *more]))
    facts |= {"num_skipped": len(lines), "skipped": lines[:KEPT]}
    readable = np.flatnonzero([not problem for problem in problems])
    return table.take(pa.array(readable))


def _splits(table: pa.Table, options: PlanOptions) -> npt.NDArray[np.str_]:
    """The source's own, where it has some; what it lacks for validation is taken from training.

    Which images that are their digests decide, so one stays on its side whatever comes and goes."""
    splits = np.array(table["split"].to_pylist(), "<U5")
    given = set(splits.tolist())
    if "" in given and len(given) > 1:
        name = table["name"][int(np.flatnonzero(splits == "")[0])]
        raise DataError(f"{name} is in no split, but other images are ({', '.join(sorted(given - {''}))})")
    if given and given != {""} and "train" not in given:
        raise DataError(f"the source has images for {' and '.join(sorted(given))}, none to train on")
    if options.test_as_validation:
        if "test" not in given or "val" in given:
            raise ConfigError("--test-as-validation: the source has no test split, or one for validation too")
        splits[splits == "test"] = "val"
    splits[splits == ""] = "train"
    if "val" not in splits:
        # The first half of the digest as blake2b gives it; the second one makes the order.
        first = _halves(table)[:, 0].byteswap()
        splits[(splits == "train") & (first < np.uint64(int(options.validation * 2**64)))] = "val"
    return splits


def _duplicates(
    table: pa.Table,
    splits: npt.NDArray[np.str_],
    drop: bool,
    facts: dict[str, Any],
) -> npt.NDArray[np.bool_]:
    """Which rows are dropped. Images of the same bytes stand in a row.

    The first by name is kept, but one for testing or validation before one to train on: a model should not
    have seen what it is judged by. Where labels differ no one can tell which is right: none is kept.
    """
    dropped = np.zeros(len(table), bool)
    lines: dict[str, list[str]] = {"duplicates": [], "conflicts": [], "leaks": []}
    counts = dict.fromkeys(lines, 0)

    def note(kind: str, line: str) -> None:
        counts[kind] += 1
        if counts[kind] <= KEPT:
            lines[kind].append(line)

    names, labels = table["name"], table["label"].to_numpy()
    for group in _same(_halves(table)):
        first = group[0]
        for other in group[1:]:
            note("duplicates", f"{names[int(other)]} is {names[int(first)]}")
            if labels[other] != labels[first]:
                note("conflicts", f"{names[int(other)]} is {names[int(first)]}")
            if splits[other] != splits[first]:
                note(
                    "leaks", f"{names[int(other)]} ({splits[other]}) is {names[int(first)]} ({splits[first]})"
                )
        if drop:
            best = min(group, key=lambda row: (-SPLIT_NAMES.index(splits[row]), row))
            dropped[group] = True
            dropped[best] = len(set(labels[group].tolist())) > 1
    for kind, found in lines.items():
        facts |= {f"num_{kind}": counts[kind], kind: found}
    facts["num_dropped"] = int(dropped.sum())
    return dropped


def _same(halves: npt.NDArray[np.uint64]) -> Iterator[Rows]:
    """Rows with equal digests, two or more, of a table in their order."""
    equal = (halves[1:] == halves[:-1]).all(axis=1)
    for start in np.flatnonzero(equal & ~np.concatenate([[False], equal])[:-1]):
        end = start + 1
        while end < len(halves) and equal[end - 1]:
            end += 1
        yield np.arange(start, end)


def _check(table: pa.Table, chosen: Mapping[str, Rows], classes: Sequence[str], validation: float) -> None:
    labels = table["label"].to_numpy()
    found = {split: set(labels[rows].tolist()) for split, rows in chosen.items()}
    everywhere: set[int] = set().union(*found.values())
    if len(everywhere) < 2:
        names = ", ".join(classes[label] for label in everywhere) or "none"
        raise DataError(f"a classifier needs images of at least two classes, found: {names}")
    given = "" not in table["split"].to_pylist()
    advice = "" if given else f", or lower the validation share ({validation})"
    for split, purpose in (("val", "validation"), ("test", "testing")):
        for label in sorted(found.get(split, set()) - found.get("train", set())):
            raise DataError(
                f"class {classes[label]!r} (label {label}) has images for {purpose} only; "
                f"add images of it{advice}"
            )
    if not len(chosen.get("val", ())):
        raise DataError(f"no image falls to validation; add images, or raise its share ({validation})")


def _shards(table: pa.Table, rows: Rows, shard_bytes: int, encoding: Encoding) -> Iterator[list[int]]:
    most = -(-len(rows) // MIN_SHARDS)
    columns = [table[name].to_pylist() for name in ("width", "height", "bytes", "extension")]
    shard: list[int] = []
    size = 0
    for row in rows.tolist():
        image = encoding.estimate(*(column[row] for column in columns))
        # Two headers of 512 bytes, the label's block, and the image padded to whole blocks.
        record = 3 * 512 + -(-image // 512) * 512
        if shard and (len(shard) == most or size + record > shard_bytes):
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += record
    yield shard


def _where(part: pa.Table, split: str, name: str, classes: Sequence[str]) -> pa.Table:
    """Rows of `items.parquet`."""
    count = len(part)
    return pa.table(
        {
            "name": part["name"],
            "label": part["label"],
            "class": pa.array(list(classes), pa.large_string()).take(part["label"].combine_chunks()),
            "split": pa.array([split] * count, pa.large_string()),
            "shard": pa.array([name] * count, pa.large_string()),
            "key": part["key"],
            "digest": part["digest"],
        }
    )
