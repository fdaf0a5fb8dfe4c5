"""The checker of row R14 can fail: histories that no register has, and clients of a log that is broken."""

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.promotions import Promotion, PromotionLog
from tests.chaos.histories import Operation, not_linearizable
from tests.test_keys import record
from workers.storage import AlreadyExists, FileStore

LOG = [record(0, 1), record(1, 2, alias="candidate"), record(2, 3), record(3, 1)]


def write(seq: int, called: int, answered: int, version: int | None = None) -> Operation:
    of = LOG[seq]
    return Operation(
        0, "promote", of.alias, called, answered, seq, of.version if version is None else version
    )


def read(version: int | None, called: int, answered: int, alias: str = "champion") -> Operation:
    return Operation(1, "read", alias, called, answered, None, version)


@pytest.mark.parametrize(
    "operations",
    [
        [],
        [read(None, 0, 1), write(0, 2, 3), read(1, 4, 5), write(2, 6, 7), read(3, 8, 9), write(3, 10, 11)],
        [write(0, 0, 9), read(None, 1, 2), read(1, 3, 4)],
        [write(0, 0, 9), write(2, 0, 9), write(3, 0, 9), read(1, 5, 6), read(3, 7, 8), read(1, 10, 11)],
        [write(1, 0, 1), read(1, 2, 3), read(2, 4, 5, "candidate")],
    ],
)
def test_histories_that_a_register_has(operations: list[Operation]) -> None:
    assert not_linearizable(operations, LOG) == ""


@pytest.mark.parametrize(
    "operations",
    [
        [write(2, 0, 1), write(0, 2, 3)],
        [write(0, 0, 1), read(None, 2, 3)],
        [write(2, 0, 1), read(2, 2, 3)],
        [read(3, 0, 1), write(2, 2, 3)],
        [read(3, 0, 1), write(0, 2, 9)],
        [write(3, 0, 1), read(3, 2, 3)],
        [write(2, 0, 1), read(3, 2, 3), read(1, 4, 5), read(3, 6, 7)],
        [write(2, 0, 9, version=2)],
        [write(0, 0, 9), replace(write(0, 0, 9), client=2)],
        [replace(write(3, 0, 1), seq=4)],
    ],
)
def test_histories_that_none_has(operations: list[Operation]) -> None:
    assert not_linearizable(operations, LOG)


class LastWriterWins(PromotionLog):
    """On a store whose create-once is none, and without the hashes that would tell."""

    def append(self, promotion: Promotion) -> Promotion:
        time.sleep(0.001)
        data = json.dumps(asdict(promotion)).encode()
        self._store.write(f"promotions/toy/{promotion.seq:08d}.json", data)
        return promotion


class Stale(PromotionLog):
    """A client that believes what it read once."""

    def read(self, model: str, *, unsigned: bool = False) -> list[Promotion]:
        self._once = getattr(self, "_once", None) or super().read(model)
        return self._once


def race(
    store: FileStore, writer: type[PromotionLog], reader: type[PromotionLog]
) -> tuple[list[Operation], list[Promotion]]:
    """Eight clients that promote and a ninth that reads."""
    operations: list[Operation] = []
    start = threading.Barrier(9)

    def promote(client: int) -> None:
        log = writer(store)
        start.wait()
        for _ in range(4):
            while True:
                called, seq = time.monotonic_ns(), len(log.read("toy"))
                try:
                    log.append(record(seq, 10 + client))
                except AlreadyExists:
                    continue
                break
            answered = time.monotonic_ns()
            operations.append(Operation(client, "promote", "champion", called, answered, seq, 10 + client))

    def look() -> None:
        log = reader(store)
        start.wait()
        for _ in range(30):
            called = time.monotonic_ns()
            holder = log.holders("toy").get("champion")
            version = holder.version if holder else None
            answered = time.monotonic_ns()
            operations.append(Operation(99, "read", "champion", called, answered, None, version))
            time.sleep(0.003)

    threads = [threading.Thread(target=promote, args=(number,)) for number in range(8)]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return operations, PromotionLog(store).read("toy")


def test_the_log_is_linearizable_and_broken_ones_are_not(tmp_path: Path) -> None:
    assert not_linearizable(*race(FileStore(tmp_path / "good"), PromotionLog, PromotionLog)) == ""
    stale = FileStore(tmp_path / "stale")
    PromotionLog(stale).append(record(0, 1))
    assert "stands at no place" in not_linearizable(*race(stale, PromotionLog, Stale))
    assert not_linearizable(*race(FileStore(tmp_path / "broken"), LastWriterWins, PromotionLog))
