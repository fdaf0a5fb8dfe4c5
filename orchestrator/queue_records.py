"""The queue in the store of runs: an entry for each worker group, and the quotas.

An entry is written by its driver alone, again and again; one that is not any more counts no longer. Whoever
may write these objects can change them: the queue is for people who share a cluster, not against them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from orchestrator.queue import Entry, Quota
from workers.errors import DataError
from workers.storage import RECORD_BYTES, NotFound, Store, TooLarge

log = logging.getLogger(__name__)

ENTRIES, QUOTAS = "queue/entries/", "queue/quotas.json"
SILENT_SECONDS = 60.0
"""An entry that was not written for so long is of a driver that died."""
FORGOTTEN_SECONDS = 24 * 3600.0
"""After which somebody else may remove it."""
_QUOTAS = TypeAdapter(dict[str, Quota])


@dataclass(frozen=True)
class Seen:
    entry: Entry
    modified: float
    """When it was written, in seconds since 1970 by the store's clock."""


class EntryReader:
    """Reads what has changed since it looked last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, tuple[str, Entry | None]] = {}
        """ETag and content of each object."""

    def read(self) -> dict[str, Seen]:
        """By name. What is no entry is passed over: it must not stop a run."""
        found: dict[str, Seen] = {}
        read: dict[str, tuple[str, Entry | None]] = {}
        for info in self._store.list(ENTRIES):
            known = self._read.get(info.key)
            try:
                entry = known[1] if known and known[0] == info.etag else self._parse(info.key)
            except NotFound:
                continue
            read[info.key] = info.etag, entry
            if entry is not None and info.key == entry_key(entry.name):
                found[entry.name] = Seen(entry, info.modified)
        self._read = read
        return found

    def _parse(self, key: str) -> Entry | None:
        try:
            return Entry.model_validate_json(self._store.read(key, RECORD_BYTES))
        except (ValidationError, TooLarge) as error:
            log.warning("%s/%s is no entry of a queue: %s", self._store.url, key, error)
            return None


def entry_key(name: str) -> str:
    return f"{ENTRIES}{name}.json"


def write_entry(store: Store, entry: Entry) -> None:
    store.write(entry_key(entry.name), entry.model_dump_json().encode())


def remove_entry(store: Store, name: str) -> None:
    store.delete(entry_key(name))


def read_quotas(store: Store) -> dict[str, Quota]:
    """By the queues' names; DataError if they cannot be read."""
    try:
        return _QUOTAS.validate_json(store.read(QUOTAS, RECORD_BYTES))
    except NotFound:
        return {}
    except ValidationError:
        raise DataError(
            f"{store.url}/{QUOTAS} holds no quotas; delete it, then `vitscale queue limit` writes it anew"
        ) from None


def write_quotas(store: Store, quotas: Mapping[str, Quota]) -> None:
    store.write(QUOTAS, _QUOTAS.dump_json(dict(sorted(quotas.items())), exclude_none=True))
