"""Commits on their way to the store, while training goes on.

A thread of each rank makes the checkpoint's files in a spool, uploads them and announces its part by a
create-once object; the first rank's waits for all parts, writes the manifest and adds the log's entry. So
no rank speaks to another, and whenever one dies, there is an entry of a whole checkpoint or none.
"""

import hashlib
import json
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from workers import outage
from workers.errors import CheckpointError
from workers.storage import NotFound, Store, Unavailable, create_again
from workers.training.commits import Commit, CommitLog, Lease
from workers.training.manifest import MANIFEST, Manifest, checkpoint_directory, object_name
from workers.training.metrics import EventWriter
from workers.training.shard_place import ShardPlace
from workers.training.snapshot import Snapshot
from workers.training.spool import Spool

log = logging.getLogger(__name__)

UNDER_WAY = 2
"""Checkpoints in memory and spool; the next one waits until the oldest of them is committed."""
LAST_SECONDS = 10.0
"""For what is under way when training ended with an error."""
SHORTEST_POLL, LONGEST_POLL = 0.01, 1.0
"""Seconds between two looks for what another rank writes."""
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds until the next attempt, after those of the store itself came to nothing."""

Answer = TypeVar("Answer")
Found = TypeVar("Found")


@dataclass(frozen=True)
class _Checkpoint:
    directory: str
    manifest: Manifest
    """Without objects and parent, which are not known yet."""
    snapshot: Snapshot

    @property
    def key(self) -> str:
        return f"{self.directory}/{MANIFEST}"

    def part(self, index: int) -> str:
        return f"{self.directory}/part-{index:05d}.json"


class Committer:
    """One of each rank; all ranks hand in the same checkpoints in the same order.

    What goes wrong in the thread is raised by the next call.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        place: ShardPlace,
        events: EventWriter | None,
        *,
        parent: int | None,
        parent_digest: str | None,
    ) -> None:
        """`events` on the first rank alone. `parent`: the commit that the first one continues, and the sha256
        of its manifest; of a fork it has no number."""
        self.parent = parent
        self.parent_digest = parent_digest
        self._store = store
        self._lease = lease
        self._place = place
        self._events = events
        self._is_first = dist.get_rank() == 0
        self._log = CommitLog(store)
        self._queue: queue.SimpleQueue[_Checkpoint | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        """Guards the two below."""
        self._under_way = 0
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commits", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong: CheckpointError if another writer has taken over the run, DataError if the
        spool's disk is full or the store refuses what it is given. An outage is no error."""
        if self._error is not None:
            raise self._error

    def wait_for_room(self) -> None:
        """Until a checkpoint may be handed in."""
        self._wait_until(lambda: self._under_way < UNDER_WAY)

    def commit(self, manifest: Manifest, snapshot: Snapshot) -> None:
        """Hand in a checkpoint, after `wait_for_room`."""
        directory = checkpoint_directory(manifest.images_seen, manifest.epoch)
        with self._changed:
            self._under_way += 1
        self._queue.put(_Checkpoint(directory, manifest, snapshot))

    def wait(self) -> None:
        """Until all that was handed in is in the log, whatever rank this is."""
        self._wait_until(lambda: self._under_way == 0)

    def close(self) -> None:
        """Ends the thread; after an error of training the last checkpoints have a few seconds."""
        self._queue.put(None)
        self._thread.join(LAST_SECONDS)
        self._stopped.set()

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or condition())
        self.check()

    def _run(self) -> None:
        try:
            spool = Spool()
            try:
                while (checkpoint := self._queue.get()) is not None:
                    self._commit(checkpoint, spool)
                    with self._changed:
                        self._under_way -= 1
                        self._changed.notify_all()
            finally:
                spool.close()
        except BaseException as error:  # noqa: BLE001 - raised by the next call
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _commit(self, checkpoint: _Checkpoint, spool: Spool) -> None:
        checkpoint.snapshot.wait()
        if self._place.writes:
            self._write_part(checkpoint, spool)
        if self._is_first:
            commit = self._append(checkpoint, self._write_manifest(checkpoint))
        else:
            find = partial(self._log.find, self._lease, parent=self.parent, manifest=checkpoint.key)
            commit = self._poll(find)
        self.parent, self.parent_digest = commit.seq, commit.digest

    def _write_part(self, checkpoint: _Checkpoint, spool: Spool) -> None:
        """Rows leave memory for the disk, one kind after the other, while the kind before leaves that for the
        store."""
        rows, place = checkpoint.snapshot.rows, self._place
        objects = {}
        with ThreadPoolExecutor(1, "uploads") as uploads:
            upload: Future[None] | None = None
            for kind in list(rows):
                name = object_name(kind, place.index, place.count)
                file = spool.save(name, rows.pop(kind))
                if upload:
                    upload.result()
                upload = uploads.submit(self._upload, f"{checkpoint.directory}/{name}", file.path)
                objects[name] = {"size": file.size, "sha256": file.sha256}
            if upload:
                upload.result()
        self._create(checkpoint.part(place.index), json.dumps({"objects": objects}).encode())

    def _upload(self, key: str, path: Path) -> None:
        self._patiently(partial(self._store.upload, key, path))
        path.unlink()

    def _write_manifest(self, checkpoint: _Checkpoint) -> Manifest:
        """Once all parts are there."""
        objects: dict[str, dict[str, Any]] = {}
        for index in range(self._place.count):
            part = self._poll(partial(self._read, checkpoint.part(index)))
            objects |= json.loads(part)["objects"]
        scalars = checkpoint.snapshot.scalars()
        parent = self.parent_digest
        manifest = replace(checkpoint.manifest, objects=objects, scalars=scalars, parent=parent)
        self._create(checkpoint.key, manifest.to_bytes())
        return manifest

    def _append(self, checkpoint: _Checkpoint, manifest: Manifest) -> Commit:
        """To the log, after the events that it covers and before the one that tells of it."""
        if self._events:
            self._patiently(self._events.flush)
        append = partial(
            self._log.append,
            self._lease,
            parent=self.parent,
            manifest=checkpoint.key,
            digest=hashlib.sha256(manifest.to_bytes()).hexdigest(),
            images_seen=manifest.images_seen,
            complete=manifest.complete,
        )
        commit = self._patiently(append)
        if self._events:
            self._events.write("commit", commit.images_seen, seq=commit.seq, complete=commit.complete)
            self._patiently(self._events.flush)
        return commit

    def _create(self, key: str, data: bytes) -> None:
        self._patiently(partial(create_again, self._store, key, data))

    def _read(self, key: str) -> bytes | None:
        try:
            return self._store.read(key)
        except NotFound:
            return None

    def _poll(self, look: Callable[[], Found | None]) -> Found:
        """What another rank writes, once it is there; CheckpointError if the run is another group's now."""
        wait = SHORTEST_POLL
        while (found := self._patiently(look)) is None:
            self._patiently(partial(self._log.check_lease, self._lease))
            self._pause(wait)
            wait = min(2 * wait, LONGEST_POLL)
        return found

    def _patiently(self, request: Callable[[], Answer]) -> Answer:
        """An outage of the store, however long, is no failure of the run."""
        wait = SHORTEST_WAIT
        while True:
            try:
                return request()
            except Unavailable as error:
                log.warning("a commit waits for the store: %s", error)
            outage.note()
            self._pause(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise CheckpointError(
                f"{self._store.url}: training ended before its last checkpoint was committed"
            )
