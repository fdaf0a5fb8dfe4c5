"""Every byte of a data set read again and compared with its index, before GPUs are taken.

    vitscale verify s3://bucket/photos/train --decode all

All problems are collected, each with shard and key, or shard and byte. What is held in memory is two
pieces of 8 MB per process, the rows of a shard, and the image that is being decoded.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from workers.data.decode import decode as decode_image
from workers.data.index import STORED, DatasetIndex, records_key, unpack_rows
from workers.data.location import locate
from workers.data.pool import read_ahead, run_all
from workers.data.shard_rows import PIECE_BYTES, pieces
from workers.data.shards import Shard
from workers.data.tar import split_name, walk
from workers.errors import DataError
from workers.storage import NotFound, ObjectInfo, Store, Unavailable, open_store

DECODED = 64
"""Images decoded unless somebody asks for more."""
MAX_TOLD = 100
"""Problems of one shard that are listed."""
MAX_FAILURES = 20
"""Shards in a row that cannot be read before it is the store that is taken to be at fault."""


@dataclass(frozen=True, slots=True)
class Problem:
    shard: str
    what: str
    key: str | None = None
    byte: int | None = None
    """Of the shard, where the problem begins."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    url: str
    fingerprint: str
    num_shards: int
    num_samples: int
    num_bytes: int
    """Read."""
    num_decoded: int
    num_rewritten: int
    """Shards with the right bytes but another ETag: a stream refuses these until they are indexed again."""
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class ShardCheck:
    root: str
    home: str
    shard: Shard
    decoded: tuple[int, ...] | None
    """Rows whose images are decoded; None: all."""


@dataclass(slots=True)
class Findings:
    problems: list[Problem] = field(default_factory=list)
    num_bytes: int = 0
    num_decoded: int = 0
    rewritten: bool = False


def verify(
    url: str,
    *,
    decode: int | None = DECODED,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> VerifyReport:
    """`decode`: so many images, spread evenly over the data set, the same ones each time; None: all.

    DataError only if there is no index that can be trusted, or the store cannot be reached.
    """
    index = DatasetIndex.open(url)
    count, in_a_row = len(index.shards), 0
    total = Findings(problems=list(_extra(index)))
    tasks = _tasks(index, decode)
    num_bytes = int(index.shards.rows["size"].sum())
    rewritten = 0
    with run_all(verify_shard, tasks, num_bytes=num_bytes, workers=workers) as outcomes:
        for done, (task, found) in enumerate(outcomes, 1):
            if isinstance(found, DataError):
                total.problems.append(Problem(task.shard.name, str(found)))
                in_a_row += 1
                if in_a_row == MAX_FAILURES or isinstance(found, Unavailable):
                    raise DataError(f"{in_a_row} shards in a row cannot be read, the last because: {found}")
            else:
                in_a_row = 0
                total.problems += found.problems
                total.num_bytes += found.num_bytes
                total.num_decoded += found.num_decoded
                rewritten += found.rewritten
            if progress:
                progress(done, count)
    return VerifyReport(
        url=url,
        fingerprint=index.fingerprint,
        num_shards=count,
        num_samples=index.num_samples,
        num_bytes=total.num_bytes,
        num_decoded=total.num_decoded,
        num_rewritten=rewritten,
        problems=tuple(sorted(total.problems, key=lambda problem: (problem.shard, problem.byte or 0))),
    )


def verify_shard(task: ShardCheck) -> Findings:
    """Records, size, sha256 of the whole, digest of each sample, and the images that are to be decoded."""
    store, shard = open_store(task.root), task.shard
    try:
        info = store.head(shard.name)
    except NotFound:
        return Findings([Problem(shard.name, "missing")])
    rows, problems = _records(store, task)
    numbers = set(range(len(rows)) if task.decoded is None else task.decoded)
    samples = _Samples(rows, numbers)
    whole = hashlib.sha256()
    with read_ahead(pieces(store, info)) as data:
        for piece in data:
            whole.update(piece)
            samples.take(piece)
    told = [Problem(shard.name, what, byte=byte) for what, byte in _size(info, shard, samples)]
    told += [
        Problem(shard.name, what, _key(store, info, row), int(row["offset"]))
        for what, row in samples.problems[:MAX_TOLD]
    ]
    if len(samples.problems) > MAX_TOLD:
        told.append(Problem(shard.name, f"and {len(samples.problems) - MAX_TOLD} more samples"))
    right = whole.hexdigest() == shard.sha256
    if not right and not told:
        told.append(Problem(shard.name, "its sha256 is another; what differs lies in no sample"))
    return Findings(problems + told, samples.at, samples.num_decoded, right and info.etag != shard.etag)


class _Samples:
    """Digests the samples of a shard, and decodes some, as the pieces come."""

    def __init__(self, rows: np.ndarray, decoded: set[int]) -> None:
        """`rows`: STORED's SAMPLE, by offset."""
        self.at = 0
        self.num_decoded = 0
        self.problems: list[tuple[str, np.void]] = []
        self._rows = rows
        self._decoded = decoded
        self._next = 0
        self._start()

    @property
    def cut(self) -> np.ndarray:
        """Rows of the samples that have not come to their end."""
        return self._rows[self._next :]

    def take(self, piece: bytes) -> None:
        view, start, stop = memoryview(piece), self.at, self.at + len(piece)
        self.at = stop
        while self._next < len(self._rows) and self._offset < stop:
            self._digest.update(view[max(self._offset - start, 0) : max(self._end - start, 0)])
            if self._next in self._decoded:
                self._image += view[max(self._image_offset - start, 0) : max(self._image_end - start, 0)]
            if self._end > stop:
                break
            self._finish()
            self._next += 1
            self._start()

    def _start(self) -> None:
        self._digest = blake3()
        self._image = bytearray()
        if self._next < len(self._rows):
            row = self._rows[self._next]
            self._offset, self._image_offset = int(row["offset"]), int(row["image_offset"])
            self._end = self._offset + int(row["size"])
            self._image_end = self._image_offset + int(row["image_size"])

    def _finish(self) -> None:
        row = self._rows[self._next]
        if self._digest.digest(length=16) != row["digest"].tobytes():
            self.problems.append((f"bytes {self._offset} to {self._end} are not what was indexed", row))
        elif self._next in self._decoded:
            self.num_decoded += 1
            try:
                decode_image(bytes(self._image), channels=3)
            except DataError as error:
                self.problems.append((f"its image cannot be decoded: {error}", row))


def _tasks(index: DatasetIndex, decode: int | None) -> Iterator[ShardCheck]:
    count = 0 if decode is None else min(decode, index.num_samples)
    ordinals = (np.arange(count, dtype=np.int64) * 2 + 1) * index.num_samples // max(2 * count, 1)
    numbers, places = index.locate(ordinals)
    for number, shard in enumerate(index.shards):
        chosen = None if decode is None else tuple(places[slice(*_span(numbers, number))].tolist())
        yield ShardCheck(index.url, index.home, shard, chosen)


def _span(ascending: npt.NDArray[np.int32], value: int) -> tuple[int, int]:
    start, stop = np.searchsorted(ascending, [value, value + 1]).tolist()
    return start, stop


def _extra(index: DatasetIndex) -> Iterator[Problem]:
    """Shards that were not there when the data set was indexed."""
    if locate(index.source).names is None:
        known = set(index.shards.names)
        for info in open_store(index.url).list():
            if "/" not in info.key and info.key.endswith(".tar") and info.key not in known:
                yield Problem(info.key, "not in the index; run `vitscale index` if it belongs there")


def _records(store: Store, task: ShardCheck) -> tuple[np.ndarray, list[Problem]]:
    """The rows that can be trusted, SAMPLE (n,), and what is wrong with the others.

    A damaged row is left out, so the rows after it have other numbers than in the index; but then the
    choice of images to decode matters no longer."""
    shard, width = task.shard, STORED.itemsize
    key = records_key(task.home, shard.name, shard.records_sha256)
    again = "run `vitscale index`"
    try:
        data = store.read(key)
    except NotFound:
        data, problems = b"", [Problem(shard.name, f"its rows, {key}, are missing; {again}")]
    else:
        right = hashlib.sha256(data).hexdigest() == shard.records_sha256
        problems = [] if right else [Problem(shard.name, f"its rows, {key}, are damaged; {again}")]
    whole = len(data) // width * width
    rows, wrong = unpack_rows(data[:whole], 0, shard.sha256)
    problems += [Problem(shard.name, f"row {row} of {key} is damaged; {again}") for row in wrong[:MAX_TOLD]]
    return np.delete(rows, wrong), problems


def _size(info: ObjectInfo, shard: Shard, samples: _Samples) -> Iterator[tuple[str, int]]:
    if info.size < shard.size:
        cut = len(samples.cut)
        yield f"truncated: {info.size} of {shard.size} bytes, {cut} of its samples are cut off", info.size
    elif info.size > shard.size:
        yield f"{info.size - shard.size} bytes longer than when it was indexed", shard.size


def _key(store: Store, info: ObjectInfo, row: np.void) -> str | None:
    """Of the sample, by the name of its first file; None if that cannot be read."""
    start, stop = int(row["offset"]), int(row["offset"]) + int(row["size"])
    data = (
        store.read_range(info.key, at, min(PIECE_BYTES, stop - at), info.etag)
        for at in range(start, stop, PIECE_BYTES)
    )
    try:
        for member in walk(info.key, data):
            if parts := split_name(member.name):
                return parts[0]
    except DataError:
        pass
    return None
