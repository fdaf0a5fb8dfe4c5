"""Commits while training goes on: outages, back-pressure, full disks, spools of the dead."""

import contextlib
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.distributed import Ranks, on_ranks, recorded_logs
from tests.fault_proxy import FaultProxy
from tests.runs import BATCH, CPU, HookedStore, die, outcome, replay, tiny_config, train_on, train_rank
from tests.s3_server import ENVIRONMENT, s3_server
from workers.errors import DataError
from workers.storage import Unavailable, ensure_bucket, open_store, s3_client
from workers.training import commits, loop, metrics
from workers.training import committer as committer_module
from workers.training.commits import CommitLog, Lease, Window
from workers.training.committer import UNDER_WAY, Committer
from workers.training.manifest import Manifest
from workers.training.shard_place import ShardPlace
from workers.training.snapshot import Snapshot
from workers.training.spool import PREFIX, Spool
from workers.training.state import share_lease


@pytest.fixture(scope="module")
def config(digits_url):
    """Six steps, a commit after each."""
    return tiny_config(digits_url, f"train.checkpoint_every_images={BATCH}", steps=6)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    url = (tmp_path_factory.mktemp("undisturbed") / "run").as_uri()
    train_on(2, config, url)
    return url


def train_over_s3(config, url, endpoint):
    os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": endpoint}
    train_rank(config, url)


def test_an_outage_of_the_store_while_committing_loses_nothing(config, undisturbed, monkeypatch):
    with s3_server() as server, FaultProxy(server) as proxy, monkeypatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": server}.items():
            patch.setenv(name, value)
        s3_client.cache_clear()
        url = "s3://vitscale/run"
        ensure_bucket(url)
        log = CommitLog(open_store(url))
        with Ranks(2, train_over_s3, config, url, proxy.url) as ranks:
            while (head := log.head()) is None or head.seq < 1:
                time.sleep(0.01)
            with proxy.outage():
                time.sleep(2)
            ranks.results()
        assert outcome(url) == outcome(undisturbed)
        assert replay(url) == replay(undisturbed)
        assert [commit.epoch for commit in log.lineage_from(log.head().seq)] == [0] * 6
    s3_client.cache_clear()


class LossyStore:
    """Of each object the first request is lost, the second one's reply, and the third comes through."""

    def __init__(self, store, *, spared=None):
        self._store = store
        self._spared = spared
        self._attempts = Counter()

    def create(self, key, data):
        self._lose(key, lambda: self._store.create(key, data))

    def upload(self, key, path):
        self._lose(key, lambda: self._store.upload(key, path))

    def _lose(self, key, request):
        if self._spared and key.startswith(self._spared):
            return request()
        self._attempts[key] += 1
        if self._attempts[key] > 1:
            request()
        if self._attempts[key] < 3:
            raise Unavailable(f"{key}: the store is away")

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_a_lease_waits_for_a_store_that_is_away(store_url, monkeypatch):
    monkeypatch.setattr(commits, "SHORTEST_WAIT", 0.01)
    store = LossyStore(open_store(store_url), spared="leases/000001")
    assert (
        CommitLog(store).take_lease().epoch == 1
    )  # whose the first is cannot be told: all leases look alike
    assert CommitLog(open_store(store_url)).newest_epoch() == 1


def test_a_roll_back_whose_reply_is_lost_is_recognised(store_url, monkeypatch):
    monkeypatch.setattr(commits, "SHORTEST_WAIT", 0.01)
    lease = CommitLog(open_store(store_url)).take_lease()
    after = CommitLog(LossyStore(open_store(store_url))).roll_back(lease, Window(3, 4), 0)
    assert after == CommitLog(open_store(store_url)).newest_lease() == Lease(1, None, (Window(3, 4),))


def test_a_lease_does_not_wait_for_ever(store_url, monkeypatch):
    monkeypatch.setattr(commits, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(commits, "SHORTEST_WAIT", 0.06)
    store = HookedStore(open_store(store_url), away)
    with pytest.raises(Unavailable, match="away"):
        CommitLog(store).take_lease()


def away(key):
    raise Unavailable(f"{key}: the store is away")


def train_with_losses(config, url):
    committer_module.SHORTEST_WAIT = metrics.FLUSH_SECONDS = 0.01
    loop.open_store = lambda url: LossyStore(open_store(url), spared="leases/")
    loop.train(config, url, CPU)


def test_what_was_written_though_nobody_said_so_is_recognised(config, undisturbed, store_url):
    on_ranks(2, train_with_losses, config, store_url)
    assert outcome(store_url) == outcome(undisturbed)
    assert replay(store_url) == replay(undisturbed)
    log = CommitLog(open_store(store_url))
    assert [commit.seq for commit in log.lineage_from(log.head().seq)] == [5, 4, 3, 2, 1, 0]


class ClosedStore:
    """Uploads wait until it is open."""

    def __init__(self, store):
        self._store = store
        self.open = threading.Event()

    def upload(self, key, path):
        self.open.wait()
        self._store.upload(key, path)

    def __getattr__(self, name):
        return getattr(self._store, name)


def empty_manifest(images_seen):
    return Manifest(
        run="run", images_seen=images_seen, step=0, epoch=0, parent=None, world_size=1, num_shards=1,
        objects={}, shapes={"weight": [2]}, scalars={}, config={}, sources=[], tallies=[], bad_samples=[],
        metrics={}, versions={}, complete=False,
    )  # fmt: skip


def make_committer(store):
    return Committer(store, share_lease(store, CPU), ShardPlace(0, 1), None, parent=None, parent_digest=None)


def hand_in(committer, images_seen):
    rows = {"model": {"weight": torch.full((2,), float(images_seen))}}
    committer.wait_for_room()
    committer.commit(empty_manifest(images_seen), Snapshot(rows, {}, {}, None))


def commit_more_than_there_is_room_for(url):
    store = ClosedStore(open_store(url))
    committer = make_committer(store)
    handed_in = []

    def hand_in_all():
        for images_seen in range(5):
            hand_in(committer, images_seen)
            handed_in.append(images_seen)

    with recorded_logs() as lines:
        thread = threading.Thread(target=hand_in_all)
        thread.start()
        while len(handed_in) < UNDER_WAY:
            time.sleep(0.001)
        thread.join(0.2)
        waiting = list(handed_in)
        files = [path.name for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/*")]
        store.open.set()
        thread.join()
        committer.wait()
        committer.close()
    return waiting, files, lines


def test_a_store_that_is_too_slow_holds_training_up(store_url, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ((waiting, files, lines),) = on_ranks(
        1, with_spool_in, tmp_path, commit_more_than_there_is_room_for, store_url
    )
    assert waiting == [0, 1]
    assert files == ["model-00000-of-00001.safetensors"]
    assert lines == []
    store = open_store(store_url)
    log = CommitLog(store)
    commits = list(log.lineage_from(log.head().seq))[::-1]
    assert [commit.seq for commit in commits] == [0, 1, 2, 3, 4]
    for commit in commits:
        data = store.read(f"{commit.manifest.rpartition('/')[0]}/model-00000-of-00001.safetensors")
        assert safetensors.torch.load(data)["weight"].tolist() == [commit.images_seen] * 2
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def with_spool_in(folder, function, *arguments):
    """On a rank, whose own temporary folder is another."""
    tempfile.tempdir = str(folder)
    return function(*arguments)


def fill_the_disk(url):
    committer = make_committer(open_store(url))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    rows = {"model": {"weight": torch.zeros(10_000)}}
    committer.commit(empty_manifest(0), Snapshot(rows, {}, {}, None))
    with contextlib.suppress(DataError):
        committer.wait()
    committer.close()
    committer.check()


def test_a_full_disk_is_named(store_url, tmp_path):
    message = (
        rf"{tmp_path}/{PREFIX}.*: 40,000 bytes of a checkpoint do not fit there .*set TMPDIR to a folder"
    )
    with pytest.raises(DataError, match=message):
        on_ranks(1, with_spool_in, tmp_path, fill_the_disk, store_url)
    assert [info.key for info in open_store(store_url).list()] == ["leases/000000.json"]
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def leave_a_spool(folder, opened):
    tempfile.tempdir = str(folder)
    spool = Spool()
    spool.save("model", {"weight": torch.zeros(3)})
    opened.set()
    time.sleep(60)
    die()


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("forkserver")
    opened = context.Event()
    process = context.Process(target=leave_a_spool, args=(tmp_path, opened))
    process.start()
    assert opened.wait(60)
    (left,) = tmp_path.iterdir()
    assert left.stat().st_mode & 0o777 == 0o700
    first = Spool()
    assert set(tmp_path.iterdir()) == {left, first.path}
    process.kill()
    process.join()
    assert left.exists()
    second = Spool()
    assert set(tmp_path.iterdir()) == {first.path, second.path}
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []
