"""Events: what a writer leaves in the store and what a reader makes of it, whoever dies in between."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import DataError
from workers.storage import AlreadyExists, FileStore, NotFound, ObjectInfo, Unavailable
from workers.training import metrics
from workers.training.metrics import EventReader, EventWriter, lease_key, segment_key


class MemoryStore:
    """What events need of a store; `before_head` runs when somebody looks for a lease."""

    url = "memory://run"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.before_head: Callable[[], object] = lambda: None

    def read(self, key: str, limit: int | None = None) -> bytes:
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key]

    def head(self, key: str) -> ObjectInfo:
        self.before_head()
        return ObjectInfo(key, len(self.read(key)), "")

    def create(self, key: str, data: bytes) -> None:
        if key in self.objects:
            raise AlreadyExists(key)
        self.objects[key] = data


def numbers(reader: EventReader) -> list[tuple[int, int]]:
    """Epoch and number of each event that is new."""
    return [(event["epoch"], event["images_seen"]) for event in reader.read()]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_a_segment_is_lines_of_json_written_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    writer = EventWriter(store, 3)
    writer.flush()
    assert list(store.list()) == []
    writer.write("metrics", 64, values={"loss": 1.5})
    writer.write("commit", 64, seq=0, complete=False)
    writer.flush()
    writer.flush()
    writer.write("metrics", 128, values={"loss": 0.5})
    writer.flush()
    assert [info.key for info in store.list()] == [
        "events/000003-000000.jsonl",
        "events/000003-000001.jsonl",
    ]
    assert store.read("events/000003-000000.jsonl").count(b"\n") == 1
    with pytest.raises(AlreadyExists):
        write_one(EventWriter(store, 3))


def write_one(writer: EventWriter) -> None:
    writer.write("metrics", 1, values={})
    writer.flush()


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    writer = EventWriter(store, 0)
    values = {"loss": math.nan, "norm": math.inf, "small": 5e-324}
    writer.write("metrics", 10**12, values=values, text="line\nbreak\u2028 ä \r\n", counts=[[1, 2], [3, 4]])
    writer.flush()
    (event,) = EventReader(store).read()
    assert event["epoch"] == 0
    assert event["kind"] == "metrics"
    assert event["images_seen"] == 10**12
    assert event["text"] == "line\nbreak\u2028 ä \r\n"
    assert event["counts"] == [[1, 2], [3, 4]]
    assert math.isnan(event["values"].pop("loss"))
    assert event["values"] == {"norm": math.inf, "small": 5e-324}


def test_a_segment_is_written_every_few_seconds(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.01)
    writer, reader = EventWriter(store, 0), EventReader(store)
    writer.start()
    for number in range(3):
        writer.write("metrics", number)
        until(lambda number=number: (0, number) in numbers(reader))
    writer.close()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("written", [False, True], ids=["lost request", "lost reply"])
def test_events_outlive_an_outage_of_the_store(store: MemoryStore, written: bool) -> None:
    """Of a segment that the store may have or not nothing is changed, nor is it written twice."""
    writer = EventWriter(store, 0)
    writer.write("metrics", 1)
    create = store.create

    def down(key: str, data: bytes) -> None:
        if written:
            create(key, data)
        raise Unavailable("down")

    store.create = down
    for _ in range(2):
        with pytest.raises(DataError):
            writer.flush()
        writer.write("metrics", 2)
    store.create = create
    writer.flush()
    assert numbers(EventReader(store)) == [(0, 1), (0, 2), (0, 2)]
    assert list(store.objects) == [segment_key(0, number) for number in range(2 + written)]


def test_training_goes_on_in_an_outage_until_much_is_to_be_written(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(metrics, "MAX_WAITING_BYTES", 50_000)
    writer, create = EventWriter(store, 0), store.create
    attempts, refused = [], threading.Event()

    def down(key: str, data: bytes) -> None:
        attempts.append(len(data))
        refused.set()
        raise Unavailable("down")

    store.create = down
    writer.start()
    writer.write("metrics", 0)
    refused.wait()
    for number in range(1, 2000):
        if writer._size >= metrics.MAX_WAITING_BYTES:
            store.create = create
        writer.write("metrics", number)
    assert len(set(attempts)) == 1
    writer.flush()
    writer.close()
    assert numbers(EventReader(store)) == [(0, number) for number in range(2000)]
    assert max(map(len, store.objects.values())) < 51_000


def test_a_store_that_refuses_events_ends_training(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(store, "create", refuse)
    writer = EventWriter(store, 0)
    writer.start()
    with pytest.raises(DataError, match="no space left"):
        until(lambda: writer.write("metrics", 1))


def refuse(key: str, data: bytes) -> None:
    raise DataError("no space left")


def test_a_reader_hands_out_each_event_once(store: MemoryStore) -> None:
    writer, reader = EventWriter(store, 0), EventReader(store)
    assert numbers(reader) == []
    for number in range(3):
        writer.write("metrics", number)
    writer.flush()
    for _ in range(2):
        write_one(writer)
    assert numbers(reader) == [(0, 0), (0, 1), (0, 2), (0, 1), (0, 1)]
    assert numbers(reader) == []
    write_one(writer)
    assert numbers(reader) == [(0, 1)]


def test_a_reader_that_stops_in_the_middle_goes_on_there(store: MemoryStore) -> None:
    writer, reader = EventWriter(store, 0), EventReader(store)
    for number in range(4):
        writer.write("metrics", number)
    writer.flush()
    for event in reader.read():
        if event["images_seen"] == 1:
            break
    assert numbers(reader) == [(0, 2), (0, 3)]


def test_a_reader_goes_on_after_an_outage_of_the_store(store: MemoryStore) -> None:
    writer, reader = EventWriter(store, 0), EventReader(store)
    writer.write("metrics", 1)
    writer.flush()
    read = store.read

    def down(key: str, limit: int | None = None) -> bytes:
        if key == segment_key(0, 1):
            raise DataError("down")
        return read(key)

    store.read = down
    events = reader.read()
    assert next(events)["images_seen"] == 1
    with pytest.raises(DataError):
        next(events)
    store.read = read
    writer.write("metrics", 2)
    writer.flush()
    assert numbers(reader) == [(0, 2)]


def test_epochs_follow_each_other_also_those_that_said_nothing(store: MemoryStore) -> None:
    for epoch in range(6):
        store.create(lease_key(epoch), b"{}")
        if epoch in (1, 4):
            write_one(EventWriter(store, epoch))
    reader = EventReader(store)
    assert numbers(reader) == [(1, 1), (4, 1)]
    write_one(EventWriter(store, 5))
    assert numbers(reader) == [(5, 1)]


def test_a_writer_that_was_thought_dead_is_not_heard(store: MemoryStore) -> None:
    old, reader = EventWriter(store, 0), EventReader(store)
    store.create(lease_key(0), b"{}")
    write_one(old)
    store.create(lease_key(1), b"{}")
    assert numbers(reader) == [(0, 1)]
    write_one(old)
    write_one(EventWriter(store, 1))
    assert numbers(reader) == [(1, 1)]


def test_what_was_written_just_before_a_takeover_is_heard(store: MemoryStore) -> None:
    """The reader found no segment; then one came, and the lease; then the reader found the lease."""
    old, reader = EventWriter(store, 0), EventReader(store)

    def meanwhile() -> None:
        store.before_head = lambda: None
        write_one(old)
        store.create(lease_key(1), b"{}")

    store.before_head = meanwhile
    assert numbers(reader) == [(0, 1)]
    write_one(EventWriter(store, 1))
    assert numbers(reader) == [(1, 1)]


@given(st.lists(st.sampled_from(["write", "flush", "takeover", "read"]), max_size=60))
def test_whenever_one_reads_all_that_is_there_comes_in_order(acts: list[str]) -> None:
    store = MemoryStore()
    epoch, number = 0, 0
    writer, reader = EventWriter(store, epoch), EventReader(store)
    pending: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    read: list[tuple[int, int]] = []
    for act in acts:
        if act == "write":
            number += 1
            writer.write("metrics", number)
            pending.append((epoch, number))
        elif act == "flush":
            writer.flush()
            written += pending
            pending.clear()
        elif act == "takeover":
            epoch += 1
            store.create(lease_key(epoch), b"{}")
            writer = EventWriter(store, epoch)
            pending.clear()
        else:
            read += numbers(reader)
            assert read == written
    assert read + numbers(reader) == written
    assert numbers(EventReader(store)) == written


def test_keys_sort_as_they_were_written() -> None:
    keys: list[Any] = [segment_key(epoch, seq) for epoch in (0, 1, 10, 99_999) for seq in (0, 9, 10, 99_999)]
    assert keys == sorted(keys)
    assert lease_key(7) == "leases/000007.json"
