"""What an unfinished index has done so far, so that the next call goes on from there.

Segments are written every few seconds, each under a name of its own; a finished index removes them. An
entry counts only while shard and records are listed as it saw them, and the labels are read as they were.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from workers.data.shard_rows import ShardRow
from workers.data.shards import ROW
from workers.storage import NotFound, Store

ENTRY = np.dtype([("mark", "<u8"), ("named", "?"), ("row", ROW)])
"""`mark`: of the shard as it was listed, see workers/data/shards.py."""
FLUSH_SECONDS, FLUSH_SHARDS = 2.0, 1024


@dataclass(frozen=True, slots=True)
class Segment:
    entries: np.ndarray
    """ENTRY (n,)."""
    names: frozenset[str]
    """Label names of all its shards, where there is no list of classes."""


class Journal:
    def __init__(self, store: Store, home: str, identity: str) -> None:
        """`identity`: of all that decides what rows a shard has."""
        self._store = store
        self._prefix = f"{home}/journal/{identity}-"
        self._entries = bytearray()
        self._names: set[str] = set()
        self._flushed = time.monotonic()

    def read(self, keys: Iterable[str]) -> Iterator[Segment]:
        """Those of `keys` that are whole and of this journal."""
        for key in keys:
            if not key.startswith(self._prefix):
                continue
            try:
                digest, header, entries = self._store.read(key).split(b"\n", 2)
                names = frozenset(json.loads(header))
            except (NotFound, ValueError):
                continue
            if hashlib.sha256(header + entries).hexdigest().encode() == digest:
                yield Segment(np.frombuffer(entries, ENTRY), names)

    def add(self, mark: int, done: ShardRow) -> None:
        entry = np.zeros((), ENTRY)
        entry["mark"], entry["named"] = mark, done.named
        self._entries += entry.tobytes()[: -ROW.itemsize] + done.row
        self._names.update(done.names)
        late = time.monotonic() - self._flushed > FLUSH_SECONDS
        if late or len(self._entries) >= FLUSH_SHARDS * ENTRY.itemsize:
            self.flush()

    def flush(self) -> None:
        if self._entries:
            header, entries = json.dumps(sorted(self._names)).encode(), bytes(self._entries)
            digest = hashlib.sha256(header + entries).hexdigest().encode()
            key = f"{self._prefix}{secrets.token_hex(8)}"
            self._store.write(key, b"\n".join([digest, header, entries]))
        self._entries.clear()
        self._names.clear()
        self._flushed = time.monotonic()
