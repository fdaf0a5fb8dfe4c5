"""Samples of a real S3 server behind a proxy that does what networks and servers do at their worst.

What comes is exact, or an error that names the shard; never anything else.
"""

import functools
import hashlib
import io
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import workers.data.index
import workers.data.samples
from tests.conftest import make_tar
from tests.fault_proxy import Chances, FaultProxy
from tests.s3_server import ENVIRONMENT, s3_server
from workers import s3
from workers.cache import CachedStore
from workers.config import AugmentConfig
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.data.mixture import Source
from workers.data.order import Order
from workers.data.samples import RawSample, SampleReader, StageTimes
from workers.data.stream import TrainStream
from workers.errors import DataError
from workers.storage import (
    Changed,
    FileStore,
    Store,
    Unavailable,
    ensure_bucket,
    open_store,
    s3_client,
)

SHARDS, SAMPLES, BATCH = 40, 40, 40
URL = "s3://faults/photos"


def make_noise(number: int) -> bytes:
    """A PNG of 4 KB."""
    buffer = io.BytesIO()
    Image.frombytes("L", (64, 64), random.Random(number).randbytes(64 * 64)).save(buffer, "PNG")
    return buffer.getvalue()


def make_shards() -> dict[str, bytes]:
    return {
        f"s{shard:02d}.tar": make_tar(
            (f"{number:05d}.{name}", data)
            for number in range(shard * SAMPLES, (shard + 1) * SAMPLES)
            for name, data in (("cls", str(number % 7).encode()), ("png", make_noise(number)))
        )
        for shard in range(SHARDS)
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Of the shards at URL, with their index."""
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": endpoint}).items():
            patch.setenv(name, value)
        s3_client.cache_clear()
        ensure_bucket(URL)
        for name, data in make_shards().items():
            open_store(URL).write(name, data)
        build_index(URL)
        yield endpoint
    s3_client.cache_clear()


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In the way of all clients, which give silent connections up after half a second and wait less."""
    monkeypatch.setattr(s3, "SHORTEST_WAIT", 0.01)
    monkeypatch.setattr(s3, "LONGEST_WAIT", 0.5)
    with FaultProxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        impatient(monkeypatch, open_store, stopped=proxy.ended.is_set)
        s3_client.cache_clear()
        yield proxy
    s3_client.cache_clear()


def impatient(monkeypatch: pytest.MonkeyPatch, opener: Callable[..., Store], **options: Any) -> None:
    """Streams made from here on open their stores so."""
    for module in (workers.data.samples, workers.data.index):
        monkeypatch.setattr(module, "open_store", functools.partial(opener, read_timeout=0.5, **options))


def stream(index: DatasetIndex) -> TrainStream:
    order = Order(
        fingerprint=index.fingerprint,
        seed=3,
        num_samples=index.num_samples,
        chunk_samples=10,
        lanes=4,
        window_chunks=6,
    )
    return TrainStream(
        [Source.of(index, order, BATCH, max_bad_fraction=0)],
        rank=0,
        world_size=1,
        start_step=0,
        image_size=32,
        channels=1,
        augment=AugmentConfig(min_scale=0.3),
        prefetch_batches=2,
    )


def epoch(before: Callable[[int], object] = lambda step: None) -> list[tuple[Any, ...]]:
    """Ids, labels and a digest of the pixels of each batch; `before(step)` is called before each."""
    batches = stream(DatasetIndex.open(URL))
    try:
        taken = []
        for step in range(SHARDS * SAMPLES // BATCH):
            before(step)
            batch = next(batches)
            pixels = hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()
            taken.append((batch.ids.tolist(), batch.labels.tolist(), pixels))
        return taken
    finally:
        batches.close()


@pytest.fixture(scope="module")
def clean(server: str) -> tuple[list[tuple[Any, ...]], int]:
    """An epoch without faults, and how many requests it took."""
    with FaultProxy(server) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        s3_client.cache_clear()
        batches = epoch()
    ids = [sample for ids, _, _ in batches for sample in ids]
    assert len(set(ids)) == len(ids) == SHARDS * SAMPLES
    s3_client.cache_clear()
    return batches, len(proxy.requests)


def test_an_epoch_is_exact_through_a_busy_server_and_broken_connections(
    clean: tuple[list[tuple[Any, ...]], int], proxy: FaultProxy
) -> None:
    batches, requests = clean
    proxy.chances = Chances(seed=1, busy=20, reset=5, stall=1)
    assert epoch() == batches
    assert requests > 150
    assert proxy.given["busy"] > 25
    assert proxy.given["reset"] > 5
    assert proxy.given["stall"] >= 1
    assert len(proxy.requests) <= 1.5 * requests


def test_an_epoch_is_exact_through_an_outage(
    clean: tuple[list[tuple[Any, ...]], int], proxy: FaultProxy
) -> None:
    over = threading.Event()
    outages = []

    def outage() -> None:
        with proxy.outage():
            over.wait(4)

    def before(step: int) -> None:
        if step == 10:
            outages.append(threading.Thread(target=outage))
            outages[0].start()

    assert epoch(before) == clean[0]
    over.set()
    outages[0].join()


def test_an_outage_that_does_not_end_is_told(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, open_store, patience=1)
    reader = SampleReader(DatasetIndex.open(URL), StageTimes())
    reader.read(np.arange(3))
    with proxy.outage(), pytest.raises(Unavailable, match=rf"{URL}/.*s00\.tar.*cannot be reached"):
        reader.read(np.arange(3))


def test_a_shard_that_is_replaced_meanwhile_is_named(proxy: FaultProxy) -> None:
    reader = SampleReader(DatasetIndex.open(URL), StageTimes())
    store, wanted = open_store(URL), np.arange(7 * SAMPLES, 7 * SAMPLES + 3)
    whole = store.read("s07.tar")
    assert len(reader.read(wanted)) == 3
    store.write("s07.tar", whole[:-1] + b"x")
    try:
        with pytest.raises(Changed, match=rf"{URL}/s07\.tar changed since it was indexed"):
            reader.read(wanted)
        assert len(reader.read(wanted + SAMPLES)) == 3
    finally:
        store.write("s07.tar", whole)
    assert len(reader.read(wanted)) == 3


class Reading:
    """Shards, read over and over: each sample is right, has a defect, or the shard's name is told."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.reader = SampleReader(DatasetIndex.open(URL), StageTimes())
        self.right = [self.reader.read(self.ordinals(shard)) for shard in range(SHARDS)]
        self.reads = self.errors = self.defects = 0

    @staticmethod
    def ordinals(shard: int) -> np.ndarray:
        return np.arange(shard * SAMPLES, (shard + 1) * SAMPLES)

    def until(self, enough: Callable[[], bool]) -> None:
        for shard in itertools.cycle(range(SHARDS)):
            if enough():
                return
            self.reads += 1
            try:
                samples: list[RawSample] = self.reader.read(self.ordinals(shard))
            except DataError as error:
                self.errors += 1
                assert f"s{shard:02d}.tar" in str(error)
            else:
                for sample, right in zip(samples, self.right[shard], strict=True):
                    if sample.defect:
                        self.defects += 1
                    else:
                        assert sample == right


def test_no_flipped_bit_gets_through(proxy: FaultProxy) -> None:
    """The digests find it; most reads are repaired by a second one."""
    reading = Reading(proxy)
    proxy.chances = Chances(seed=2, flip=35)
    reading.until(lambda: proxy.given["bits"] >= 1200)
    assert proxy.given["flip"] > 200
    assert reading.errors < reading.reads


def test_no_truncated_body_and_no_wrong_length_gets_through(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "LONGEST_WAIT", 0.01)
    reading = Reading(proxy)
    kinds = ("close", "reset", "short", "long")
    proxy.chances = Chances(seed=3, close=60, reset=20, short=6, long=6)
    reading.until(lambda: sum(proxy.given[kind] for kind in kinds) >= 1500)
    assert all(proxy.given[kind] > 80 for kind in kinds)
    # An error is at most that a server answered wrongly three times in a row.
    assert reading.errors < reading.reads / 10


class Trusting(FileStore):
    """Serves shards that were cut off as if they were those that were indexed."""

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return super().read_range(key, start, length)


def test_no_truncated_shard_gets_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 600 places, with and without an ETag that tells; 1,500 bodies are cut off above."""
    name, whole = next(iter(make_shards().items()))
    path = tmp_path / name
    path.write_bytes(whole)
    index = build_index(tmp_path.as_uri())
    honest = SampleReader(index, StageTimes())
    monkeypatch.setattr(workers.data.samples, "open_store", lambda url, stopped: Trusting(tmp_path))
    trusting = SampleReader(index, StageTimes())
    right = trusting.read(np.arange(SAMPLES))
    place = random.Random(4)
    for _ in range(600):
        path.write_bytes(whole[: place.randrange(len(whole))])
        with pytest.raises(Changed, match=f"{name} changed"):
            honest.read(np.arange(SAMPLES))
        num_whole = sum(
            1 for row in index.records(0, SAMPLES)[1] if row["offset"] + row["size"] <= path.stat().st_size
        )
        samples = trusting.read(np.arange(SAMPLES))
        assert samples[:num_whole] == right[:num_whole]
        for sample in samples[num_whole:]:
            assert f"{name}: wanted " in sample.defect
            assert "the object is truncated" in sample.defect


def test_a_cache_spares_requests_and_keeps_nothing_wrong(
    clean: tuple[list[tuple[Any, ...]], int],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    caches: list[CachedStore] = []

    def opener(url: str, **options: Any) -> Store:
        caches.append(
            CachedStore(open_store(url, **options), tmp_path / "cache", 1 << 30, block_bytes=1 << 16)
        )
        return caches[-1]

    stores = functools.partial(opener, read_timeout=0.5, stopped=proxy.ended.is_set)
    monkeypatch.setattr(workers.data.samples, "open_store", stores)
    proxy.chances = Chances(seed=5, busy=10, reset=5, close=5, short=2, long=2)
    assert epoch() == clean[0]
    sizes = sum(info.size for info in open_store(URL).list() if info.key.endswith(".tar"))
    first = caches.pop()
    # Two threads may fetch the same block at once.
    assert sizes <= first.bytes_fetched < 1.5 * sizes
    del proxy.requests[:]
    assert epoch() == clean[0]
    assert (caches[-1].misses, caches[-1].bytes_fetched) == (0, 0)
    assert caches[-1].hits > 0
