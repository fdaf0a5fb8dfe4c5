"""What a run tells the world: create-once segments of JSON lines below `events/`.

Rank 0 writes `events/<epoch>-<seq>.jsonl`, where the epoch is that of its lease; anybody reads. Training
never talks to a tracking server, so none can stop it. Readers probe for the next segment and never list.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from workers.storage import NotFound, Store

FLUSH_SECONDS = 2.0


class EventWriter:
    """Collects events and writes a segment every few seconds; `flush` before each commit."""

    def __init__(self, store: Store, epoch: int) -> None:
        self._store = store
        self._epoch = epoch
        self._seq = 0
        self._lines: list[str] = []
        self._last_flush = time.monotonic()

    def write(self, kind: str, images_seen: int, **values: Any) -> None:
        event = {"kind": kind, "images_seen": images_seen, "time": time.time(), **values}
        self._lines.append(json.dumps(event))
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            self._store.create(segment_key(self._epoch, self._seq), "\n".join(self._lines).encode())
            self._lines.clear()
            self._seq += 1
        self._last_flush = time.monotonic()


class EventReader:
    """Reads each event of a run once, in order; call `read` again for what has come since."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._epoch = 0
        self._seq = 0
        self._lines: deque[bytes] = deque()
        """Of the last segment; not handed out yet."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Events in order, each with its `epoch`; a newer epoch supersedes what it does not continue."""
        while self._lines or self._next_segment() or self._next_epoch():
            while self._lines:
                yield {"epoch": self._epoch, **json.loads(self._lines.popleft())}

    def _next_segment(self) -> bool:
        try:
            segment = self._store.read(segment_key(self._epoch, self._seq))
        except NotFound:
            return False
        self._seq += 1
        self._lines.extend(segment.splitlines())
        return True

    def _next_epoch(self) -> bool:
        """Go on to the next epoch, if there is one, once the last segment of this one is read."""
        try:
            self._store.head(lease_key(self._epoch + 1))
        except NotFound:
            return False
        # Before it was fenced the old writer may have written what was not there a moment ago.
        if not self._next_segment():
            self._epoch, self._seq = self._epoch + 1, 0
        return True


def newest_events(store: Store, epoch: int) -> list[dict[str, Any]]:
    """Of an epoch's first and last segment, in few requests: as the logarithm of their number."""
    known, step = -1, 1
    while _exists(store, segment_key(epoch, known + step)):
        known, step = known + step, 2 * step
    while step > 1:
        step //= 2
        if _exists(store, segment_key(epoch, known + step)):
            known += step
    lines = [store.read(segment_key(epoch, seq)).splitlines() for seq in sorted({0, known}) if known >= 0]
    return [json.loads(line) for segment in lines for line in segment]


def _exists(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


def segment_key(epoch: int, seq: int) -> str:
    return f"events/{epoch:06d}-{seq:06d}.jsonl"


def lease_key(epoch: int) -> str:
    return f"leases/{epoch:06d}.json"
