"""The commit log against a model: writers come, go, are thought dead and come back late."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.errors import CheckpointError
from workers.storage import AlreadyExists, FileStore, NotFound, ObjectInfo
from workers.training.commits import Commit, CommitLog, Lease


class MemoryStore:
    """What a commit log needs of a store; `before_create` runs just before a key is made."""

    url = "memory://run"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.before_create: dict[str, Callable[[], object]] = {}

    def read(self, key: str, limit: int | None = None) -> bytes:
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key]

    def create(self, key: str, data: bytes) -> None:
        folder = key.partition("/")[0]
        if key not in self.objects and folder in self.before_create:
            self.before_create.pop(folder)()
        if key in self.objects:
            raise AlreadyExists(key)
        self.objects[key] = data

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise AssertionError("a listing may lag: the log never asks for one")


@dataclass(frozen=True)
class Writer:
    """A worker group: its lease, and the commit that its next one continues."""

    lease: Lease
    parent: int | None


def append(log: CommitLog, writer: Writer, images: int) -> Commit:
    return log.append(
        writer.lease,
        parent=writer.parent,
        manifest=f"checkpoints/{images}/MANIFEST.json",
        digest=f"{images:064x}",
        images_seen=images,
        complete=False,
    )


class CommitLogMachine(RuleBasedStateMachine):
    """The model is the chain of commits that count, and how many leases and commits there are."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.writers: list[Writer] = []
        """By epoch; the last one alone may write."""
        self.chain: list[Commit] = []
        self.num_commits = 0
        self.images = 0

    @property
    def head(self) -> int | None:
        return self.chain[-1].seq if self.chain else None

    def log(self) -> CommitLog:
        """Without a memory, as in a new process."""
        return CommitLog(self.store)

    @rule()
    def start(self) -> None:
        lease = self.log().take_lease()
        assert lease == Lease(len(self.writers), self.head)
        self.writers.append(Writer(lease, self.head))

    @precondition(lambda self: self.writers)
    @rule()
    def commit(self) -> None:
        """By the newest writer."""
        writer = self.writers[-1]
        self.images += 1
        commit = append(self.log(), writer, self.images)
        assert (commit.seq, commit.parent) == (self.num_commits, writer.parent)
        self.num_commits += 1
        self.chain = [*self.until(writer.parent), commit]
        self.writers[-1] = replace(writer, parent=commit.seq)

    @precondition(lambda self: self.writers and self.chain)
    @rule(back=st.integers(0, 3))
    def fall_back(self, back: int) -> None:
        """A new writer finds the newest commits damaged and goes on from an ancestor of them."""
        self.start()
        parent = self.chain[max(0, len(self.chain) - 1 - back)].seq
        self.writers[-1] = replace(self.writers[-1], parent=parent)
        self.commit()

    @precondition(lambda self: len(self.writers) > 1)
    @rule(data=st.data())
    def commit_late(self, data: st.DataObject) -> None:
        """A writer that was thought dead: it learns that it is, and nothing is written."""
        zombie = data.draw(st.sampled_from(self.writers[:-1]))
        with pytest.raises(CheckpointError, match="another writer has taken over this run"):
            append(self.log(), zombie, 10**6)

    @precondition(lambda self: self.writers)
    @rule()
    def commit_while_another_takes_over(self) -> None:
        """The lease is gone between the check and the write: the commit is there, and void."""
        self.images += 1
        self.store.before_create["commits"] = self.start
        with pytest.raises(CheckpointError, match="another writer has taken over this run"):
            append(self.log(), self.writers[-1], self.images)
        self.num_commits += 1

    @precondition(lambda self: self.writers)
    @rule()
    def take_over_while_another_commits(self) -> None:
        """The commit lands after the new lease's owner looked for the head: it counts no more."""
        self.images += 1
        old = self.writers[-1]
        self.store.before_create["leases"] = lambda: append(self.log(), old, self.images)
        self.start()
        self.num_commits += 1

    @precondition(lambda self: self.writers)
    @rule()
    def take_over_twice_at_once(self) -> None:
        """Of two that take a lease at the same moment one is first, and the other looks again."""
        self.store.before_create["leases"] = self.start
        lease = self.log().take_lease()
        assert lease == Lease(len(self.writers), self.head)
        self.writers.append(Writer(lease, self.head))

    @precondition(lambda self: self.writers)
    @rule()
    def take_over_while_another_commits_and_a_third_takes_over(self) -> None:
        """The commit is seen by the third, so it counts, and the first continues it as well."""

        def meanwhile() -> None:
            self.commit()
            self.start()

        self.store.before_create["leases"] = meanwhile
        lease = self.log().take_lease()
        assert lease == Lease(len(self.writers), self.head)
        self.writers.append(Writer(lease, self.head))

    def until(self, seq: int | None) -> list[Commit]:
        return [commit for commit in self.chain if seq is not None and commit.seq <= seq]

    @invariant()
    def the_head_is_the_models(self) -> None:
        log = self.log()
        assert log.head() == (self.chain[-1] if self.chain else None)
        assert list(log.lineage_from(self.head)) == self.chain[::-1]

    @invariant()
    def both_sequences_are_dense(self) -> None:
        expected = [f"leases/{epoch:06d}.json" for epoch in range(len(self.writers))]
        expected += [f"commits/{seq:08d}.json" for seq in range(self.num_commits)]
        assert sorted(self.store.objects) == sorted(expected)

    @invariant()
    def work_only_grows_along_the_lineage(self) -> None:
        images = [commit.images_seen for commit in self.chain]
        assert images == sorted(set(images))


CommitLogMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestCommitLog = CommitLogMachine.TestCase


@pytest.fixture
def log(tmp_path: Path) -> CommitLog:
    return CommitLog(FileStore(tmp_path))


def test_a_new_run_has_no_head(log: CommitLog) -> None:
    assert log.head() is None
    assert list(log.lineage_from(None)) == []
    assert log.take_lease() == Lease(0, None)
    assert log.head() is None


def test_what_is_in_the_store(log: CommitLog, tmp_path: Path) -> None:
    """The format: other versions will read it."""
    lease = log.take_lease()
    commit = log.append(
        lease, parent=None, manifest="checkpoints/64-0/MANIFEST.json", digest="d" * 64, images_seen=64,
        complete=True,
    )  # fmt: skip
    assert commit == log.head()
    assert json.loads((tmp_path / "commits/00000000.json").read_bytes()) == {
        "seq": 0,
        "epoch": 0,
        "parent": None,
        "manifest": "checkpoints/64-0/MANIFEST.json",
        "digest": "d" * 64,
        "images_seen": 64,
        "complete": True,
    }
    log.take_lease()
    assert json.loads((tmp_path / "leases/000001.json").read_bytes()) == {
        "epoch": 1,
        "continues": 0,
        "skipped": [],
    }
    assert log.head() == commit


def test_all_who_race_for_a_lease_get_different_ones(tmp_path: Path) -> None:
    leases: list[Lease] = []
    start = threading.Barrier(8)

    def take() -> None:
        log = CommitLog(FileStore(tmp_path))
        start.wait()
        for _ in range(5):
            leases.append(log.take_lease())

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.epoch for lease in leases) == list(range(40))


def test_of_all_who_race_to_write_one_lineage_is_left(tmp_path: Path) -> None:
    """Eight groups that each believe to be the run's only one, until they are told."""
    store = FileStore(tmp_path)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        log = CommitLog(store)
        lease = log.take_lease()
        writer = Writer(lease, lease.continues)
        for step in range(5):
            try:
                commit = append(log, writer, 100 * number + step)
            except CheckpointError:
                return
            writer = replace(writer, parent=commit.seq)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = CommitLog(store)
    head = log.head()
    assert head is not None
    lineage = list(log.lineage_from(head.seq))
    # The newest lease's owner was stopped by nobody.
    assert [commit.epoch for commit in lineage[:5]] == [7] * 5
    assert lineage[-1].parent is None
    for commit, parent in pairwise(lineage):
        assert commit.parent == parent.seq < commit.seq
        assert commit.epoch >= parent.epoch
    names = sorted(path.name for path in (tmp_path / "commits").iterdir())
    assert names == [f"{seq:08d}.json" for seq in range(len(names))]


def test_a_missing_commit_never_makes_a_run_start_again_silently(log: CommitLog, tmp_path: Path) -> None:
    writer = Writer(log.take_lease(), None)
    for images in range(3):
        writer = replace(writer, parent=append(log, writer, images).seq)
    log.take_lease()
    (tmp_path / "commits/00000002.json").unlink()
    for act in (log.head, log.take_lease, lambda: list(log.lineage_from(2))):
        with pytest.raises(CheckpointError, match=r"commits/00000002\.json is gone, though later records"):
            act()
    assert len(list((tmp_path / "leases").iterdir())) == 2


@pytest.mark.parametrize("key", ["commits/00000000.json", "leases/000000.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"seq": 0}', b"\xff"])
def test_a_damaged_record_is_named(log: CommitLog, tmp_path: Path, key: str, damage: bytes) -> None:
    append(log, Writer(log.take_lease(), None), 1)
    (tmp_path / key).write_bytes(damage)
    with pytest.raises(CheckpointError, match=rf"file://{tmp_path}/{key} is damaged; restore it"):
        log.head()
