"""What a run's own records say, looked at again and again: each look asks only for what may be new."""

from typing import Any

from orchestrator.job import JobSpec, run_url
from workers.config import RunConfig
from workers.storage import PATIENCE_SECONDS, open_store
from workers.training.commits import Commit, CommitLog, Lease
from workers.training.metrics import LATEST, EventReader, newest_segment

MAX_VALUES = 1000
"""Names of metrics that are kept; there are some 30."""


class RunRecords:
    def __init__(self, spec: JobSpec, config: RunConfig, *, patience: float = PATIENCE_SECONDS) -> None:
        """`patience`: seconds that a look waits for a store that is away."""
        self.spec, self.config = spec, config
        self._store = open_store(run_url(spec.runs, config), patience=patience)
        self._log = CommitLog(self._store)
        self._reader: EventReader | None = None
        self._epoch = -1
        """Of which it reads."""
        self.lease: Lease | None = None
        self.head: Commit | None = None
        self.committed_at: float | None = None
        """When the head was written, in seconds since 1970."""
        self._forget_events()

    def _forget_events(self) -> None:
        """Those of an epoch that another has followed."""
        self.images_seen = 0
        self.workers: int | None = None
        self.heard: float | None = None
        """When a worker last told something, in seconds since 1970."""
        self.values: dict[str, float] = {}
        """The newest metrics."""

    def look(self) -> None:
        """DataError if the store does not answer: what was found before stays."""
        lease, head = self._log.newer(self.lease, self.head)
        if head is not None and head != self.head:
            self.committed_at = self._log.written(head)
        self.lease, self.head = lease, head
        if lease is not None and lease.epoch != self._epoch:
            self._open_reader(lease.epoch)
        for event in self._reader.read() if self._reader else ():
            self._hear(event)

    def _open_reader(self, epoch: int) -> None:
        """At an epoch's first segment and its last few: a curve's past is nobody's news."""
        begin = max(0, newest_segment(self._store, epoch) + 1 - LATEST)
        first = next(EventReader(self._store, epoch).read()) if begin > 0 else None
        self._forget_events()
        if first is not None:
            self._hear(first)
        self._reader, self._epoch = EventReader(self._store, epoch, begin), epoch

    def _hear(self, event: dict[str, Any]) -> None:
        self.images_seen = max(self.images_seen, event["images_seen"])
        self.workers = event.get("world_size", self.workers)
        self.heard = event["time"]
        values = event.get("values", {})
        if isinstance(values, dict) and len(self.values) < MAX_VALUES:
            self.values |= {name: value for name, value in values.items() if isinstance(value, int | float)}
