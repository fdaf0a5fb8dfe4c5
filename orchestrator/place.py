"""A worker group's place in the queue, from when it wants one until it needs none any more."""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from orchestrator.packing import Resources
from orchestrator.queue import Entry, Quota, Share, allot
from orchestrator.queue_records import (
    FORGOTTEN_SECONDS,
    SILENT_SECONDS,
    EntryReader,
    entry_key,
    read_quotas,
    remove_entry,
    write_entry,
)
from workers.errors import DataError
from workers.storage import open_store

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Between two writes of an entry, and as old may be what a driver knows of the others."""


@dataclass(frozen=True)
class _Known:
    """The queue at one moment, as far as this process knows."""

    entries: tuple[Entry, ...]
    """Of those that live; the own one is among them."""
    quotas: Mapping[str, Quota]
    then: float
    """The moment, by the store's clock; and by this process's."""
    at: float

    def now(self) -> float:
        """By the store's clock, so that all agree whatever the hosts' clocks say."""
        return self.then + time.monotonic() - self.at


class Place:
    """While `with` lasts, a thread writes the entry again and again, and reads those of others.

    A store that is away changes nothing: what was known last counts until it is back.
    """

    def __init__(self, runs: str, entry: Entry) -> None:
        """`runs`: URL of the store of runs."""
        self._ended = threading.Event()
        self._store = open_store(runs, stopped=self._ended.is_set)
        self._reader = EntryReader(self._store)
        self._entry = entry
        self._writing = threading.Lock()
        """Of the entry, in whichever thread; who only wants to know its share waits for nobody."""
        self._known = _Known((entry,), {}, 0.0, 0.0)
        self._thread = threading.Thread(target=self._beat, name="queue", daemon=True)

    def __enter__(self) -> Self:
        """DataError if the queue cannot be written or read."""
        self._look()
        if self._entry.at is None:
            self._change(at=self._known.then)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(DataError):
            remove_entry(self._store, self._entry.name)

    def share(self, nodes: Sequence[Resources] | None) -> Share:
        """As `allot` has it."""
        known = self._known
        return allot(known.entries, known.quotas, nodes)[self._entry.name]

    def take(self, workers: int, nodes: Sequence[Resources] | None) -> bool:
        """Tell the others that so many run; False if one of them was faster, and then none do."""
        self._change(started=self._entry.started or self._next(), workers=workers, note="")
        if self.share(nodes).workers >= workers:
            return True
        self.wait("")
        return False

    def wait(self, note: str) -> None:
        """Tell the others that none run, and what is waited for."""
        self._change(started=None, workers=0, note=note)

    def _next(self) -> float:
        """Now, and after all who have started: clocks are read as well as that goes over a network."""
        with self._writing:
            self._try_to_look()
        started = (entry.started for entry in self._known.entries if entry.started is not None)
        return max(self._known.now(), max(started, default=0.0) + 0.001)

    def _change(self, **fields: Any) -> None:
        with self._writing:
            entry = self._entry.model_copy(update=fields)
            if entry == self._entry:
                return
            self._entry = entry
            others = (other for other in self._known.entries if other.name != entry.name)
            self._known = replace(self._known, entries=(entry, *others))
            self._try_to_look()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with self._writing:
                self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self._look()
        except DataError as error:
            log.warning("the queue is as it was known last: %s", error)

    def _look(self) -> None:
        """Writes first: of two drivers that come at once, one at least sees the other."""
        write_entry(self._store, self._entry)
        seen, quotas = self._reader.read(), read_quotas(self._store)
        own = seen.pop(self._entry.name, None)
        # A store may list a new object a little later.
        then = own.modified if own is not None else self._store.modified(entry_key(self._entry.name))
        alive = [other.entry for other in seen.values() if then - other.modified <= SILENT_SECONDS]
        self._known = _Known((self._entry, *alive), quotas, then, time.monotonic())
        for name, other in seen.items():
            if then - other.modified > FORGOTTEN_SECONDS:
                remove_entry(self._store, name)
