"""What a run shows to Prometheus: each event as the gauges that follow from it."""

import pytest

from tests.runs import CPU, tiny_config
from workers.storage import open_store
from workers.training import loop
from workers.training.gauges import GAUGES, Gauges
from workers.training.metrics import EventReader

START = {"kind": "start", "epoch": 2, "images_seen": 640, "time": 100.0, "world_size": 4}


def test_each_event_sets_what_it_tells() -> None:
    shown: dict[tuple[str, str], float] = {}
    gauges = Gauges(lambda name, run, value: shown.update({(name, run): value}))

    def hear(run: str, **event: object) -> dict[str, float]:
        """What that changes of the run, by the ends of the gauges' names."""
        shown.clear()
        gauges.hear(run, {"epoch": 2, "images_seen": 960, "time": 130.0, **event})
        assert {name for name, _ in shown} <= GAUGES.keys()
        return {name.removeprefix("vitscale_"): value for (name, of), value in shown.items() if of == run}

    assert hear("a", **START) == {
        "training": 1,
        "attempt": 2,
        "world_size": 4,
        "images_seen": 640,
        "last_commit_images": 640,
        "last_commit_timestamp_seconds": 100,
    }
    values = {"images_per_second": 7.0, "mfu": 0.4, "data_wait": 0.1, "accuracy": 0.5, "data_fetch_ms": 1.0}
    assert hear("a", kind="metrics", values=values) == {
        "images_seen": 960,
        "images_per_second": 7,
        "mfu": 0.4,
        "data_wait_ratio": 0.1,
    }
    assert hear("a", kind="metrics", values={"val_accuracy": 0.75}) == {
        "images_seen": 960,
        "val_accuracy": 0.75,
    }
    commit = {"last_commit_images": 960, "last_commit_timestamp_seconds": 130}
    assert hear("a", kind="commit", seq=1, complete=False) == commit
    assert hear("a", kind="bad_samples", of="training", samples=[{}, {}]) == {"quarantined_samples": 2}
    assert hear("a", kind="bad_samples", of="validation", samples=[{}]) == {}
    assert hear("a", kind="bad_step", count=3) == {"bad_steps": 3}
    assert hear("a", kind="straggler") == {"stragglers": 1}
    assert hear("a", kind="straggler") == {"stragglers": 2}
    assert hear("a", kind="epoch") == {}
    hear("b", **START)
    assert shown["vitscale_training", "a"] == 0 and shown["vitscale_training", "b"] == 1
    shown.clear()
    gauges.end()
    assert shown == {("vitscale_training", "b"): 0}


def test_a_group_that_trains_nothing_has_nothing_to_show() -> None:
    Gauges(lambda *_: pytest.fail("a gauge was set")).end()


def test_a_run_tells_its_listener_what_it_writes(digits_url: str, store_url: str) -> None:
    config = tiny_config(digits_url, steps=3)
    heard: list[tuple[str, object]] = []
    loop.train(config, store_url, CPU, lambda run, event: heard.append((run, dict(event))))
    assert heard == [(config.run, event) for event in EventReader(open_store(store_url)).read()]
