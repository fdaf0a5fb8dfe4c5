"""A run's commit log: which checkpoints count, and who may add the next.

`commits/<seq>.json` and `leases/<epoch>.json` are dense create-once sequences, so the newest is found by
probing the next number, never by listing (a listing may lag). Whoever starts a worker group takes the next
lease, which names the commit that it continues. A commit of an older epoch that came later is void: that is
what keeps a writer that was thought dead from being heard. The store must create once atomically.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

from workers import outage
from workers.errors import CheckpointError
from workers.storage import (
    PATIENCE_SECONDS,
    RECORD_BYTES,
    AlreadyExists,
    NotFound,
    Store,
    Unavailable,
    join_url,
)
from workers.training.metrics import lease_key

log = logging.getLogger(__name__)

SHORTEST_WAIT, LONGEST_WAIT = 0.25, 10.0
"""Seconds before a lease that did not get to the store is written again."""


@dataclass(frozen=True)
class Commit:
    seq: int
    epoch: int
    """Of the lease under which it was written."""
    parent: int | None
    """The commit that this one continues."""
    manifest: str
    """Key of the MANIFEST.json."""
    digest: str
    """sha256 of that manifest."""
    images_seen: int
    complete: bool
    """The run has reached its end."""


class Window(NamedTuple):
    """Consecutive steps."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Lease:
    epoch: int
    continues: int | None
    skipped: tuple[Window, ...] = ()
    """Steps whose global batches are not trained on, in the order in which they were found out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "skipped", tuple(Window(*window) for window in self.skipped))

    def skips(self, step: int) -> bool:
        return any(window.first <= step <= window.last for window in self.skipped)


Record = TypeVar("Record", Commit, Lease)


class CommitLog:
    def __init__(self, store: Store) -> None:
        self.store = store

    def head(self) -> Commit | None:
        """The newest commit that counts."""
        lease = self.newest_lease()
        return self._head_under(lease) if lease is not None else None

    def newest_epoch(self) -> int | None:
        """Of the lease that counts."""
        lease = self.newest_lease()
        return None if lease is None else lease.epoch

    def lineage_from(self, seq: int | None) -> Iterator[Commit]:
        """A commit, its parent, and so on to the first."""
        while seq is not None:
            commit = self._existing(seq)
            yield commit
            seq = commit.parent

    def take_lease(self) -> Lease:
        """Become the run's only writer; everybody with an older lease is void from now on."""
        while True:
            newest = self.newest_lease()
            head = self._head_under(newest) if newest else None
            epoch, skipped = (newest.epoch + 1, newest.skipped) if newest else (0, ())
            lease = Lease(epoch, head.seq if head else None, skipped)
            try:
                self._create_lease(lease)
            except AlreadyExists:
                continue
            return lease

    def roll_back(self, lease: Lease, window: Window, images_seen: int) -> Lease:
        """The lease after this one: it skips the window, too, and continues the newest commit of at most
        `images_seen`; later ones are void. CheckpointError if another writer has taken over."""
        commit = self._head_under(lease)
        while commit is not None and commit.images_seen > images_seen:
            commit = None if commit.parent is None else self._existing(commit.parent)
        after = Lease(lease.epoch + 1, commit.seq if commit else None, (*lease.skipped, window))
        try:
            self._create_lease(after)
        except AlreadyExists:
            # Ours if an earlier attempt wrote it and did not hear so: nobody else skips that window.
            if self._lease(after.epoch) != after:
                self.check_lease(lease)
                raise
        return after

    def append(
        self,
        lease: Lease,
        *,
        parent: int | None,
        manifest: str,
        digest: str,
        images_seen: int,
        complete: bool,
    ) -> Commit:
        """Add a commit; CheckpointError if a newer lease exists. After Unavailable call it again."""
        seq = 0 if parent is None else parent + 1
        while True:
            self.check_lease(lease)
            commit = Commit(seq, lease.epoch, parent, manifest, digest, images_seen, complete)
            try:
                self.store.create(_commit_key(seq), json.dumps(asdict(commit)).encode())
            except AlreadyExists:
                # Ours if an earlier call wrote it and did not hear so.
                if self._commit(seq) != commit:
                    seq += 1
                    continue
            # A newer lease may have been taken between the check and the write; then this commit is void.
            self.check_lease(lease)
            return commit

    def find(self, lease: Lease, *, parent: int | None, manifest: str) -> Commit | None:
        """The entry of a checkpoint of this lease, if it is there."""
        seq = 0 if parent is None else parent + 1
        while (commit := self._commit(seq)) is not None:
            if (commit.epoch, commit.manifest) == (lease.epoch, manifest):
                return commit
            seq += 1
        return None

    def _create_lease(self, lease: Lease) -> None:
        """As reads do, it waits for a store that is away. AlreadyExists also if an attempt of this very call
        wrote it, whose reply was lost."""
        deadline, wait = time.monotonic() + PATIENCE_SECONDS, SHORTEST_WAIT
        while True:
            try:
                return self.store.create(lease_key(lease.epoch), json.dumps(asdict(lease)).encode())
            except Unavailable as error:
                if time.monotonic() + wait > deadline:
                    raise
                log.warning("a lease waits for the store: %s", error)
            outage.note()
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def check_lease(self, lease: Lease) -> None:
        """CheckpointError if a newer lease exists."""
        if self._lease(lease.epoch + 1) is not None:
            raise CheckpointError(
                f"{self.store.url}: another writer has taken over this run (lease {lease.epoch + 1}); "
                "this one ends without a trace in the result"
            )

    def newer(self, lease: Lease | None, head: Commit | None) -> tuple[Lease | None, Commit | None]:
        """The newest lease and the head under it now, where an earlier look found these: asks only for what
        may have come since."""
        newest = self.newest_lease(lease)
        if newest is None:
            return None, None
        return newest, self._head_under(newest, head if newest == lease else None)

    def written(self, commit: Commit) -> float:
        """When, in seconds since 1970, by the store's clock."""
        return self.store.modified(_commit_key(commit.seq))

    def newest_lease(self, newest: Lease | None = None) -> Lease | None:
        """Whose owner alone may commit; an earlier one spares asking for those before it."""
        while (lease := self._lease(newest.epoch + 1 if newest else 0)) is not None:
            newest = lease
        return newest

    def _head_under(self, lease: Lease, head: Commit | None = None) -> Commit | None:
        """`head`: an earlier one under this lease."""
        if head is None and lease.continues is not None:
            head = self._existing(lease.continues)
        seq = 0 if head is None else head.seq + 1
        while (commit := self._commit(seq)) is not None:
            if commit.epoch == lease.epoch:
                head = commit
            seq += 1
        return head

    def _lease(self, epoch: int) -> Lease | None:
        return self._read(lease_key(epoch), Lease)

    def _commit(self, seq: int) -> Commit | None:
        return self._read(_commit_key(seq), Commit)

    def _existing(self, seq: int) -> Commit:
        """A commit that another record names: without it the log means something else."""
        commit = self._commit(seq)
        if commit is None:
            raise CheckpointError(
                f"{join_url(self.store.url, _commit_key(seq))} is gone, though later records continue it; "
                "restore it, or delete the run to start again"
            )
        return commit

    def _read(self, key: str, kind: type[Record]) -> Record | None:
        try:
            data = self.store.read(key, RECORD_BYTES)
        except NotFound:
            return None
        try:
            return kind(**json.loads(data))
        except (ValueError, TypeError):
            raise CheckpointError(
                f"{join_url(self.store.url, key)} is damaged; restore it, or delete the run to start again"
            ) from None


def _commit_key(seq: int) -> str:
    return f"commits/{seq:08d}.json"
