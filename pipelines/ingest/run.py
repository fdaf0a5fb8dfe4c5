"""The ingest itself: list, examine, plan, write, index. Whatever interrupts it, the same command goes on.

The same images and options give byte-identical shards, so the same fingerprints, whoever did the work and
however often it was interrupted.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.site import Site
from pipelines.ingest.encode import Encoding, codec_versions
from pipelines.ingest.examine import FOUND, chunks, examine
from pipelines.ingest.plan import SHOWN, Plan, PlanOptions, make_plan, sort, source_digest
from pipelines.ingest.processes import map_in_processes
from pipelines.ingest.report import IngestReport
from pipelines.ingest.work import CLASSES, Marker, Work, clean, from_bytes, read_marker, rows_of, to_bytes
from pipelines.sources import Item, Source, SourceOptions, is_built_in, open_source
from pipelines.sources.items import read_class_map
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.errors import ConfigError, DataError
from workers.storage import Store, join_url, open_store

Progress = Callable[[str, int, int], None]
"""Phase (examine, write, index), done, total: images, and shards in the last one."""
ALONE_IMAGES, ALONE_BYTES = 4096, 64 << 20
"""Up to so many this process does all: another one takes a second to start."""


def ingest(
    source: str | Path,
    destination: str,
    *,
    format: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_map: Path | None = None,
    follow_links: bool = False,
    limit: int | None = None,
    validation: float = 0.2,
    test_as_validation: bool = False,
    shard_bytes: int = 256 << 20,
    skip_unreadable: bool = False,
    drop_duplicates: bool = False,
    refuse_conflicts: bool = False,
    resize: int | None = None,
    reencode: str | None = None,
    quality: int = 90,
    processes: int | None = None,
    site: Site | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Shards of a folder per class, a table, Parquet, CIFAR, IDX, tars, or the built-in `"digits"`.

    `limit` takes that many images, spread over all classes. `site` does the work on that site's cluster,
    else `processes` of this machine do. A destination that is complete is recognised and left alone, an
    interrupted one is completed, any other is refused.
    """
    plan_options = PlanOptions(validation, shard_bytes, skip_unreadable, drop_duplicates, test_as_validation)
    encoding = Encoding(resize, reencode, quality)
    if limit is not None and limit <= 0:
        raise ConfigError(f"limit: expected a positive number, got {limit}")
    numbers = None if class_map is None else read_class_map(class_map)
    how = SourceOptions(format, image_column, label_column, numbers, follow_links)
    store = open_store(destination)
    if not is_built_in(str(source), how):
        _refuse_own_source(source, store.url)
    last = read_marker(store)
    found = _limited(open_source(source, how), limit)
    options = {**asdict(plan_options), "resize": resize, "reencode": reencode, "quality": quality}
    marker = Marker(_listing_digest(found), "", options, None)
    if last is not None and last.report is not None:
        report = _complete(destination, store, last, marker, found)
        if refuse_conflicts:
            _refuse_conflicts(report.num_conflicts, report.conflicts)
        return report

    work = Work(destination, marker.listing, options)
    work.begin(marker, last)
    crew = Crew(work, site, _processes(found, processes), progress)
    plan = _read_plan(work, encoding)
    if plan is None:
        examined = crew.examine(found.items)
        plan = make_plan(work, examined, found.classes, plan_options, encoding)
        plan.facts |= {"num_ignored": found.num_ignored, "ignored": list(found.ignored)}
        plan.codecs = codec_versions() if encoding.changes else ""
        work.store.write(f"{work.plan}/plan.json", plan.to_bytes())
    if refuse_conflicts:
        _refuse_conflicts(plan.facts["num_conflicts"], plan.facts["conflicts"])
    written = crew.write(plan, options)
    indices = _index(work, plan, found.classes, written, progress)
    report = _report(destination, found, plan, indices, encoding)
    numbered = {name: number for number, name in enumerate(found.classes)}
    store.write(CLASSES, json.dumps(numbered, indent=1, ensure_ascii=False).encode())
    values = {name: value for name, value in asdict(report).items() if name != "destination"}
    work.end(Marker(marker.listing, plan.source, options, values))
    return report


@dataclass
class Crew:
    """Whoever does the tasks: this process, several of this machine, or a cluster."""

    work: Work
    site: Site | None
    processes: int
    progress: Progress | None

    def examine(self, items: pa.Table) -> pa.Table:
        """The items with what was found out about each."""
        work, folder = self.work, f"{self.work.root}/examined"
        listed = list(chunks(items))
        done, there = work.has(folder), work.has(f"{work.root}/listed")
        missing = [n for n in range(len(listed)) if f"{n:06d}.parquet" not in done]
        for number in missing:
            if f"{number:06d}.parquet" not in there:
                work.store.write(f"{work.root}/listed/{number:06d}.parquet", to_bytes(listed[number]))
        listing = work.root.rpartition("/")[2]
        self._map(
            "examine",
            [[work.url, listing, number] for number in missing],
            [len(listed[number]) for number in missing],
            len(items),
        )
        parts = [from_bytes(work.store.read(f"{folder}/{n:06d}.parquet")) for n in range(len(listed))]
        return pa.concat_tables(parts)

    def write(self, plan: Plan, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Records of all shards, by their keys; those that are there, and as they were left, stay."""
        work = self.work
        work.tidy(set(plan.keys))
        listing = work.root.rpartition("/")[2]
        names = [name for shards in plan.shards.values() for name in shards]
        there = self._written(names)
        missing = [name for name in names if name not in there]
        self._map(
            "write",
            [[work.url, listing, options, name] for name in missing],
            [plan.facts["num_images"][name] for name in missing],
            sum(plan.facts["num_images"].values()),
        )
        return self._written(names)

    def _written(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        work = self.work
        there = {info.key.rpartition("/")[2]: info for info in work.store.list() if info.key.endswith(".tar")}
        recorded = work.has(f"{work.plan}/written")
        records = {}
        for name in names:
            if name in there and f"{name}.json" in recorded:
                record = json.loads(work.store.read(f"{work.plan}/written/{name}.json"))
                if (record["size"], record["etag"]) == (there[name].size, there[name].etag):
                    records[name] = record
        return records

    def _map(self, phase: str, arguments: list[list[Any]], sizes: list[int], total: int) -> None:
        done = total - sum(sizes)

        def advance(images: int) -> None:
            nonlocal done
            done += images
            if self.progress:
                self.progress(phase, done, total)

        advance(0)
        if not arguments:
            return
        if self.site is None:
            map_in_processes(phase, arguments, self.processes, advance)
            return
        # Here, because Ray reads its settings when it is imported, and because most ingests need none.
        from orchestrator.tasks import map_on_cluster

        try:
            map_on_cluster(self.site, "pipelines.ingest.job", phase, arguments, self.work.url, advance)
        except DataError as error:
            raise DataError(
                f"{error}\n  On a cluster, source and destination must be reachable from all nodes: s3://, "
                f"or a path that all of them share"
            ) from error


def _refuse_own_source(source: str | Path, destination: str) -> None:
    """What is written must not become a part of what is read the next time."""
    text = str(source)
    folder = text.rstrip("/") if "://" in text else Path(text).absolute().as_uri()
    if destination == folder or destination.startswith(f"{folder}/"):
        raise ConfigError(f"{destination} lies in the source {source}; choose a destination outside of it")


def _limited(source: Source, limit: int | None) -> Source:
    """The first so many by the digest of their names: the same ones each time, from all classes."""
    if limit is None or limit >= len(source.items):
        return source
    names = source.items["name"].to_pylist()
    order = sorted(range(len(names)), key=lambda row: hashlib.blake2b(names[row].encode()).digest())
    items = source.items.take(pa.array(sorted(order[:limit])))
    return Source(source.format, items, source.classes, source.ignored, source.num_ignored)


def _listing_digest(source: Source) -> str:
    digest = hashlib.sha256(json.dumps([source.format, source.classes]).encode())
    for row in rows_of(source.items):
        digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()


def _complete(destination: str, store: Store, last: Marker, marker: Marker, source: Source) -> IngestReport:
    """The report of a complete destination, if it holds what was asked for."""
    same = last.options == marker.options
    if same and last.listing != marker.listing:
        # Perhaps the same images, elsewhere or copied: only their bytes can tell.
        parts = []
        for chunk in chunks(source.items):
            found = examine([Item(**row) for row in rows_of(chunk)], decode=False)
            digests = pa.array([image.digest for image in found], FOUND.field("digest").type)
            parts.append(chunk.append_column(FOUND.field("digest"), digests))
        same = source_digest(sort(pa.concat_tables(parts)), source.classes) == last.source
    if not same or last.report is None:
        raise ConfigError(
            f"{destination} already holds another data set, or this one with other options; "
            f"choose another destination"
        )
    report = IngestReport.restore(destination, last.report)
    for url, fingerprint in (
        (report.train_url, report.train_fingerprint),
        (report.validation_url, report.validation_fingerprint),
        (report.test_url, report.test_fingerprint),
    ):
        if fingerprint and DatasetIndex.open(url).fingerprint != fingerprint:
            raise DataError(f"{url} has changed since it was ingested; choose another destination")
    clean(store)
    return report


def _refuse_conflicts(num_conflicts: int, lines: Sequence[str]) -> None:
    if num_conflicts:
        more = [f"and {num_conflicts - SHOWN} more"] if num_conflicts > SHOWN else []
        first = f"{num_conflicts} images have the bytes of another one with another label:"
        raise DataError("\n  ".join([first, *lines[:SHOWN], *more]))


def _processes(source: Source, asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise ConfigError(f"processes: expected a positive number, got {asked}")
    few = len(source.items) < ALONE_IMAGES
    small = int(np.maximum(source.items["size"].to_numpy(), 0).sum()) < ALONE_BYTES
    return asked or (1 if few and small else os.cpu_count() or 1)


def _read_plan(work: Work, encoding: Encoding) -> Plan | None:
    if "plan.json" not in work.has(work.plan):
        return None
    plan = Plan(**json.loads(work.store.read(f"{work.plan}/plan.json")))
    if encoding.changes and plan.codecs != codec_versions():
        # Half the shards by one version of a codec, half by another: the same command would give other bytes.
        for name in work.has(f"{work.plan}/written"):
            work.store.delete(f"{work.plan}/written/{name}")
        return None
    return plan


def _index(
    work: Work,
    plan: Plan,
    classes: Sequence[str],
    written: dict[str, dict[str, Any]],
    progress: Progress | None,
) -> dict[str, DatasetIndex]:
    total, before = len(plan.keys), 0

    def advance(done: int, _: int) -> None:
        if progress:
            progress("index", before + done, total)

    indices = {}
    for split, names in plan.shards.items():
        index = build_index(join_url(work.url, split), classes=classes, progress=advance)
        expected = [(name, written[name]["sha256"]) for name in names if name in written]
        if [(shard.name, shard.sha256) for shard in index.shards] != expected:
            raise DataError(f"{work.url}: something else writes there at the same time; ingest again")
        indices[split] = index
        before += len(names)
    return indices


def _report(
    destination: str, source: Source, plan: Plan, indices: dict[str, DatasetIndex], encoding: Encoding
) -> IngestReport:
    shards = [shard for index in indices.values() for shard in index.shards]
    values = {
        "format": source.format,
        "num_train": indices["train"].num_samples,
        "num_validation": indices["val"].num_samples,
        "num_test": indices["test"].num_samples if "test" in indices else 0,
        "classes": source.classes,
        "num_shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "train_fingerprint": indices["train"].fingerprint,
        "validation_fingerprint": indices["val"].fingerprint,
        "test_fingerprint": indices["test"].fingerprint if "test" in indices else "",
        "encoding": str(encoding),
    }
    return IngestReport.restore(destination, {**plan.facts, **values})
