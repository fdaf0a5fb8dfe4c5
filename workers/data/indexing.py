"""Building the index: every new or changed shard read once, on all cores, and gone on with after a kill.

    vitscale index s3://bucket/photos/train

The old index stays as it is until the new one is complete: whatever is written has a name by its content,
and index.json is replaced last. One call at a time builds the index of a data set.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.data.index import (
    FORMAT,
    STORED,
    DatasetIndex,
    NewerFormat,
    header_of,
    read_header,
    records_key,
)
from workers.data.index_journal import Journal
from workers.data.layout import MAX_NAMED, MAX_NUMBERED, MIXED, Layout, check_classes
from workers.data.listing import Listing, enumerate_some, list_all
from workers.data.location import Location, locate
from workers.data.pool import run_all
from workers.data.shard_rows import ShardRow, ShardTask, index_shard, relabel, survey
from workers.data.shards import ROW, ShardTable, mark, piece_key, write_table
from workers.data.tar import UnusableShard
from workers.errors import DataError
from workers.storage import Store, Unavailable, open_store

logger = logging.getLogger(__name__)

MAX_FAILURES = 20
"""Shards that cannot be read, whatever is in them, before it is the store that is taken to be at fault."""
TO_READ, OLD, FOUND = 0, 1, 2
"""Where a shard's row comes from: the shard, the last index, or this one (the journal, too)."""

Progress = Callable[[int, int], None]


@dataclass
class _Build:
    """What is known of each shard, in the order of the listing."""

    location: Location
    store: Store
    listing: Listing
    layout: Layout
    classes: tuple[str, ...] | None
    """As given, now or for the last index; None: found."""
    last: DatasetIndex | None
    """Whose rows still hold."""
    workers: int | None
    rows: np.ndarray = field(init=False)
    """ROW (n,)."""
    state: npt.NDArray[np.uint8] = field(init=False)
    named: npt.NDArray[np.bool_] = field(init=False)
    marks: npt.NDArray[np.uint64] = field(init=False)
    """(n,) of the shards as they are listed."""
    journal: Journal = field(init=False)
    names: set[str] = field(default_factory=set)
    """Label names found, where there is no list of classes."""

    def __post_init__(self) -> None:
        count = len(self.listing)
        self.rows = np.zeros(count, ROW)
        self.state = np.zeros(count, np.uint8)
        self.named = np.zeros(count, np.bool_)
        self.marks = self.listing.marks()
        rules = [FORMAT, self.layout.image_key, self.layout.label, self.classes]
        identity = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
        self.journal = Journal(self.store, self.location.home, identity)

    @property
    def unchanged(self) -> bool:
        """Whether all is as the last index has it, and nothing of that is gone."""
        return (
            self.last is not None
            and bool((self.state == OLD).all())
            and len(self.state) == len(self.last.shards)
        )

    def task(self, number: int) -> ShardTask:
        classes = self.classes
        if self.state[number] == OLD and self.last is not None:
            classes = self.last.classes
        info, row = self.listing[number], self.rows[number].tobytes()
        return ShardTask(self.location.root, self.location.home, self.layout, classes, info, row, number)

    def take(self, number: int, row: ShardRow, state: int = FOUND) -> None:
        self.rows[number] = np.frombuffer(row.row, ROW)[0]
        self.state[number], self.named[number] = state, row.named
        self.names.update(row.names)


def build_index(
    url: str,
    *,
    classes: Sequence[str] | None = None,
    image_key: str | None = None,
    label: str | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    workers: int | None = None,
) -> DatasetIndex:
    """Index all `*.tar` directly under `url`, or the shards of a brace list.

    DataError names every shard that cannot be used, with the reason. Shards that have not changed since
    they were last indexed are not read again, unless `fresh`. `image_key` and `label` say what a sample
    looks like (workers/data/layout.py), `classes` names the labels 0, 1, ...; without these it is as for
    the last index. Where nobody lists the classes, names are numbered in their order and numbers are
    their own names. `progress(shards done, all shards)` is called in this thread. `workers`: processes;
    by default one per core if that pays.
    """
    location = locate(url)
    store = open_store(location.root)
    header = _last_header(store, location)
    layout = Layout.of(image_key or header.get("image_key"), label or header.get("label"))
    if classes is not None:
        check_classes(classes, "classes")
    elif header.get("given"):
        classes = header["classes"]
    listed = None if classes is None or layout.label == "none" else tuple(classes)
    last = None if fresh or not header else _last_index(url, layout, listed)
    build = _Build(location, store, list_all(store, location), layout, listed, last, workers)
    _take_over(build, fresh)
    _read_shards(build, progress)
    if not build.rows["num_samples"].any():
        raise DataError(f"the shards under {url} hold no samples")
    index = _index(build, _number_labels(build))
    if last is not None and last == index and build.unchanged:
        _delete(store, build.listing.journal)
        return last
    pieces = write_table(store, location.home, index.shards)
    store.write(f"{location.home}/index.json", header_of(index, pieces))
    _delete(store, _stale(store, index, pieces))
    return index


def _last_header(store: Store, location: Location) -> dict[str, Any]:
    """Empty if there is none that can be read."""
    try:
        return read_header(store, location)
    except NewerFormat:
        raise
    except DataError:
        return {}


def _last_index(url: str, layout: Layout, classes: tuple[str, ...] | None) -> DatasetIndex | None:
    """None if its rows are of no use: lost, or read with another layout or other classes."""
    try:
        last = DatasetIndex.open(url)
    except DataError as error:
        logger.warning("reading all shards again: %s", error)
        return None
    same_layout = (last.image_key, last.label) == (layout.image_key, layout.label)
    renamed = classes is not None and last.named and last.classes != classes[: len(last.classes)]
    return last if same_layout and not renamed else None


def _take_over(build: _Build, fresh: bool) -> None:
    """The rows that the last index and an unfinished one have of shards that have not changed since."""
    marks, listing, last = build.marks, build.listing, build.last
    records = np.sort(np.array(listing.records, np.uint64))
    limit = len(build.classes) if build.classes is not None else MAX_NUMBERED
    if last is not None:
        known = ((shard.name, shard.size, shard.etag) for shard in last.shards)
        places, hit = _find(np.fromiter((mark(*one) for one in known), np.uint64, len(last.shards)), marks)
        rows = last.shards.rows[places]
        hit &= np.isin(rows["records_mark"], records) & (rows["max_label"] < limit)
        build.rows[hit], build.state[hit], build.named[hit] = rows[hit], OLD, last.named
    if fresh:
        _delete(build.store, listing.journal)
        listing.journal.clear()
    for segment in build.journal.read(listing.journal):
        entries = segment.entries
        places, hit = _find(marks, entries["mark"])
        hit &= np.isin(entries["row"]["records_mark"], records)
        if hit.all() or not segment.names:  # else it is not known whose names these are
            places, entries = places[hit], entries[hit]
            new = build.state[places] == TO_READ
            build.rows[places[new]] = entries["row"][new]
            build.named[places[new]] = entries["named"][new]
            build.state[places[new]] = FOUND
            build.names |= segment.names


def _read_shards(build: _Build, progress: Progress | None) -> None:
    """What is still to be read. All shards that cannot be used are told at once, by name."""
    count, listing = len(build.listing), build.listing
    numbers = np.flatnonzero(build.state == TO_READ)
    done, failures = count - len(numbers), 0
    problems = {name: f"{name}: {reason}" for name, reason in listing.refused.items()}
    if progress and done:
        progress(done, count)
    num_bytes = int(np.array(listing.sizes, np.int64)[numbers].sum())
    tasks = map(build.task, numbers.tolist())
    try:
        with run_all(index_shard, tasks, num_bytes=num_bytes, workers=build.workers) as outcomes:
            for task, outcome in outcomes:
                if isinstance(outcome, DataError):
                    problems[task.info.key] = str(outcome)
                    failures += not isinstance(outcome, UnusableShard)
                    if failures == MAX_FAILURES or isinstance(outcome, Unavailable):
                        break
                else:
                    build.take(task.number, outcome)
                    build.journal.add(int(build.marks[task.number]), outcome)
                done += 1
                if progress:
                    progress(done, count)
    finally:
        build.journal.flush()
    if len(problems) == 1:
        raise DataError(next(iter(problems.values())))
    if problems:
        lines = enumerate_some([problems[name] for name in sorted(problems)], "\n  ")
        raise DataError(f"{len(problems)} of {count} shards cannot be used:\n  {lines}")


def _number_labels(build: _Build) -> tuple[str, ...]:
    """The classes; where these are names found in the shards, the records are given their numbers."""
    if build.classes is not None or build.layout.label == "none":
        return build.classes or ()
    numbered = np.flatnonzero(~build.named & (build.rows["max_label"] >= 0))
    named = np.flatnonzero(build.named)
    if not len(named):
        return tuple(str(label) for label in range(build.rows["max_label"].max() + 1))
    if len(numbered):
        one, other = (build.listing.names[int(numbers[0])] for numbers in (named, numbered))
        raise DataError(f"{one} and {other} do not agree: {MIXED}")
    if build.last is not None and build.unchanged:
        return build.last.classes
    old = build.state == OLD
    for number, row in _rewritten(build, survey, np.flatnonzero(old)):
        build.take(number, row, OLD)
    classes = tuple(sorted(build.names))
    if len(classes) > MAX_NAMED:
        raise DataError(f"{len(classes)} different labels: are these captions? See --label")
    same = build.last is not None and build.last.classes == classes
    give = functools.partial(relabel, numbers={name: number for number, name in enumerate(classes)})
    for number, row in _rewritten(build, give, np.flatnonzero(~old if same else old | ~old)):
        build.rows[number] = np.frombuffer(row.row, ROW)[0]
    return classes


def _rewritten(
    build: _Build, function: Callable[[ShardTask], ShardRow], numbers: npt.NDArray[np.int64]
) -> Iterator[tuple[int, ShardRow]]:
    """What `function` makes of the records of these shards."""
    num_bytes = int(build.rows["num_samples"][numbers].sum()) * STORED.itemsize
    tasks = map(build.task, numbers.tolist())
    with run_all(function, tasks, num_bytes=num_bytes, workers=build.workers) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, DataError):
                raise outcome
            yield task.number, outcome


def _index(build: _Build, classes: tuple[str, ...]) -> DatasetIndex:
    table = ShardTable(build.rows, build.listing.names, build.listing.etags)
    header = {
        "classes": classes,
        "named": bool(build.named.any()),
        "given": build.classes is not None,
        "image_key": build.layout.image_key,
        "label": build.layout.label,
    }
    return DatasetIndex(build.location, header, table)


def _stale(store: Store, index: DatasetIndex, pieces: Sequence[str]) -> Iterator[str]:
    """Keys of what belongs to earlier or unfinished indexes."""
    home, rows = index.home, index.shards.rows
    digests = (row.tobytes().hex() for row in rows["records_sha256"])
    current = {
        mark(records_key(home, name, digest), 0, "")
        for name, digest in zip(index.shards.names, digests, strict=True)
    }
    current |= {mark(piece_key(home, digest), 0, "") for digest in pieces}
    for part in ("samples", "shards", "journal"):
        for info in store.list(f"{home}/{part}/"):
            if mark(info.key, 0, "") not in current:
                yield info.key


def _delete(store: Store, keys: Iterable[str]) -> None:
    with run_all(store.delete, keys, num_bytes=0) as outcomes:
        for _, outcome in outcomes:
            if isinstance(outcome, DataError):
                raise outcome


def _find(
    known: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """For each of `wanted` its place in `known`, and whether it is there at all."""
    if not len(known):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], wanted).clip(max=len(known) - 1)]
    return places, known[places] == wanted
