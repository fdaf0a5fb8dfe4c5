"""Runs that share a cluster: who gets how many workers, by the pure rule, by entries in a store, on Ray."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import attempt as attempt_module
from orchestrator import driver, turn
from orchestrator import place as place_module
from orchestrator.attempt import Attempt
from orchestrator.capacity import Room
from orchestrator.job import run_url
from orchestrator.packing import Resources, slots, worker_resources
from orchestrator.place import Place
from orchestrator.queue import Entry, Quota, Share, allot, in_order
from orchestrator.queue_records import (
    FORGOTTEN_SECONDS,
    QUOTAS,
    SILENT_SECONDS,
    EntryReader,
    entry_key,
    read_quotas,
    write_entry,
    write_quotas,
)
from tests.test_config import changed
from tests.test_driver import CONFIG, JOB, make_spec, use_rooms
from workers.config import ComputeConfig, make_config
from workers.errors import ConfigError, DataError
from workers.storage import FileStore, Unavailable, open_store
from workers.training.commits import CommitLog
from workers.training.control import read_stop

CPU, GPU = {"CPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}


def make_entry(name: str, workers: int | tuple[int, int] = 1, **fields: Any) -> Entry:
    few, most = (workers, workers) if isinstance(workers, int) else workers
    entry = {"job": "job", "runs": (name,), "queue": "default", "priority": 0, "at": 0.0, "worker": CPU}
    return Entry(**{**entry, "name": name, "counts": tuple(range(few, most + 1)), **fields})


def workers(shares: dict[str, Share]) -> dict[str, int]:
    return {name: share.workers for name, share in shares.items()}


def nodes_of(*cpus: float) -> list[Resources]:
    return [{"CPU": count} for count in cpus]


def test_higher_priority_goes_first_and_equals_wait_for_who_was_there() -> None:
    first, second = make_entry("b", 3, at=1.0), make_entry("a", 3, at=2.0)
    shares = allot([second, first], {}, nodes_of(4))
    assert shares == {"b": Share(3), "a": Share(0, "1 run of higher or equal priority is ahead")}
    running = make_entry("a", 3, at=2.0, started=5.0)
    assert workers(allot([running, first], {}, nodes_of(4))) == {"a": 3, "b": 0}
    urgent = make_entry("c", 2, at=9.0, priority=1)
    assert workers(allot([running, first, urgent], {}, nodes_of(4))) == {"c": 2, "a": 0, "b": 0}
    assert allot([running, first, urgent], {}, nodes_of(4))["b"].why.startswith("2 runs of higher or equal")


def test_equals_share_and_a_lower_one_takes_nothing_from_a_higher_one() -> None:
    elastic = make_entry("a", (2, 8), started=1.0)
    assert workers(allot([elastic], {}, nodes_of(4, 4))) == {"a": 8}
    assert workers(allot([elastic, make_entry("b", 4)], {}, nodes_of(4, 4))) == {"a": 4, "b": 4}
    lower = make_entry("b", 4, priority=-1)
    assert workers(allot([elastic, lower], {}, nodes_of(4, 4))) == {"a": 8, "b": 0}
    other = make_entry("b", (2, 8), started=2.0)
    assert workers(allot([elastic, other], {}, nodes_of(4, 6))) == {"a": 8, "b": 2}


def test_a_large_run_is_not_passed_by_small_equals_but_room_is_used_by_lower_ones() -> None:
    running, large = make_entry("a", 3, started=1.0), make_entry("b", 4, at=1.0)
    small, lower = make_entry("c", 1, at=2.0), make_entry("d", 1, priority=-1)
    entries = [running, large, small, lower]
    assert workers(allot(entries, {}, nodes_of(4))) == {"a": 3, "b": 0, "c": 0, "d": 1}
    assert workers(allot(entries[1:], {}, nodes_of(4))) == {"b": 4, "c": 0, "d": 0}
    # On nodes that are of no use to the large one it may go ahead.
    large = make_entry("b", 1, at=1.0, worker={"CPU": 4.0})
    assert workers(allot([running, large, small], {}, nodes_of(4, 2))) == {"a": 3, "b": 0, "c": 1}


def test_who_never_fits_keeps_nobody_waiting() -> None:
    small, huge = make_entry("b", 1, at=2.0), make_entry("a", 9, at=1.0)
    shares = allot([huge, small], {}, nodes_of(4, 4))
    assert shares == {"a": Share(0), "b": Share(1)}
    quotas = {"vision": Quota(cpus=8)}
    shares = allot([huge.model_copy(update={"queue": "vision"}), small], quotas, nodes_of(10))
    assert shares == {"a": Share(0, "queue vision may use 8 CPU, 9 are needed"), "b": Share(1)}


def test_a_quota_bounds_a_queue_and_no_other() -> None:
    vision = [make_entry(name, (2, 4), queue="vision", at=at, worker=GPU) for at, name in enumerate("ab")]
    other = make_entry("c", 4, at=9.0, worker=GPU)
    quotas, nodes = {"vision": Quota(gpus=3)}, [{"CPU": 64.0, "GPU": 8.0}]
    shares = allot([*vision, other], quotas, nodes)
    assert workers(shares) == {"a": 3, "b": 0, "c": 4}
    assert shares["b"].why == "queue vision may use 3 GPU, 2 are used, 2 are needed"
    # Also where the cluster adds nodes on demand.
    assert workers(allot([*vision, other], quotas, None)) == {"a": 3, "b": 0, "c": 4}
    assert workers(allot([*vision, other], {}, None)) == {"a": 4, "b": 4, "c": 4}
    # A small equal does not live on what a larger one ahead of it waits for.
    late = make_entry("d", 1, queue="vision", at=5.0, worker=GPU)
    assert workers(allot([*vision, late], quotas, nodes)) == {"a": 3, "b": 0, "d": 0}


def test_only_nodes_with_the_accelerator_count() -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0}]
    compute = ComputeConfig(workers=2, gpus_per_worker=1, accelerator="A100")
    assert worker_resources(compute) == {"CPU": 1, "GPU": 1, "accelerator_type:A100": 0.001}
    wanted = make_entry("a", 2, worker=worker_resources(compute))
    assert workers(allot([wanted], {}, nodes)) == {"a": 2}
    other = worker_resources(compute.model_copy(update={"accelerator": "H100"}))
    assert allot([make_entry("a", 2, worker=other)], {}, nodes) == {"a": Share(0)}
    # Who needs no GPU is put elsewhere, whoever came first.
    first = make_entry("b", 8, started=1.0)
    assert workers(allot([first, wanted], {}, nodes)) == {"a": 2, "b": 8}


def test_running_groups_of_several_sizes_are_not_called_too_many() -> None:
    """By the order of their start first-fit would find no place for the last."""
    sizes = {"a": 2.0, "b": 1.0, "c": 3.0, "d": 2.0}
    entries = [
        make_entry(name, 1, started=float(at), worker={"CPU": cpus})
        for at, (name, cpus) in enumerate(sizes.items())
    ]
    assert set(workers(allot(entries, {}, nodes_of(4, 4))).values()) == {1}


WORKERS = st.sampled_from([CPU, GPU, {"CPU": 3.0}, {"CPU": 1.0, "accelerator_type:H100": 0.001}])
NODES = st.lists(
    st.sampled_from(
        [{"CPU": 4.0}, {"CPU": 9.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 4.0, "accelerator_type:H100": 1.0}]
    ),
    max_size=4,
)
LIMITS = st.none() | st.integers(0, 12)
QUOTA = st.dictionaries(st.sampled_from("pq"), st.builds(Quota, cpus=LIMITS, gpus=LIMITS))


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    few = st.integers(1, 6)
    return [
        make_entry(
            f"run{number}",
            (fewest := draw(few), fewest + draw(st.integers(0, 4))),
            queue=draw(st.sampled_from("pq")),
            priority=draw(st.integers(-1, 1)),
            at=float(draw(st.integers(0, 3))),
            started=draw(st.none() | st.floats(0, 3)),
            worker=draw(WORKERS),
        )
        for number in range(draw(st.integers(0, 7)))
    ]


def used(entries: list[Entry], shares: dict[str, Share], resource: str, queue: str) -> float:
    return sum(shares[e.name].workers * e.worker.get(resource, 0) for e in entries if e.queue == queue)


@given(entry_lists(), QUOTA, NODES)
@settings(max_examples=200, deadline=None)
def test_no_share_is_above_the_cluster_or_a_quota(
    entries: list[Entry], quotas: dict[str, Quota], nodes: list[Resources]
) -> None:
    shares = allot(entries, quotas, nodes)
    assert shares.keys() == {entry.name for entry in entries}
    for entry in entries:
        assert shares[entry.name].workers in (0, *entry.counts)
        assert not (shares[entry.name].workers and shares[entry.name].why)
    for name in ("CPU", "GPU"):
        total = sum(node.get(name, 0) for node in nodes)
        assert sum(used(entries, shares, name, queue) for queue in "pq") <= total
    for queue, quota in quotas.items():
        for name, limit in quota.limits.items():
            assert used(entries, shares, name, queue) <= limit
    labelled = [entry for entry in entries if len(entry.worker) == 2 and "GPU" not in entry.worker]
    assert sum(shares[e.name].workers for e in labelled) <= sum(
        slots(node, {"CPU": 1.0}) for node in nodes if "accelerator_type:H100" in node
    )


@given(entry_lists(), QUOTA, NODES | st.none(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_driver_comes_to_the_same(
    entries: list[Entry], quotas: dict[str, Quota], nodes: list[Resources] | None, order: random.Random
) -> None:
    shares = allot(entries, quotas, nodes)
    order.shuffle(entries)
    assert allot(entries, quotas, nodes) == shares


@given(entry_lists(), QUOTA, NODES | st.none())
@settings(max_examples=200, deadline=None)
def test_lower_ones_change_nothing_for_higher_ones_nor_those_who_wait_for_equals_with_a_place(
    entries: list[Entry], quotas: dict[str, Quota], nodes: list[Resources] | None
) -> None:
    shares = allot(entries, quotas, nodes)
    for lowest in (0, 1):
        higher = [entry for entry in entries if entry.priority >= lowest]
        assert allot(higher, quotas, nodes) == {e.name: shares[e.name] for e in higher}
    ordered = in_order(entries)
    for count in range(len(ordered)):
        # Whoever comes later may take what an elastic equal has more than its fewest, and no more.
        fewer = allot(ordered[:count], quotas, nodes)
        for name, share in fewer.items():
            assert (shares[name].workers > 0) == (share.workers > 0)
            assert shares[name].why == share.why


@given(entry_lists(), QUOTA, NODES, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_everybody_who_ever_fits_gets_a_turn_though_small_equals_keep_coming(
    entries: list[Entry], quotas: dict[str, Quota], nodes: list[Resources], order: random.Random
) -> None:
    """The one that has run longest ends at a time, and another comes, who is wished later."""
    entries = [entry.model_copy(update={"priority": 0, "started": None}) for entry in entries]
    alone = {e.name for e in entries if allot([e], quotas, nodes)[e.name].workers}
    waiting, clock, running = set(alone), 10.0, list(entries)
    for step in range(60):
        shares = allot(running, quotas, nodes)
        clock += 1.0
        running = [
            entry.model_copy(
                update={"started": entry.started or clock if shares[entry.name].workers else None}
            )
            for entry in running
        ]
        placed = [entry for entry in running if entry.started is not None]
        waiting -= {entry.name for entry in placed}
        if not waiting:
            return
        assert placed, "nobody runs, though somebody would fit"
        running.remove(min(placed, key=lambda entry: entry.started or 0.0))
        running.append(make_entry(f"new{step}", 1, queue=order.choice("pq"), at=clock))
    raise AssertionError(f"{waiting} never had a turn")


@pytest.fixture
def enter(store_url: str) -> Iterator[Callable[..., Place]]:
    """Makes places in the queue of one store, which are left at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *entry, **fields: stack.enter_context(Place(store_url, make_entry(*entry, **fields)))


def names(store_url: str) -> list[str]:
    return sorted(EntryReader(open_store(store_url)).read())


def grow_old(store_url: str, name: str, seconds: float) -> None:
    path = Path(store_url.removeprefix("file://"), entry_key(name))
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_places_know_of_each_other_until_they_are_left(store_url: str, enter: Callable[..., Place]) -> None:
    nodes = nodes_of(4)
    first = enter("a", 3)
    assert first.take(3, nodes)
    with Place(store_url, make_entry("b", 2, priority=1)) as urgent:
        assert names(store_url) == ["a", "b"]
        assert urgent.take(2, nodes)
        first._look()  # as its thread does
        assert first.share(nodes) == Share(0, "1 run of higher or equal priority is ahead")
        first.wait("for b")
        assert EntryReader(open_store(store_url)).read()["a"].entry.note == "for b"
    first._look()
    assert names(store_url) == ["a"]
    assert first.share(nodes) == Share(3)


def test_of_two_that_come_at_once_one_has_the_place(enter: Callable[..., Place]) -> None:
    first, second = enter("a", 3), enter("b", 3)
    nodes = nodes_of(4)
    assert first.share(nodes) == Share(3)
    taken = [second.take(3, nodes), first.take(3, nodes)]
    assert sorted(taken) == [False, True]
    for place in (first, second):
        place._look()
    assert sorted(place.share(nodes).workers for place in (first, second)) == [0, 3]


def test_who_is_silent_does_not_count_and_is_removed_after_a_day(
    store_url: str, enter: Callable[..., Place]
) -> None:
    for name in ("dead", "gone"):
        write_entry(open_store(store_url), make_entry(name, 3, priority=9))
    grow_old(store_url, "gone", FORGOTTEN_SECONDS + 60)
    place = enter("a", 3)
    assert place.share(nodes_of(4)) == Share(0, "1 run of higher or equal priority is ahead")
    grow_old(store_url, "dead", SILENT_SECONDS + 60)
    place._look()
    assert place.share(nodes_of(4)) == Share(3)
    assert names(store_url) == ["a", "dead"]


def test_a_thread_says_that_the_group_lives(
    monkeypatch: pytest.MonkeyPatch, store_url: str, enter: Callable[..., Place]
) -> None:
    monkeypatch.setattr(place_module, "BEAT_SECONDS", 0.01)
    place, store = enter("a", 3), open_store(store_url)
    grow_old(store_url, "a", 3600.0)
    old = store.modified(entry_key("a"))
    while store.modified(entry_key("a")) == old:
        time.sleep(0.01)
    write_quotas(store, {"default": Quota(cpus=2)})
    while not place.share(None).why:
        time.sleep(0.01)


def test_what_was_known_last_counts_while_the_store_is_away(
    monkeypatch: pytest.MonkeyPatch, enter: Callable[..., Place]
) -> None:
    running, waiting = enter("a", 3), enter("b", 3)
    nodes = nodes_of(4)
    assert running.take(3, nodes)
    waiting._look()

    def away(*_: object) -> None:
        raise Unavailable("connection refused")

    monkeypatch.setattr(FileStore, "write", away)
    waiting._try_to_look()
    waiting.wait("for a")
    assert waiting.share(nodes) == Share(0, "1 run of higher or equal priority is ahead")
    running._try_to_look()
    assert running.share(nodes) == Share(3)


def test_what_is_no_entry_stops_nobody(store_url: str, enter: Callable[..., Place]) -> None:
    store = open_store(store_url)
    later = make_entry("later", 1).model_dump() | {"colour": "green"}
    store.write(entry_key("later"), json.dumps(later).encode())
    store.write(entry_key("junk"), b"{")
    store.write(entry_key("odd"), json.dumps(later | {"worker": {"CPU": 0}}).encode())
    store.write(entry_key("false"), json.dumps(later).encode())
    assert names(store_url) == ["later"]
    assert enter("a", 3).share(nodes_of(4)) == Share(3)


def test_quotas_are_kept_and_what_is_none_is_told(store_url: str) -> None:
    store = open_store(store_url)
    assert read_quotas(store) == {}
    quotas = {"vision": Quota(gpus=8), "text": Quota(cpus=0)}
    write_quotas(store, quotas)
    assert read_quotas(store) == quotas
    store.write(QUOTAS, b'{"vision": {"gpus": -1}}')
    with pytest.raises(DataError, match=r"queue/quotas\.json holds no quotas; delete it"):
        read_quotas(store)


def test_a_person_sees_the_queue_and_limits_it(tmp_path: Path, store_url: str) -> None:
    site, store = tmp_path / "site.yaml", open_store(store_url)
    site.write_text(
        f"{{ray: 'http://127.0.0.1:1', mlflow: 'http://127.0.0.1:2', data: {store_url}, runs: {store_url}}}"
    )
    write_entry(store, make_entry("b", 2, at=1.0, note="for a"))
    runs = make_entry("a", (2, 4), at=2.0, worker=GPU, queue="vision")
    write_entry(store, runs.model_copy(update={"started": 3.0, "workers": 3}))

    def vitscale(*arguments: str) -> Any:
        command = [sys.executable, "-m", "pipelines.cli", "queue", *arguments, "--site", str(site), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert vitscale("limit", "vision", "--gpus", "8") == {"vision": {"cpus": None, "gpus": 8}}
    told = vitscale()
    assert [(entry["name"], entry["workers"], entry["note"]) for entry in told["entries"]] == [
        ("a", 3, ""),
        ("b", 0, "for a"),
    ]
    assert told["queues"]["vision"]["gpus"] == {"used": 3.0, "limit": 8}
    assert told["queues"]["default"] == {
        "cpus": {"used": 0, "limit": None},
        "gpus": {"used": 0, "limit": None},
        "waiting": 1,
    }
    assert vitscale("limit", "vision", "--none") == {}


class Turns:
    """A place whose share is another at each look."""

    def __init__(self, *shares: Share) -> None:
        self._shares = list(shares)
        self.notes: list[str] = []

    def share(self, nodes: object) -> Share:
        return self._shares.pop(0)

    def take(self, workers: int, nodes: object) -> bool:
        return True

    def wait(self, note: str) -> None:
        self.notes.append(note)


def test_a_driver_waits_for_its_turn_and_says_so(monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    spec = make_spec(store_url, CONFIG)
    ahead = Share(0, "1 run of higher or equal priority is ahead")
    place: Any = Turns(ahead, ahead, Share(4))
    use_rooms(monkeypatch, 4, 4, 4)
    notes: list[str] = []
    monkeypatch.setattr(turn, "write_note", lambda store, job, text: notes.append(text))
    assert turn.await_turn(spec, JOB, place, patience=0) == 4
    assert notes == [f"waiting in queue vision: {ahead.why}", ""]
    assert place.notes == [ahead.why] * 2


@pytest.mark.parametrize(
    ("share", "reason"),
    [
        (Share(4), None),
        (Share(3), "makes way in queue vision: its share is 3"),
        (Share(0, "2 runs are ahead"), "makes way in queue vision: 2 runs are ahead"),
        (Share(0), None),  # a node was lost, and nobody waits for the others
    ],
)
def test_a_group_makes_way_for_whom_its_place_is(
    monkeypatch: pytest.MonkeyPatch, store_url: str, share: Share, reason: str | None
) -> None:
    config = make_config(changed("compute.workers", {"min": 2, "max": 6}))
    monkeypatch.setattr(attempt_module, "room", lambda compute: Room(4, 0, leaving=False))
    run = open_store(run_url(store_url, config))
    CommitLog(run).take_lease()
    place: Any = Turns(share)
    attempt = Attempt(make_spec(store_url, config), JOB, [config], 4, place)
    attempt._look()
    assert attempt.reason == read_stop(run, 0) == reason


def test_after_a_loss_of_nodes_a_group_waits_for_what_others_say(
    monkeypatch: pytest.MonkeyPatch, store_url: str
) -> None:
    """Those that ran there have a place in the queue until they notice."""
    nodes = nodes_of(4, 4)
    monkeypatch.setattr(attempt_module, "room", lambda compute: Room(8, 0, leaving=False, nodes=nodes))
    short = Share(0, "1 run of higher or equal priority is ahead")
    place: Any = Turns(Share(4), short, short)
    attempt = Attempt(make_spec(store_url, CONFIG), JOB, [CONFIG], 4, place)
    attempt._look()
    nodes.pop()
    attempt._look()
    assert attempt.reason is None
    monkeypatch.setattr(attempt_module, "LOSS_SECONDS", 0.0)
    attempt._look()
    assert attempt.reason == f"makes way in queue vision: {short.why}"


def test_a_cluster_without_the_accelerator_says_which_there_are(
    monkeypatch: pytest.MonkeyPatch, store_url: str
) -> None:
    config = make_config(changed("compute.accelerator", "H100"))
    nodes = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 1.0}]
    monkeypatch.setattr(driver, "room", lambda compute: Room(0, 0, leaving=False, nodes=nodes))
    with pytest.raises(
        ConfigError, match=r"^compute\.accelerator: no node of this .* H100; there are: A100\. Ask for"
    ):
        driver._fit_all(make_spec(store_url, config), JOB)
