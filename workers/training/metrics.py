"""What a run tells the world: create-once segments of JSON lines below `events/`.

Rank 0 writes `events/<epoch>-<seq>.jsonl`, where the epoch is that of its lease; anybody reads. Training
never talks to a tracking server, so none can stop it. Readers probe for the next segment and never list.
A `commit` comes later than what training tells meanwhile; everything else is in the order of images.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from workers.errors import DataError
from workers.storage import NotFound, Store, Unavailable, create_again

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
MAX_WAITING_BYTES = 64 << 20
"""Of lines that the store did not take yet: some 100,000 points. Then `write` waits."""
SEGMENT_BYTES = 4 * MAX_WAITING_BYTES
"""More than a segment has."""
LATEST = 4
"""Segments that hold a point of the curve, as a rule: commits and evaluations have some of their own."""


class EventWriter:
    """Collects events, of any thread; once started, a thread of its own writes a segment every few seconds.

    An outage of the store delays events and loses none.
    """

    def __init__(
        self, store: Store, epoch: int, tell: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        """`tell` hears each event at once, as `EventReader` gives it later, on the thread that writes it."""
        self._store = store
        self._epoch = epoch
        self._tell = tell
        self._seq = 0
        self._lines: list[str] = []
        self._size = 0
        """Bytes of the lines."""
        self._room = threading.Condition()
        """Guards the lines."""
        self._segment = b""
        """What is being written. The store may have it already, so it stays as it is until that is known."""
        self._flushing = threading.Lock()
        self._closed = threading.Event()
        self._error: DataError | None = None

    def write(self, kind: str, images_seen: int, **values: Any) -> None:
        """DataError if the thread could not write, for another reason than an outage."""
        event = {"kind": kind, "images_seen": images_seen, "time": time.time(), **values}
        line = json.dumps(event)
        with self._room:
            self._room.wait_for(lambda: self._error or self._size < MAX_WAITING_BYTES)
            if self._error:
                raise self._error
            self._lines.append(line)
            self._size += len(line)
        if self._tell:
            self._tell({"epoch": self._epoch, **event})

    def flush(self) -> None:
        """All that was written before is in the store; Unavailable if it is away: call again."""
        with self._flushing:
            # Twice: what an earlier call was not sure of is a segment of its own.
            for _ in range(2):
                if self._next_segment():
                    create_again(self._store, segment_key(self._epoch, self._seq), self._segment)
                    self._segment = b""
                    self._seq += 1

    def start(self) -> None:
        threading.Thread(target=self._flush_often, name="events", daemon=True).start()

    def close(self) -> None:
        """Ends the thread; `flush` before, if all is to be written."""
        self._closed.set()

    def _next_segment(self) -> bool:
        with self._room:
            if not self._segment and self._lines:
                self._segment = "\n".join(self._lines).encode()
                self._lines.clear()
                self._size = 0
                self._room.notify_all()
        return bool(self._segment)

    def _flush_often(self) -> None:
        away = False
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self.flush()
                away = False
            except Unavailable as error:
                if not away:
                    log.warning("events wait for the store: %s", error)
                away = True
            except DataError as error:
                with self._room:
                    self._error = error
                    self._room.notify_all()
                return


class EventReader:
    """Reads each event of a run once, in order; call `read` again for what has come since."""

    def __init__(self, store: Store, epoch: int = 0, seq: int = 0) -> None:
        """`epoch`, `seq`: of the segment to begin with."""
        self._store = store
        self._epoch = epoch
        self._seq = seq
        self._lines: deque[bytes] = deque()
        """Of the last segment; not handed out yet."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Events in order, each with its `epoch`; a newer epoch supersedes what it does not continue."""
        while self._lines or self._next_segment() or self._next_epoch():
            while self._lines:
                yield {"epoch": self._epoch, **parse_event(self._lines.popleft(), self._store.url)}

    def _next_segment(self) -> bool:
        try:
            segment = self._store.read(segment_key(self._epoch, self._seq), SEGMENT_BYTES)
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


def newest_segment(store: Store, epoch: int) -> int:
    """Number of an epoch's last segment, -1 if there is none, in few requests: as the logarithm of it."""
    known, step = -1, 1
    while _exists(store, segment_key(epoch, known + step)):
        known, step = known + step, 2 * step
    while step > 1:
        step //= 2
        if _exists(store, segment_key(epoch, known + step)):
            known += step
    return known


def newest_events(store: Store, epoch: int) -> list[dict[str, Any]]:
    """Of an epoch's first and last few segments, in few requests."""
    known = newest_segment(store, epoch)
    seqs = sorted({0, *range(max(0, known + 1 - LATEST), known + 1)}) if known >= 0 else []
    lines = [store.read(segment_key(epoch, seq), SEGMENT_BYTES).splitlines() for seq in seqs]
    return [parse_event(line, store.url) for segment in lines for line in segment]


def parse_event(line: bytes, run: str) -> dict[str, Any]:
    """DataError if it is none: whoever may write a run's events is not trusted with those who look at it."""
    try:
        event = json.loads(line)
        if isinstance(event["kind"], str) and isinstance(event["images_seen"], int):
            float(event["time"])
            return dict(event)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DataError(f"{run}/events holds {line[:80]!r}, which is no event; delete the segment that has it")


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
