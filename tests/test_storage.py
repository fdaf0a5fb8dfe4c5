"""Stores: what holds on `file://` and on S3 servers alike, then each alone, and S3 behind faults."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import pickle
import random
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from orchestrator.site import Site
from tests.fault_proxy import (
    SLOW_DOWN,
    Answer,
    Cut,
    Fault,
    FaultProxy,
    Headers,
    Length,
    LoseReply,
    Meanwhile,
    Stall,
)
from tests.s3_server import ENVIRONMENT, s3_server
from workers import s3 as s3_module
from workers import s3_upload, storage
from workers.errors import ConfigError, DataError
from workers.storage import (
    RACERS,
    RACES,
    AlreadyExists,
    Changed,
    FileStore,
    NotFound,
    S3Store,
    Store,
    Truncated,
    Unavailable,
    ensure_bucket,
    join_url,
    open_store,
    probe,
)

BODY = random.Random(0).randbytes(300_000)


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def proxy_to(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], FaultProxy]]:
    """Puts a proxy in front of "moto" or "swift"; this process's S3 client goes through it."""
    with contextlib.ExitStack() as stack:

        def start(server: str) -> FaultProxy:
            if server == "moto":
                endpoint = request.getfixturevalue("moto")
                for name, value in ENVIRONMENT.items():
                    monkeypatch.setenv(name, value)
            else:
                endpoint = request.getfixturevalue("services").s3_endpoint
                if endpoint is None:
                    pytest.skip("the object store needs a file system with user xattrs")
            proxy = stack.enter_context(FaultProxy(endpoint))
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
            storage.s3_client.cache_clear()
            ensure_bucket("s3://vitscale")
            del proxy.requests[:]
            return proxy

        yield start
    storage.s3_client.cache_clear()


SWIFT = pytest.param("swift", marks=pytest.mark.services)


@pytest.fixture(params=["moto", SWIFT])
def proxy(request: pytest.FixtureRequest, proxy_to: Callable[[str], FaultProxy]) -> FaultProxy:
    return proxy_to(request.param)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which anything would have slept between attempts; threads of earlier tests do sleep."""
    waits: list[float] = []
    others = set(threading.enumerate()) - {threading.current_thread()}
    sleep = time.sleep

    def slept(seconds: float) -> None:
        (sleep if threading.current_thread() in others else waits.append)(seconds)

    monkeypatch.setattr(time, "sleep", slept)
    return waits


@pytest.fixture
def s3_url(request: pytest.FixtureRequest) -> str:
    """Of this test alone."""
    return f"s3://vitscale/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"


@pytest.fixture
def s3(proxy: FaultProxy, s3_url: str) -> S3Store:
    store = open_store(s3_url)
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def swift(proxy_to: Callable[[str], FaultProxy], s3_url: str) -> Store:
    proxy_to("swift")
    return open_store(s3_url)


@pytest.fixture(params=["file", "moto", SWIFT])
def store(
    request: pytest.FixtureRequest, store_url: str, s3_url: str, proxy_to: Callable[[str], FaultProxy]
) -> Store:
    if request.param == "file":
        return open_store(store_url)
    proxy_to(request.param)
    return open_store(s3_url)


def test_what_is_written_comes_back_whole_and_in_ranges(store: Store) -> None:
    store.write("deep/er/a.bin", BODY)
    assert store.read("deep/er/a.bin") == BODY
    assert store.read_range("deep/er/a.bin", 0, 1) == BODY[:1]
    assert store.read_range("deep/er/a.bin", 100_000, 150_001) == BODY[100_000:250_001]
    assert store.read_range("deep/er/a.bin", len(BODY) - 1, 1) == BODY[-1:]
    assert store.read_range("deep/er/a.bin", 7, 0) == b""
    store.write("deep/er/a.bin", b"new")
    assert store.read("deep/er/a.bin") == b"new"
    store.write("empty", b"")
    assert store.read("empty") == b""
    assert store.head("empty").size == 0


@pytest.mark.parametrize(("start", "length"), [(len(BODY) - 10, 11), (len(BODY), 1), (len(BODY) + 99, 5)])
def test_a_range_beyond_the_end_is_a_truncated_object(store: Store, start: int, length: int) -> None:
    store.write("a", BODY)
    with pytest.raises(
        Truncated,
        match=rf"{store.url}/a: wanted {length} bytes from byte {start}, .* the object is truncated",
    ):
        store.read_range("a", start, length)


def test_another_version_than_the_indexed_one_is_refused(store: Store) -> None:
    store.write("a", BODY)
    etag = store.head("a").etag
    assert store.read_range("a", 5, 5, etag) == BODY[5:10]
    store.write("a", BODY[:-1] + b"x" * 2)
    with pytest.raises(Changed, match=rf"{store.url}/a changed since it was indexed; run `vitscale index`"):
        store.read_range("a", 5, 5, etag)
    assert store.read_range("a", 5, 5, store.head("a").etag) == BODY[5:10]


def test_what_is_not_there_is_named(store: Store) -> None:
    store.write("folder/a", b"1")
    for key in ("b", "folder", "folder/a/b"):
        for read in (store.read, store.head, lambda key: store.read_range(key, 0, 1)):
            with pytest.raises(NotFound, match=rf"no object {store.url}/{key}$"):
                read(key)
        store.delete(key)
    assert store.read("folder/a") == b"1"


def test_create_never_replaces(store: Store) -> None:
    store.create("runs/1", b"first")
    with pytest.raises(AlreadyExists, match=rf"{store.url}/runs/1 exists"):
        store.create("runs/1", b"second")
    assert store.read("runs/1") == b"first"
    store.delete("runs/1")
    store.create("runs/1", b"third")
    assert store.read("runs/1") == b"third"


def test_a_listing_has_each_object_below_the_prefix_in_the_order_of_keys(store: Store) -> None:
    keys = ["a-", "a.b", "a/b-", "a/b/c", "a/d/.hidden", "ab", "b/a", "ä/ü 1+2%.tar"]
    assert keys == sorted(keys)
    for key in reversed(keys):
        store.write(key, key.encode())
    found = list(store.list())
    assert [info.key for info in found] == keys
    assert found == [store.head(key) for key in keys]
    for prefix in ("a", "a/", "a/b", "a/b/", "a/d/.h", "ä/ü 1+", "none", "none/at/all"):
        assert [info.key for info in store.list(prefix)] == [key for key in keys if key.startswith(prefix)]
    for key in keys:
        assert open_store(store.url).read(key) == key.encode()
        store.delete(key)
    assert list(store.list()) == []


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest that S3 takes."""
    monkeypatch.setattr(s3_upload, "ONE_REQUEST", 5 << 20)
    monkeypatch.setattr(s3_upload, "PART", 5 << 20)


def test_a_large_file_is_uploaded(store: Store, tmp_path: Path, small_parts: None) -> None:
    """In two parts on S3."""
    data = random.Random(1).randbytes(9 << 20)
    (tmp_path / "shard.tar").write_bytes(data)
    store.upload("shards/0.tar", tmp_path / "shard.tar")
    info = store.head("shards/0.tar")
    assert info.size == len(data)
    assert store.read("shards/0.tar") == data
    assert store.read_range("shards/0.tar", (5 << 20) - 5, 10, info.etag) == data[(5 << 20) - 5 :][:10]
    (tmp_path / "shard.tar").write_bytes(b"small")
    store.upload("shards/0.tar", tmp_path / "shard.tar")
    assert store.read("shards/0.tar") == b"small"
    assert list(store.uploads()) == []


def test_it_is_told_when_an_object_was_written(store: Store) -> None:
    before = time.time()
    store.write("a", b"1")
    assert before - 2 < store.modified("a") < time.time() + 2
    with pytest.raises(NotFound):
        store.modified("b")


def test_an_upload_that_ends_early_leaves_nothing(
    s3: S3Store, proxy: FaultProxy, tmp_path: Path, waits: list[float], small_parts: None
) -> None:
    (tmp_path / "shard").write_bytes(bytes(11 << 20))
    s3.write("shard", b"what was there")
    # The upload is begun; then one of its parts is refused.
    proxy.faults += [Meanwhile(lambda: None), Answer(400)]
    with pytest.raises(DataError, match=rf"{s3.url}/shard"):
        s3.upload("shard", tmp_path / "shard")
    assert list(s3.uploads()) == []
    assert s3.read("shard") == b"what was there"


def test_an_upload_whose_last_reply_is_lost_is_done(
    s3: S3Store, proxy: FaultProxy, tmp_path: Path, waits: list[float], small_parts: None
) -> None:
    """botocore asks again to complete it and is told that there is no such upload."""
    data = random.Random(3).randbytes(11 << 20)
    (tmp_path / "shard").write_bytes(data)
    proxy.faults += [Meanwhile(lambda: None)] * 4 + [LoseReply()]
    s3.upload("shard", tmp_path / "shard")
    assert s3.read("shard") == data
    assert "GET" not in [method for method, _ in proxy.requests][:-1]


def test_uploads_of_the_dead_are_found_and_removed(s3: S3Store) -> None:
    client = s3._client
    for key in ("runs/a/x", "runs/a/y", "runs/b"):
        name = {"Bucket": s3.bucket, "Key": f"{s3.prefix}/{key}"}
        upload = client.write("create_multipart_upload", s3.url, **name)["UploadId"]
        client.write("upload_part", s3.url, **name, UploadId=upload, PartNumber=1, Body=b"1")
    found = list(s3.uploads("runs/a/"))
    assert [upload.key for upload in found] == ["runs/a/x", "runs/a/y"]
    assert all(0 < upload.begun < time.time() + 2 for upload in found)
    assert list(s3.list()) == []
    for upload in found:
        s3.abort(upload)
        s3.abort(upload)
    assert [upload.key for upload in s3.uploads()] == ["runs/b"]
    s3.abort(next(s3.uploads()))


def test_files_of_the_dead_are_found_and_removed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.write("runs/a/x", b"1")
    (tmp_path / "runs/a/.tmp-0123").write_bytes(b"half")
    os.utime(tmp_path / "runs/a/.tmp-0123", (100, 100))
    (upload,) = store.uploads("runs/a/")
    assert (upload.key, upload.begun) == ("runs/a/.tmp-0123", 100)
    assert list(store.uploads("runs/b/")) == []
    store.abort(upload)
    store.abort(upload)
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "a", "x"]


@pytest.mark.parametrize(
    "url",
    [
        "", "data", "/data", "s3:/bucket", "s3://", "s3:///key", "s3://-b/x", "http://host/x", "file://data",
        "file://host/data", "file:///data?versions", "s3://bucket/a#b", "s3://bucket/a?b", "S3//bucket",
    ],
)  # fmt: skip
def test_what_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected s3://bucket/prefix or file:///absolute/path"):
        open_store(url)


def test_a_secret_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        open_store("s3://AKIA:hunter2@bucket/data")
    assert str(caught.value).startswith("'s3://...@bucket/data' is not a store")


def test_addresses_are_joined_and_kept(tmp_path: Path) -> None:
    assert join_url("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert open_store("s3://bucket").url == "s3://bucket"
    assert open_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
    odd = tmp_path / "50% off, ä#1?"
    store = open_store(odd.as_uri())
    store.write("a", b"1")
    assert (odd / "a").read_bytes() == b"1"
    assert store.url == odd.as_uri()


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "..", "a/..", "a\0b"])
def test_no_key_leads_out_of_a_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "x").write_bytes(b"of another")
    (tmp_path / "store/a").mkdir(parents=True)
    store = FileStore(tmp_path / "store")
    calls: list[Callable[[], object]] = [
        lambda: store.read(key),
        lambda: store.read_range(key, 0, 1),
        lambda: store.head(key),
        lambda: list(store.list(f"{key}/")),
        lambda: store.write(key, b"mine"),
        lambda: store.create(key, b"mine"),
        lambda: store.upload(key, tmp_path / "x"),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(DataError, match="would leave the store"):
            call()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "store", "a"]
    assert (tmp_path / "x").read_bytes() == b"of another"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_leaves(
    store_url: str, tmp_path: Path, umask: int, mode: int
) -> None:
    """Others on a shared mount read data sets; who wants to keep them out says so by the umask."""
    store = open_store(store_url)
    (tmp_path / "source").write_bytes(b"1")
    before = os.umask(umask)
    try:
        store.write("data/written", b"1")
        store.create("data/created", b"1")
        store.upload("data/uploaded", tmp_path / "source")
    finally:
        os.umask(before)
    root = Path(store_url.removeprefix("file://"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (root / "data").iterdir()} == {mode}
    assert stat.S_IMODE((root / "data").stat().st_mode) == 0o777 & ~umask


def win(root: str, name: str, rounds: int, start: Barrier) -> None:
    """Create one object after another at the same moments as the other process; write down which it won."""
    store = FileStore(Path(root))
    won = []
    for number in range(rounds):
        start.wait(20)
        try:
            store.create(f"race/{number:02d}", name.encode() * 1000)
        except AlreadyExists:
            continue
        won.append(f"{number:02d}")
    store.write(f"won/{name}", ",".join(won).encode())


def test_of_two_processes_that_create_a_file_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    writers = [context.Process(target=win, args=(str(tmp_path), name, 50, start)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = FileStore(tmp_path)
    owners = {
        number: name for name in "ab" for number in store.read(f"won/{name}").decode().split(",") if number
    }
    assert sum(len(store.read(f"won/{name}").decode().split(",")) for name in "ab") >= 50
    assert sorted(owners) == [f"{number:02d}" for number in range(50)]
    for number, name in owners.items():
        assert store.read(f"race/{number}") == name.encode() * 1000
    assert len(list(tmp_path.rglob("*"))) == 50 + 2 + 2


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_file_half_written_is_never_seen(tmp_path: Path, before: bytes | None) -> None:
    """Its writer is stopped in the middle, and then killed: what was there stays."""
    store = FileStore(tmp_path / "store")
    if before is not None:
        store.write("a/b", before)
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import sys; from pathlib import Path; from workers.storage import FileStore\n"
        "FileStore(Path(sys.argv[1])).upload('a/b', Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(tmp_path / "pipe")]
    with subprocess.Popen(command) as writer, (tmp_path / "pipe").open("wb") as pipe:
        pipe.write(bytes(3 << 20))
        pipe.flush()
        while not (half := list(tmp_path.glob("store/a/.tmp-*"))) or half[0].stat().st_size < 1 << 20:
            time.sleep(0.005)
        check_untouched(store, before)
        writer.kill()
        writer.wait()
        check_untouched(store, before)
    store.create("a/c", b"others write on")


def check_untouched(store: Store, before: bytes | None) -> None:
    if before is None:
        with pytest.raises(NotFound):
            store.read("a/b")
        assert list(store.list()) == []
    else:
        assert store.read("a/b") == before
        assert [info.key for info in store.list()] == ["a/b"]


def test_a_file_that_grows_too_large_leaves_nothing(tmp_path: Path) -> None:
    """As on a full disk or over a quota: the write breaks off with an error of the system."""
    store = FileStore(tmp_path)
    store.write("a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for write in (
            lambda: store.write("a", bytes(1 << 20)),
            lambda: store.create("b", bytes(1 << 20)),
            lambda: store.upload("c", tmp_path / "source"),
        ):
            with pytest.raises(DataError, match=rf"cannot write {store.url}/[abc]: File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.read("a") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """NFS and ext4 tell it as late as in fsync."""

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    store = FileStore(tmp_path)
    with pytest.raises(DataError, match=rf"cannot write {store.url}/a: no space left; free some and run"):
        store.create("a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_and_the_reverse_are_named(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.write("file", b"1")
    store.write("folder/a", b"1")
    with pytest.raises(DataError, match=rf"cannot write {store.url}/file/a: "):
        store.write("file/a", b"2")
    with pytest.raises(DataError, match=rf"cannot write {store.url}/folder: "):
        store.write("folder", b"2")
    assert [info.key for info in store.list()] == ["file", "folder/a"]


def test_a_key_too_long_for_the_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(DataError, match=r"cannot write .*: File name too long"):
        store.write("x" * 300, b"1")
    with pytest.raises(DataError, match=r"cannot read .*: File name too long"):
        store.read("x" * 300)


def test_nfs_may_deny_a_link_that_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply to the first request was lost, the client asked again, and now there is one: ours."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    store = FileStore(tmp_path)
    store.create("a", b"1")
    assert store.read("a") == b"1"
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(AlreadyExists):
        store.create("a", b"2")


def test_a_listing_bears_that_others_delete_meanwhile(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for key in ("a", "b/c", "d"):
        store.write(key, b"1")
    listing = store.list()
    assert next(listing).key == "a"
    store.delete("b/c")
    assert [info.key for info in listing] == ["d"]


class Wrong(FileStore):
    """A store with one fault."""

    fault = ""

    def create(self, key: str, data: bytes) -> None:
        if self.fault == "overwrites":
            self.write(key, data)
        elif self.fault == "refuses all":
            raise AlreadyExists(key)
        else:
            super().create(key, data[:-1] if self.fault == "cuts" else data)

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        shift = 1 if self.fault == "shifts ranges" else 0
        return super().read_range(key, start + shift, length, etag)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("", None),
        ("overwrites", "16 of 16 create-once writers of one object were told that they had won"),
        ("refuses all", "0 of 16 create-once writers of one object were told that they had won"),
        ("cuts", "an object did not come back as it was written"),
        ("shifts ranges", "a ranged read returned other bytes"),
    ],
)
def test_the_probe_finds_what_a_store_gets_wrong(tmp_path: Path, fault: str, problem: str | None) -> None:
    store = Wrong(tmp_path)
    store.fault = fault
    assert probe(store) == problem
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_probe_asks_often_enough_to_catch_a_store_that_is_wrong_now_and_then(tmp_path: Path) -> None:
    """Three of four races go well."""
    races: set[str] = set()
    lock = threading.Lock()

    class Seldom(FileStore):
        def create(self, key: str, data: bytes) -> None:
            with lock:
                races.add(key)
                wrong = len(races) % 4 == 0
            if wrong:
                self.write(key, data)
            else:
                super().create(key, data)

    assert RACES >= 8
    assert probe(Seldom(tmp_path)) == (
        f"{RACERS} of {RACERS} create-once writers of one object were told that they had won"
    )


@pytest.mark.services
def test_the_probe_refuses_swift_for_runs(swift: Store) -> None:
    problem = next(filter(None, (probe(swift) for _ in range(3))), None)
    assert problem is not None
    assert problem.endswith("of 16 create-once writers of one object were told that they had won")
    assert list(swift.list()) == []


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_body_that_breaks_off_goes_on_where_it_was(
    s3: S3Store, proxy: FaultProxy, waits: list[float], reset: bool
) -> None:
    s3.write("a", BODY)
    etag = s3.head("a").etag
    del proxy.requests[:]
    proxy.faults += [Cut(100_000, reset), Cut(0, reset), Cut(100_000, reset)]
    assert s3.read_range("a", 1000, 250_000, etag) == BODY[1000:251_000]
    assert [method for method, _ in proxy.requests] == ["GET"] * 4
    starts = [int(wanted.removeprefix("bytes=").split("-")[0]) for _, wanted in proxy.requests]
    assert {wanted.split("-")[1] for _, wanted in proxy.requests} == {"250999"}
    if reset:
        # What of a piece of 64 KiB was under way when the reset came is lost.
        assert starts == sorted(starts)
        assert starts[3] >= 1000 + 2 * (1 << 16)
    else:
        assert starts == [1000, 101_000, 101_000, 201_000]


def test_a_whole_read_breaks_off_and_goes_on(s3: S3Store, proxy: FaultProxy, waits: list[float]) -> None:
    s3.write("a", BODY)
    del proxy.requests[:]
    proxy.faults += [Cut(123_456)]
    assert s3.read("a") == BODY
    assert proxy.requests == [("GET", "bytes=0-"), ("GET", "bytes=123456-299999")]


def test_a_body_that_breaks_off_every_time_is_given_up(
    s3: S3Store, s3_url: str, proxy: FaultProxy, waits: list[float]
) -> None:
    """Though each time a little came."""
    s3.write("a", BODY)
    proxy.faults += [Cut(10)] * 10_000
    with pytest.raises(Unavailable, match=rf"{s3.url}/a: the object store .* \(tried for"):
        open_store(s3_url, patience=3).read("a")
    assert len(proxy.requests) > 2
    del proxy.faults[:]
    assert s3.read("a") == BODY


def test_a_server_that_is_busy_is_asked_again(
    s3: S3Store, s3_url: str, proxy: FaultProxy, waits: list[float]
) -> None:
    """As often as is needed; nobody asks besides us; at first soon, and then ever more seldom."""
    s3.write("a", BODY)
    calls = (
        lambda store: store.read("a") == BODY,
        lambda store: store.read_range("a", 5, 10) == BODY[5:15],
        lambda store: store.head("a").size == len(BODY),
        lambda store: [info.key for info in store.list()] == ["a"],
    )
    for call in calls:
        del proxy.requests[:], waits[:]
        proxy.faults += [Answer(503, SLOW_DOWN), Answer(500), Answer(502), Answer(504), Answer(429)] * 2
        proxy.faults += [LoseReply()]
        assert call(s3)
        assert len(proxy.requests) == 12
        assert max(waits[:1]) <= 0.1
        # 51 on average, did all wait their longest time: each up to 10 s.
        assert 0 < sum(waits) < 60
    for call in calls:
        proxy.faults += [Answer(503, SLOW_DOWN)] * 10_000
        with pytest.raises(Unavailable, match=rf"{s3.url}/a?:? ?.*the object store answered (503|SlowDown)"):
            call(open_store(s3_url, patience=0.3))
        del proxy.faults[:]


def test_what_will_not_change_is_told_at_once(s3: S3Store, proxy: FaultProxy, waits: list[float]) -> None:
    s3.write("a", BODY)
    etag = s3.head("a").etag
    del proxy.requests[:]
    for status, kind in (
        (403, DataError),
        (404, NotFound),
        (412, Changed),
        (416, Truncated),
        (400, DataError),
    ):
        proxy.faults += [Cut(100_000), Answer(status)]
        with pytest.raises(DataError) as caught:
            s3.read_range("a", 0, 200_000, etag)
        assert type(caught.value) is kind
        assert f"{s3.url}/a" in str(caught.value)
    assert len(proxy.requests) == 10


OTHER_ANSWERS: tuple[Fault, ...] = (
    Length(-1000), Length(1000), Length(-200_000), Stall(0), Stall(150_000), Cut(199_999),
    Headers((("ETag", None),)),
    Headers((("Content-Range", None),)),
    Headers((("Content-Range", "bytes 50000-249998/300000"),)),
    Headers((("Content-Range", "bytes 50000-250000/300000"),)),
    Headers((("Content-Range", "bytes 49999-249998/300000"),)),
    Headers((("Content-Range", "bytes 50000-249999/*"),)),
    Headers((("Content-Range", "200000 bytes"),)),
    Answer(200, BODY, (("ETag", '"x"'),)),
    Answer(200, BODY[:200_000], (("ETag", '"x"'),)),
    Answer(206, BODY[:200_000], (("ETag", '"x"'),)),
    Answer(206, BODY[:150_000], (("ETag", '"x"'), ("Content-Range", "bytes 50000-199999/300000"))),
    Answer(206, BODY[:200_001], (("ETag", '"x"'), ("Content-Range", "bytes 50000-249999/300000"))),
)  # fmt: skip


@pytest.mark.parametrize("knows_etag", [True, False])
def test_an_answer_to_something_else_is_not_believed(
    s3: S3Store, s3_url: str, proxy: FaultProxy, waits: list[float], knows_etag: bool
) -> None:
    s3.write("a", BODY)
    etag = s3.head("a").etag if knows_etag else None
    reader = open_store(s3_url, read_timeout=0.5)
    for fault in OTHER_ANSWERS:
        proxy.faults += [fault]
        if isinstance(fault, Answer) and knows_etag:
            with pytest.raises(Changed):
                reader.read_range("a", 50_000, 200_000, etag)
        else:
            assert reader.read_range("a", 50_000, 200_000, etag) == BODY[50_000:250_000], fault
        assert proxy.faults == []


def test_a_whole_object_is_whole(s3: S3Store, s3_url: str, proxy: FaultProxy, waits: list[float]) -> None:
    s3.write("a", BODY)
    reader = open_store(s3_url, read_timeout=0.5)
    for fault in (Length(-1000), Length(1000), Stall(7), Cut(7), Cut(7, reset=True)):
        proxy.faults += [fault]
        assert reader.read("a") == BODY, fault
        assert proxy.faults == []


def test_a_server_that_sends_the_whole_object_may_be_right(s3: S3Store, proxy: FaultProxy) -> None:
    proxy.faults += [Answer(200, BODY, (("ETag", '"x"'),))] * 2
    assert s3.read("a") == BODY
    assert s3.read_range("a", 0, len(BODY), '"x"') == BODY


def test_a_read_that_nobody_waits_for_ends(s3: S3Store, s3_url: str, proxy: FaultProxy) -> None:
    s3.write("a", BODY)
    stop = threading.Event()
    reader = open_store(s3_url, stopped=stop.is_set)
    assert reader.read("a") == BODY
    del proxy.requests[:]
    proxy.faults += [Answer(503)] * 3 + [Meanwhile(stop.set)]
    with pytest.raises(Unavailable, match=rf"{s3.url}/a: the read was given up"):
        reader.read("a")
    assert len(proxy.requests) == 4
    with pytest.raises(Unavailable, match="given up"), proxy.outage():
        reader.read("a")


def test_an_outage_is_told_once(
    s3: S3Store, proxy: FaultProxy, waits: list[float], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    s3.write("a", BODY)
    assert s3.read("a") == BODY
    monkeypatch.setattr(s3_module, "TELL_AFTER", 0.05)
    proxy.faults += [Answer(503)] * 100
    assert s3.read("a") == BODY
    [record] = caplog.records
    assert f"{s3.url}/a: the object store answered 503" in record.getMessage()
    assert record.getMessage().endswith("trying again for up to 300 s")


def test_a_body_goes_on_with_the_same_version_only(
    s3: S3Store, proxy: FaultProxy, waits: list[float]
) -> None:
    s3.write("a", BODY)
    proxy.faults += [Cut(100_000), Meanwhile(lambda: s3.write("a", BODY[::-1]))]
    with pytest.raises(Changed, match=rf"{s3.url}/a changed"):
        s3.read_range("a", 0, 200_000)
    assert s3.read("a") == BODY[::-1]


@pytest.mark.parametrize("broken_before", [False, True])
def test_a_server_that_knows_no_ranges_is_refused(
    s3: S3Store, proxy: FaultProxy, waits: list[float], broken_before: bool
) -> None:
    """Its bytes, cut at the right length, would be others than those that were asked for."""
    s3.write("a", BODY)
    proxy.faults += [Cut(1000)] if broken_before else []
    headers = (("ETag", s3.head("a").etag),)
    proxy.faults += [Answer(200, BODY[:199_000] if broken_before else BODY[:200_000], headers)] * 10
    with pytest.raises(DataError, match=rf"{s3.url}/a: the object store sends another range") as caught:
        s3.read_range("a", 50_000, 200_000)
    assert not isinstance(caught.value, Unavailable)
    assert len(proxy.faults) == 7


def test_the_parts_of_a_large_object_go_on_too(
    s3: S3Store, proxy: FaultProxy, waits: list[float], tmp_path: Path, small_parts: None
) -> None:
    """The ETag of an object of several parts is none of its bytes'; `If-Match` must do with it."""
    data = random.Random(2).randbytes(17 << 20)
    (tmp_path / "shard").write_bytes(data)
    s3.upload("shard", tmp_path / "shard")
    etag = s3.head("shard").etag
    assert "-4" in etag
    proxy.faults += [Cut(9 << 20), Cut(3 << 20, reset=True)]
    assert s3.read_range("shard", 100, 16 << 20, etag) == data[100 : 100 + (16 << 20)]


def test_a_create_whose_reply_is_lost_has_won(s3: S3Store, proxy: FaultProxy, waits: list[float]) -> None:
    """botocore writes again and is told that there is an object: its own."""
    proxy.faults += [LoseReply()]
    s3.create("a", b"mine")
    assert s3.read("a") == b"mine"
    assert [method for method, _ in proxy.requests] == ["PUT", "PUT", "HEAD", "GET"]
    proxy.faults += [LoseReply()]
    with pytest.raises(AlreadyExists):
        s3.create("a", b"mine")


def test_a_create_that_met_a_delete_is_done_again(s3: S3Store, proxy: FaultProxy) -> None:
    proxy.faults += [Answer(409, CONFLICT)]
    s3.create("a", b"mine")
    assert s3.read("a") == b"mine"
    assert [method for method, _ in proxy.requests] == ["PUT", "HEAD", "PUT", "GET"]
    proxy.faults += [fault for _ in range(5) for fault in (Answer(409, CONFLICT), Answer(404))]
    with pytest.raises(DataError, match=rf"{s3.url}/b: the object store refuses it and holds none"):
        s3.create("b", b"mine")


CONFLICT = (
    b'<?xml version="1.0"?><Error><Code>ConditionalRequestConflict</Code><Message>At once</Message></Error>'
)


def test_a_bucket_that_is_not_there_is_named(s3: S3Store, tmp_path: Path) -> None:
    nowhere = open_store("s3://nobody-made-this/x")
    (tmp_path / "large").write_bytes(bytes(9 << 20))
    for call in (
        lambda: nowhere.read("a"),
        lambda: nowhere.write("a", b"1"),
        lambda: nowhere.create("a", b"1"),
        lambda: nowhere.upload("a", tmp_path / "large"),
        lambda: list(nowhere.list()),
    ):
        with pytest.raises(NotFound, match="no bucket for s3://nobody-made-this/x/"):
            call()


def test_markers_of_folders_are_no_objects(s3: S3Store) -> None:
    s3.write("", b"")
    s3.write("sub/", b"")
    s3.write("sub/a", b"1")
    assert [info.key for info in s3.list()] == ["sub/a"]


def point_to(services: Site, patch: pytest.MonkeyPatch, folder: Path, keys: str) -> None:
    """Other credentials for the same server."""
    (folder / "credentials").write_text(keys)
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    storage.s3_client.cache_clear()


@pytest.mark.services
@pytest.mark.parametrize("wrong", ["aws_access_key_id", "aws_secret_access_key"])
def test_wrong_credentials_are_refused_with_advice(
    services: Site, swift: Store, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    assert services.aws_credentials_file is not None
    lines = services.aws_credentials_file.read_text().splitlines()
    changed = [f"{line}x" if line.startswith(wrong) else line for line in lines]
    point_to(services, monkeypatch, tmp_path, "\n".join(changed))
    (tmp_path / "large").write_bytes(bytes(9 << 20))
    s3 = open_store(s3_url)
    for call in (
        lambda: s3.read("a"),
        lambda: s3.head("a"),
        lambda: list(s3.list()),
        lambda: s3.upload("a", tmp_path / "large"),
    ):
        with pytest.raises(DataError, match=r"the object store refused the credentials .*; check the AWS"):
            call()


@pytest.mark.services
@pytest.mark.parametrize("keys", ["[other]\n", "[default]\naws_access_key_id = a\n"], ids=["none", "half"])
def test_missing_credentials_are_told(
    services: Site, swift: Store, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: str
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    point_to(services, monkeypatch, tmp_path, keys)
    s3 = open_store(s3_url)
    with pytest.raises(DataError, match=rf"{s3.url}/a: no S3 credentials \(.*set up an AWS profile"):
        s3.read("a")
    with pytest.raises(DataError, match="no S3 credentials"):
        list(s3.list())


def test_a_server_that_is_down_is_told_in_seconds(
    monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    """Unlike one that answered before."""
    monkeypatch.setattr(s3_module, "FIRST_CONTACT_SECONDS", 0.3)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    storage.s3_client.cache_clear()
    store = open_store("s3://vitscale/x")
    for call in (
        lambda: store.read("a"),
        lambda: store.create("a", b"1"),
        lambda: list(store.list()),
        lambda: probe(store),
    ):
        del waits[:]
        with pytest.raises(Unavailable, match=rf"s3://vitscale/x.*cannot be reached .*{port}.*is it up\?"):
            call()
    storage.s3_client.cache_clear()


@pytest.mark.services
def test_exported_keys_do_not_win_over_the_file_that_was_given(
    services: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    if services.s3_endpoint is None:
        pytest.skip("the object store needs a file system with user xattrs")
    given = os.environ | services.environment()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-another-store")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-another-store")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-store")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    for _ in range(2):
        ensure_bucket("s3://made-here/x", environment=given)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        given[name] = "exported by the user"
    with pytest.raises(DataError, match="refused the credentials"):
        ensure_bucket("s3://made-here/x", environment=given)


def test_errors_keep_their_words_from_process_to_process() -> None:
    for error in (
        Changed.at("s3://b/a.tar"),
        Truncated.at("s3://b/a.tar", 5, 10, 7),
        Unavailable("s3://b/a.tar: away"),
        NotFound("no object s3://b/a.tar"),
        AlreadyExists("s3://b/a.tar exists"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
