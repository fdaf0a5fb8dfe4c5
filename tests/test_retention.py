"""Retention: what goes, what stays, and that nothing half ever looks whole."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typer.testing import CliRunner

from orchestrator.retention import Garbage, Retention
from pipelines.cli import app
from tests.fake_mlflow import FakeMlflow
from workers.errors import CheckpointError
from workers.storage import FileStore, join_url, open_store
from workers.training.commits import Commit, CommitLog, Lease
from workers.training.manifest import MANIFEST, Manifest, checkpoint_directory, read_manifest

MODEL = "model-00000-of-00001.safetensors"


class Run:
    """A writer of a run's checkpoints, whose objects are a few bytes."""

    def __init__(self, runs: str, name: str, config: dict[str, Any] | None = None) -> None:
        self.url = join_url(runs, "runs", name)
        self.store = open_store(self.url)
        self.log = CommitLog(self.store)
        self.config = config or {"init": None, "fork": None}
        self.metrics: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self.lease: Lease = self.log.take_lease()
        self.parent = self.lease.continues

    def write(self, images_seen: int, *, manifest: bool = True) -> tuple[str, str]:
        """A checkpoint that no log has; its directory and digest."""
        directory = checkpoint_directory(images_seen, self.lease.epoch)
        data = b"x" * images_seen
        self.store.create(f"{directory}/{MODEL}", data)
        self.store.create(f"{directory}/part-00000.json", b"{}")
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content = Manifest(
            run="run", images_seen=images_seen, step=0, epoch=self.lease.epoch, parent=None, world_size=1,
            num_shards=1, objects={MODEL: entry}, shapes={}, scalars={}, config=self.config, sources=[],
            tallies=[], bad_samples=[], metrics=self.metrics, versions={}, complete=False,
        ).to_bytes()  # fmt: skip
        if manifest:
            self.store.create(f"{directory}/{MANIFEST}", content)
        return directory, hashlib.sha256(content).hexdigest()

    def commit(self, images_seen: int, *, complete: bool = False) -> Commit:
        directory, digest = self.write(images_seen)
        key = f"{directory}/{MANIFEST}"
        commit = self.log.append(
            self.lease, parent=self.parent, manifest=key, digest=digest, images_seen=images_seen,
            complete=complete,
        )  # fmt: skip
        self.parent = commit.seq
        return commit

    def has(self, commit: Commit) -> bool:
        """Whole, as a reader finds it."""
        try:
            manifest = read_manifest(self.store, commit.manifest, commit.digest)
        except CheckpointError:
            return False
        (entry,) = manifest.objects.values()
        data = self.store.read(f"{manifest.directory}/{MODEL}")
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        return True

    def url_of(self, commit: Commit) -> str:
        return join_url(self.url, commit.manifest)

    def directories(self) -> set[str]:
        return {info.key.split("/")[1] for info in self.store.list("checkpoints/")}


def collect(runs: str, needed: set[str] = frozenset(), keep: int | None = None, **how: Any) -> list[Garbage]:
    retention = Retention(runs, needed, keep=keep, **{"older_than": -10.0, **how})
    found = list(retention.garbage())
    for garbage in found:
        retention.delete(garbage)
    return found


def names(found: list[Garbage]) -> list[tuple[str, str]]:
    return [(garbage.directory.removeprefix("checkpoints/"), garbage.reason) for garbage in found]


def test_what_no_log_counts_goes_and_what_may_be_under_way_stays(store_url: str) -> None:
    run = Run(store_url, "a")
    run.commit(10)
    run.write(20)
    run.write(30, manifest=False)
    assert collect(store_url) == []  # its writer may be at work
    run.start()
    last = run.commit(20)
    run.write(30)
    found = collect(store_url)
    assert names(found) == [("000000000020-000000", "void"), ("000000000030-000000", "half")]
    assert [len(garbage.objects) for garbage in found] == [3, 2]
    assert found[1].size == 30 + 2
    assert run.directories() == {
        f"{images:012d}-{epoch:06d}" for images, epoch in ((10, 0), (20, 1), (30, 1))
    }
    assert run.has(last)
    run.commit(40, complete=True)
    assert names(collect(store_url)) == [("000000000030-000001", "void")]
    assert collect(store_url) == []


def test_the_newest_are_kept_and_of_a_run_that_goes_on_at_least_two(store_url: str) -> None:
    run = Run(store_url, "a")
    commits = [run.commit(images) for images in (1, 2, 3, 4)]
    assert names(collect(store_url, keep=3)) == [("000000000001-000000", "old")]
    assert names(collect(store_url, keep=1)) == [("000000000002-000000", "old")]
    assert [run.has(commit) for commit in commits] == [False, False, True, True]
    last = run.commit(5, complete=True)
    assert len(collect(store_url, keep=1)) == 2
    assert run.has(last)


def test_what_is_needed_elsewhere_stays(store_url: str) -> None:
    run = Run(store_url, "a")
    registered, forked, tuned, planned, old, *_ = [run.commit(images) for images in range(1, 8)]
    for name, field, commit in (("b", "fork", forked), ("c", "init", tuned)):
        child = Run(store_url, name, {field: {"manifest": run.url_of(commit)}})
        child.commit(1)
        child.commit(2)
    spec = {"configs": [{"init": {"manifest": run.url_of(planned)}, "fork": None}, {}]}
    open_store(store_url).create(f"jobs/{'0' * 64}.json", json.dumps(spec).encode())
    assert [garbage.run for garbage in collect(store_url, {run.url_of(registered)}, keep=2)] == ["a"]
    assert [run.has(commit) for commit in (registered, forked, tuned, planned, old)] == [True] * 4 + [False]
    # Under another address of the same store, too.
    assert names(collect(store_url, {f"s3://elsewhere/{run.url_of(registered)[8:]}"}, keep=2)) == []


def test_what_is_young_stays(store_url: str) -> None:
    run = Run(store_url, "a")
    half, _ = run.write(1, manifest=False)
    run.commit(2, complete=True)
    folder = Path(store_url.removeprefix("file://")) / "runs/a" / half
    os.utime(folder / MODEL, (0, 0))
    assert collect(store_url, older_than=3600) == []
    os.utime(folder / "part-00000.json", (0, 0))
    assert names(collect(store_url, older_than=3600)) == [("000000000001-000000", "half")]


def test_nothing_goes_while_it_is_not_known_what_others_need(store_url: str) -> None:
    run = Run(store_url, "a")
    first, second = run.commit(1), run.commit(2)
    run.start()
    store = open_store(store_url)
    store.write(f"runs/a/{second.manifest}", b"{}")
    assert collect(store_url) == []  # the first one's configuration is the same
    store.write(f"runs/a/{first.manifest}", b"{}")
    with pytest.raises(CheckpointError, match=r"runs/a/checkpoints/.*MANIFEST\.json: its sha256"):
        collect(store_url)
    spec = f"jobs/{'0' * 64}.json"
    other = Run(f"{store_url}/2", "b")
    other.commit(1)
    open_store(f"{store_url}/2").create(spec, b"[]")
    with pytest.raises(CheckpointError, match=rf"{spec} is damaged"):
        collect(f"{store_url}/2")


def test_uploads_of_dead_writers_go(store_url: str, tmp_path: Path) -> None:
    run = Run(store_url, "a")
    run.commit(1)
    folder = Path(store_url.removeprefix("file://")) / "runs/a"
    dead = ("checkpoints/000000000001-000000/.tmp-1", "commits/.tmp-2")
    under_way = "checkpoints/000000000002-000001/.tmp-3"
    run.start()
    for key in (*dead, under_way):
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).write_bytes(b"half")
    assert list(Retention(store_url, (), keep=None, older_than=3600).uploads()) == []
    retention = Retention(store_url, (), keep=None, older_than=-10)
    for upload in retention.uploads():
        retention.abort(upload)
    assert [(folder / key).exists() for key in (*dead, under_way)] == [False, False, True]


def test_the_command_tells_what_goes(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: FakeMlflow())
    site = tmp_path / "site.yaml"
    site.write_text(f"{{ray: 'http://x', mlflow: 'http://x', data: 'file:///x', runs: '{store_url}'}}")
    run = Run(store_url, "a")
    run.write(100)
    run.commit(101, complete=True)

    def gc(*arguments: str) -> str:
        command = ["gc", "--site", str(site), "--older-than", "0", *arguments]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    time.sleep(0.01)
    size = sum(info.size for info in run.store.list("checkpoints/000000000100-"))
    said = gc("--dry-run")
    assert re.search(rf"a +checkpoints/000000000100-000000 +void +3 +{size} ", said)
    assert f"would go: 1 checkpoints, {size} bytes; 0 unfinished uploads" in said
    assert len(run.directories()) == 2
    told = json.loads(gc("--keep", "1", "--json"))
    assert (told["bytes"], told["uploads"], told["deleted"]) == (size, [], True)
    assert len(run.directories()) == 1
    assert gc() == "gone: 0 checkpoints, 0 bytes; 0 unfinished uploads\n"


class Stopped(Exception):
    pass


class RetentionMachine(RuleBasedStateMachine):
    """A run whose writers come and go, while retention is asked for and stopped at any point."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runs = Path(self.folder.name).as_uri()
        self.run = Run(self.runs, "run")
        self.images = 0
        self.needed: list[Commit] = []
        self.keep = 10**6

    def teardown(self) -> None:
        self.folder.cleanup()

    def lineage(self) -> list[Commit]:
        head = self.run.log.head()
        return list(self.run.log.lineage_from(head.seq)) if head else []

    @rule()
    def commit(self) -> None:
        self.images += 1
        self.run.commit(self.images)

    @rule(manifest=st.booleans())
    def write_without_a_commit(self, manifest: bool) -> None:
        self.images += 1
        self.run.write(self.images, manifest=manifest)

    @rule()
    def start_again(self) -> None:
        self.run.start()

    @precondition(lambda self: len(self.lineage()) > 1)
    @rule()
    def fall_back(self) -> None:
        """The newest one turned out damaged."""
        self.run.start()
        self.run.parent = self.lineage()[1].seq
        self.commit()

    @precondition(lambda self: any(map(self.run.has, self.lineage())))
    @rule(data=st.data())
    def need(self, data: st.DataObject) -> None:
        """A version is registered."""
        self.needed.append(data.draw(st.sampled_from([c for c in self.lineage() if self.run.has(c)])))

    @rule(keep=st.integers(2, 4), stop_after=st.integers(0, 6) | st.none())
    def collect(self, keep: int, stop_after: int | None) -> None:
        self.keep = min(keep, self.keep)
        needed = [self.run.url_of(commit) for commit in self.needed]
        retention = Retention(self.runs, needed, keep=keep, older_than=-10)
        store = StoppedStore(retention._store.root, stop_after)
        retention._store = store
        with contextlib.suppress(Stopped):
            for garbage in list(retention.garbage()):
                retention.delete(garbage)
        if stop_after is None:
            kept = {c.manifest for c in [*self.lineage()[:keep], *self.needed]}
            own = f"{self.run.lease.epoch:06d}"
            lineage = {commit.manifest for commit in self.lineage()}
            for directory in self.run.directories():
                key = f"checkpoints/{directory}/{MANIFEST}"
                assert key in kept or (directory.endswith(own) and key not in lineage)

    @invariant()
    def nothing_that_is_needed_is_gone(self) -> None:
        for commit in [*self.lineage()[: min(self.keep, 2)], *self.needed]:
            assert self.run.has(commit)

    @invariant()
    def nothing_looks_whole_that_is_not(self) -> None:
        for commit in self.lineage():
            self.run.has(commit)


class StoppedStore(FileStore):
    """Whoever deletes is killed after so many objects."""

    def __init__(self, root: Path, left: int | None) -> None:
        super().__init__(root)
        self.left = left

    def delete(self, key: str) -> None:
        if self.left == 0:
            raise Stopped
        super().delete(key)
        if self.left:
            self.left -= 1


RetentionMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
TestRetention = RetentionMachine.TestCase
