"""The local cache: equal to its store, whatever happens to its files, its disk and its processes."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.block_folder import DIGEST_BYTES
from workers.cache import CachedStore
from workers.errors import ConfigError
from workers.storage import Changed, FileStore, NotFound, Truncated

BLOCK = 64
FILE = BLOCK + DIGEST_BYTES
BODY = random.Random(0).randbytes(10 * BLOCK + 17)
LIMIT = 1000 * FILE


class Counted(FileStore):
    """Notes what is asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[int, int]] = []

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        self.reads.append((start, length))
        return super().read_range(key, start, length, etag)


@pytest.fixture
def store(tmp_path: Path) -> Counted:
    store = Counted(tmp_path / "store")
    store.write("a", BODY)
    return store


@pytest.fixture
def etag(store: Counted) -> str:
    return store.head("a").etag


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(store: Counted, folder: Path) -> CachedStore:
    return open_cache(store, folder)


def open_cache(store: FileStore, folder: Path, limit: int = LIMIT) -> CachedStore:
    return CachedStore(store, folder, limit, block_bytes=BLOCK)


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if len(path.name) == 64)


def accounted(folder: Path) -> int:
    return int((folder / "lock").read_bytes())


def test_blocks_are_fetched_once_and_neighbours_together(
    store: Counted, etag: str, cache: CachedStore, folder: Path
) -> None:
    assert cache.read_range("a", 3 * BLOCK + 1, 2, etag) == BODY[3 * BLOCK + 1 :][:2]
    assert store.reads == [(3 * BLOCK, BLOCK)]
    assert cache.read_range("a", 4 * BLOCK - 1, 1, etag) == BODY[4 * BLOCK - 1 :][:1]
    assert (cache.hits, cache.misses, cache.bytes_fetched) == (1, 1, BLOCK)
    del store.reads[:]
    # Blocks 1 to 6, of which 3 is there.
    assert cache.read_range("a", BLOCK + 9, 5 * BLOCK + 5, etag) == BODY[BLOCK + 9 :][: 5 * BLOCK + 5]
    assert store.reads == [(BLOCK, 2 * BLOCK), (4 * BLOCK, 3 * BLOCK)]
    assert (cache.hits, cache.misses, cache.bytes_fetched) == (2, 6, 6 * BLOCK)
    del store.reads[:]
    other = open_cache(store, folder)
    assert other.read_range("a", BLOCK, 6 * BLOCK, etag) == BODY[BLOCK : 7 * BLOCK]
    assert store.reads == []
    assert (other.hits, other.misses, other.bytes_fetched) == (6, 0, 0)
    assert len(blocks(folder)) == 6
    assert accounted(folder) == 6 * FILE


def test_the_end_of_an_object_is_known_to_the_store_alone(
    store: Counted, etag: str, cache: CachedStore, folder: Path
) -> None:
    assert cache.read_range("a", 9 * BLOCK + 5, BLOCK + 12, etag) == BODY[-BLOCK - 12 :]
    assert store.reads == [(9 * BLOCK, 2 * BLOCK), (9 * BLOCK, BLOCK + 17)]
    del store.reads[:]
    assert cache.read_range("a", len(BODY) - 1, 1, etag) == BODY[-1:]
    assert store.reads == []
    assert accounted(folder) == FILE + 17 + DIGEST_BYTES
    for start, length in ((len(BODY) - 1, 2), (len(BODY), 1), (0, len(BODY) + 1), (99 * BLOCK, 3)):
        with pytest.raises(Truncated, match=rf"{store.url}/a: wanted {length} bytes from byte {start},"):
            cache.read_range("a", start, length, etag)
    assert cache.read_range("a", 5, 0, etag) == b""


def test_versions_and_objects_are_kept_apart(store: Counted, etag: str, cache: CachedStore) -> None:
    assert cache.read_range("a", 0, 9, etag) == BODY[:9]
    store.write("b", BODY[::-1])
    assert cache.read_range("b", 0, 9, store.head("b").etag) == BODY[::-1][:9]
    store.write("a", BODY[1:])
    assert cache.read_range("a", 0, 9, store.head("a").etag) == BODY[1:10]
    with pytest.raises(Changed, match=rf"{store.url}/a changed"):
        cache.read_range("a", 5 * BLOCK, 9, etag)
    # What was read of the old version is still right.
    assert cache.read_range("a", 0, 9, etag) == BODY[:9]
    with pytest.raises(NotFound):
        cache.read_range("none", 0, 1, etag)


def test_what_is_no_read_of_a_known_version_passes_through(
    store: Counted, cache: CachedStore, folder: Path, tmp_path: Path
) -> None:
    assert cache.url == store.url
    assert cache.read_range("a", 5, 5) == BODY[5:10]
    assert cache.read("a") == BODY
    cache.write("x/b", b"1")
    cache.create("x/c", b"2")
    (tmp_path / "file").write_bytes(b"3")
    cache.upload("x/d", tmp_path / "file")
    assert [info.key for info in cache.list("x/")] == ["x/b", "x/c", "x/d"]
    assert cache.head("x/d") == store.head("x/d")
    cache.delete("x/b")
    assert not (store.root / "x/b").exists()
    assert blocks(folder) == []


def test_wrong_bytes_are_forgotten(store: Counted, etag: str, cache: CachedStore) -> None:
    """Damaged on the network, they have got a digest that fits."""
    path, right = store.root / "a", BODY
    times = path.stat()
    path.write_bytes(bytes(len(BODY)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.read_range("a", 0, 5 * BLOCK, etag) == bytes(5 * BLOCK)
    path.write_bytes(right)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    cache.forget("a", BLOCK + 1, 2 * BLOCK - 1, etag)
    assert cache.read_range("a", BLOCK, 2 * BLOCK, etag) == BODY[BLOCK : 3 * BLOCK]
    assert cache.read_range("a", 0, BLOCK, etag) == bytes(BLOCK)
    assert cache.read_range("a", 3 * BLOCK, BLOCK, etag) == bytes(BLOCK)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12 * BLOCK),
    num_blocks=st.integers(2, 14),
    reads=st.lists(st.tuples(st.integers(0, 12 * BLOCK), st.integers(1, 5 * BLOCK)), max_size=30),
)
def test_any_reads_are_those_of_the_store(
    tmp_path_factory: pytest.TempPathFactory, size: int, num_blocks: int, reads: list[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("any")
    store = FileStore(root / "store")
    body = random.Random(size).randbytes(size)
    store.write("a", body)
    etag = store.head("a").etag
    caches = [open_cache(store, root / "cache", num_blocks * FILE) for _ in range(2)]
    for number, (start, length) in enumerate(reads):
        cache = caches[number % 2]
        if start + length > size:
            with pytest.raises(Truncated, match=f"wanted {length} bytes from byte {start}"):
                cache.read_range("a", start, length, etag)
        else:
            assert cache.read_range("a", start, length, etag) == body[start : start + length]
        files = sum(path.stat().st_size for path in blocks(root / "cache"))
        assert files == accounted(root / "cache") <= num_blocks * FILE


def test_what_was_not_used_for_longest_goes_first(store: Counted, etag: str, folder: Path) -> None:
    cache = open_cache(store, folder, 4 * FILE)

    def read(number: int) -> bool:
        """Was it there?"""
        hits = cache.hits
        assert cache.read_range("a", number * BLOCK, BLOCK, etag) == BODY[number * BLOCK :][:BLOCK]
        return cache.hits > hits

    assert [read(number) for number in (0, 1, 2, 3)] == [False] * 4
    assert read(0)
    assert not read(4)
    assert [read(number) for number in (0, 2, 3, 4)] == [True] * 4
    assert not read(1)
    assert [read(number) for number in (2, 3, 4, 1)] == [True] * 4
    assert len(blocks(folder)) == 4


def test_no_bit_rots_unnoticed(store: Counted, etag: str, cache: CachedStore, folder: Path) -> None:
    cache.read_range("a", 0, BLOCK, etag)
    [path] = blocks(folder)
    whole = path.read_bytes()
    assert len(whole) == FILE
    damages = [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(FILE) for bit in (0, 7)
    ]
    damages += [whole[:length] for length in range(FILE)]
    damages += [whole + b"\0", whole[:-1] + b"\0\0", b"\0" * FILE, whole + bytes(10_000)]
    for number, damaged in enumerate(damages):
        path.write_bytes(damaged)
        assert cache.read_range("a", 0, BLOCK, etag) == BODY[:BLOCK]
        assert cache.misses == number + 2
        assert path.read_bytes() == whole
    assert cache.hits == 0


def test_a_block_of_another_name_is_none(store: Counted, etag: str, cache: CachedStore, folder: Path) -> None:
    cache.read_range("a", 0, BLOCK, etag)
    [first] = blocks(folder)
    cache.read_range("a", BLOCK, BLOCK, etag)
    [second] = set(blocks(folder)) - {first}
    first.write_bytes(second.read_bytes())
    assert cache.read_range("a", 0, BLOCK, etag) == BODY[:BLOCK]


def test_links_pipes_and_folders_in_the_place_of_a_block_are_not_followed(
    store: Counted, etag: str, cache: CachedStore, folder: Path, tmp_path: Path
) -> None:
    cache.read_range("a", 0, BLOCK, etag)
    [path] = blocks(folder)
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)
    assert cache.read_range("a", 0, BLOCK, etag) == BODY[:BLOCK]
    assert not path.is_symlink()
    path.unlink()
    os.mkfifo(path)
    assert cache.read_range("a", 0, BLOCK, etag) == BODY[:BLOCK]
    assert path.is_file()
    path.unlink()
    path.mkdir()
    assert cache.read_range("a", 0, BLOCK, etag) == BODY[:BLOCK]
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(tmp_path / "elsewhere")
    assert cache.read_range("a", BLOCK, BLOCK, etag) == BODY[BLOCK : 2 * BLOCK]
    assert open_cache(store, folder).read_range("a", BLOCK, BLOCK, etag) == BODY[BLOCK : 2 * BLOCK]
    assert not (tmp_path / "elsewhere").exists()
    assert outside.stat().st_size == FILE


def test_only_its_own_files_are_touched(store: Counted, etag: str, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "thesis.pdf").write_bytes(bytes(100 * FILE))
    (folder / "sub").mkdir()
    cache = open_cache(store, folder, 2 * FILE)
    for number in range(10):
        cache.read_range("a", number * BLOCK, BLOCK, etag)
    assert sorted(path.name for path in folder.iterdir() if len(path.name) < 64) == [
        "lock",
        "sub",
        "thesis.pdf",
    ]
    assert len(blocks(folder)) == 2


def test_nobody_else_may_look(store: Counted, etag: str, folder: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_cache(store, folder / "deep" / "er").read_range("a", 0, 1, etag)
    finally:
        os.umask(before)
    made = folder / "deep" / "er"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600}
    for mode in (0o755, 0o770, 0o777, 0o701):
        made.chmod(mode)
        with pytest.raises(ConfigError, match=f"{made} must be a folder of this user alone"):
            open_cache(store, made)
    made.chmod(0o700)
    (tmp_path / "link").symlink_to(made)
    with pytest.raises(ConfigError, match="must be a folder of this user alone"):
        open_cache(store, tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be made: File exists"):
        open_cache(store, tmp_path / "file")
    if os.geteuid() == 0:
        os.chown(made, 12345, 12345)
        with pytest.raises(ConfigError, match="must be a folder of this user alone"):
            open_cache(store, made)
    with pytest.raises(ConfigError, match="a cache of 100 bytes is too small"):
        open_cache(store, folder, 100)


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(
    store: Counted, etag: str, cache: CachedStore, folder: Path
) -> None:
    cache.read_range("a", 0, BLOCK, etag)
    dead, live = folder / ".tmp-dead", folder / ".tmp-live"
    dead.write_bytes(bytes(50))
    with live.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file.fileno(), FILE)
        open_cache(store, folder)
        assert not dead.exists()
        assert live.exists()
        assert accounted(folder) == 2 * FILE
        # Its room is taken: of three blocks, two are left.
        small = open_cache(store, folder, 3 * FILE)
        for number in range(5):
            small.read_range("a", number * BLOCK, BLOCK, etag)
        assert len(blocks(folder)) == 2
    open_cache(store, folder)
    assert not live.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"9" * 20, b"0" * 20, b"0" * 19])
def test_wrong_accounts_come_right(store: Counted, etag: str, folder: Path, content: bytes) -> None:
    cache = open_cache(store, folder, 4 * FILE)
    for number in range(3):
        cache.read_range("a", number * BLOCK, BLOCK, etag)
    (folder / "lock").write_bytes(content)
    for number in range(11):
        assert cache.read_range("a", number * BLOCK, 17, etag) == BODY[number * BLOCK :][:17]
    open_cache(store, folder, 4 * FILE)
    assert sum(path.stat().st_size for path in blocks(folder)) == accounted(folder) <= 4 * FILE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """512 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_costs_no_read_and_is_told_once(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path / "store")
    body = random.Random(1).randbytes(4 << 20)
    store.write("a", body)
    etag = store.head("a").etag
    cache = CachedStore(store, small_disk / "cache", 100 << 20, block_bytes=1 << 16)
    for _ in range(2):
        for start in range(0, len(body), 100_000):
            assert cache.read_range("a", start, 50_000, etag) == body[start : start + 50_000]
    assert cache.hits > 0
    assert [record.getMessage() for record in caplog.records] == [
        f"the cache {small_disk / 'cache'} cannot keep all that is read: No space left on device"
    ]
    assert list((small_disk / "cache").glob(".tmp-*")) == []
    total = sum(path.stat().st_size for path in blocks(small_disk / "cache"))
    assert 256 << 10 < total == accounted(small_disk / "cache")
    # Others took all, so there is no room even for the accounts.
    with contextlib.suppress(OSError), (small_disk / "large").open("wb", buffering=0) as large:
        while large.write(bytes(4096)):
            pass
    full = CachedStore(store, small_disk / "other", 100 << 20, block_bytes=1 << 16)
    assert full.read_range("a", 5, 100_000, etag) == body[5:100_005]


def test_a_folder_that_goes_costs_no_read(
    store: Counted, etag: str, cache: CachedStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.read_range("a", 0, BLOCK, etag)
    folder.rename(folder.with_name("moved"))
    for number in range(3):
        assert cache.read_range("a", number * BLOCK, 5, etag) == BODY[number * BLOCK :][:5]
    assert len(caplog.records) == 1


BIG_BLOCK, BIG_LIMIT = 1 << 16, 20 << 16
BIG = 100 * BIG_BLOCK


def read_much(root: str, seed: int, seconds: float) -> None:
    """Ranges at random, checked against the same bytes."""
    store = FileStore(Path(root) / "store")
    cache = CachedStore(store, Path(root) / "cache", BIG_LIMIT, block_bytes=BIG_BLOCK)
    chance = random.Random(seed)
    body, etag = store.read("a"), store.head("a").etag
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = chance.randrange(BIG - 1)
        length = chance.randrange(1, min(BIG - start, 3 * BIG_BLOCK) + 1)
        if cache.read_range("a", start, length, etag) != body[start : start + length]:
            os._exit(3)
    os._exit(0 if cache.hits and cache.misses else 4)


def test_processes_share_a_folder_and_may_be_killed(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.write("a", random.Random(2).randbytes(BIG))
    folder = tmp_path / "cache"
    context = multiprocessing.get_context("spawn")

    def start(seed: int, seconds: float) -> BaseProcess:
        process = context.Process(target=read_much, args=(str(tmp_path), seed, seconds))
        process.start()
        return process

    victims = [start(seed, 60) for seed in range(4)]
    others = [start(seed, 4) for seed in range(4, 8)]
    chance, most, looks = random.Random(0), 0, 0
    while any(other.is_alive() for other in others):
        time.sleep(0.02)
        if not (folder / "lock").exists():
            continue
        with (folder / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            total = sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")
            most, looks = max(most, total), looks + 1
        running = [victim for victim in victims if victim.is_alive()]
        if running and looks > 20 and chance.random() < 0.1:
            running[0].kill()
            running[0].join()
    assert [other.exitcode for other in others] == [0] * 4
    for victim in victims:
        victim.kill()
        victim.join()
    assert [victim.exitcode for victim in victims] == [-9] * 4
    assert BIG_LIMIT // 2 < most <= BIG_LIMIT
    cache = CachedStore(store, folder, BIG_LIMIT, block_bytes=BIG_BLOCK)
    assert list(folder.glob(".tmp-*")) == []
    assert sum(path.stat().st_size for path in blocks(folder)) == accounted(folder) <= BIG_LIMIT
    whole = cache.read_range("a", 0, BIG, store.head("a").etag)
    assert hashlib.sha256(whole).digest() == hashlib.sha256(store.read("a")).digest()
    assert cache.hits > 0
