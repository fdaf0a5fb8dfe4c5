"""How many workers fit a cluster, and when a group has to make way."""

from typing import Any

import pytest
import ray

from orchestrator import attempt as attempt_module
from orchestrator import capacity
from orchestrator.attempt import Attempt
from orchestrator.capacity import Room, count_slots, room
from orchestrator.job import JobSpec, run_url
from orchestrator.job_records import wish
from tests.test_config import changed
from tests.test_driver import ALONE
from workers.config import ComputeConfig, WorkerRange, make_config
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.control import read_stop

ELASTIC = ComputeConfig(workers=WorkerRange(min=2, max=8))


@pytest.mark.parametrize(
    ("nodes", "compute", "slots"),
    [
        ([], ComputeConfig(), 0),
        ([{"CPU": 2.0}], ComputeConfig(), 2),
        ([{"CPU": 3.0}, {"CPU": 3.0}], ComputeConfig(cpus_per_worker=2), 2),
        ([{"CPU": 7.0}, {}], ComputeConfig(cpus_per_worker=8), 0),
        ([{"CPU": 64.0}], ComputeConfig(gpus_per_worker=1), 0),
        (
            [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 4.0}],
            ComputeConfig(cpus_per_worker=16, gpus_per_worker=2),
            4,
        ),
    ],
)
def test_a_worker_needs_its_cpus_and_gpus_on_one_node(
    nodes: list[dict[str, float]], compute: ComputeConfig, slots: int
) -> None:
    assert count_slots(nodes, compute) == slots


@pytest.mark.parametrize(
    ("compute", "now", "beside", "size"),
    [
        (ELASTIC, Room(16, 16, leaving=False), 0, 8),
        (ELASTIC, Room(5, 3, leaving=False), 0, 3),
        (ELASTIC, Room(5, 1, leaving=False), 3, 4),
        (ELASTIC, Room(3, 2, leaving=True), 4, 3),
        (ELASTIC, Room(1, 1, leaving=False), 0, None),
        (ELASTIC.model_copy(update={"shard_workers": 2}), Room(7, 7, leaving=False), 0, 6),
        (ComputeConfig(workers=4), Room(8, 8, leaving=False), 0, 4),
    ],
)
def test_a_group_is_as_large_as_there_is_room(
    compute: ComputeConfig, now: Room, beside: int, size: int | None
) -> None:
    assert now.fits(compute, at_most=8, beside=beside) == size


def test_a_node_that_is_about_to_go_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(name: str, *, alive: bool = True) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 4.0, "memory": 1e9}}

    free = {"a": {"CPU": 1.0}, "b": {"CPU": 4.0}, "c": {"CPU": 4.0}}
    draining: dict[str, int] = {}
    monkeypatch.setattr(ray, "nodes", lambda: [node("a"), node("b"), node("c"), node("d", alive=False)])
    monkeypatch.setattr(capacity.ray_state, "available_resources_per_node", lambda: free)
    monkeypatch.setattr(capacity.ray_state.state, "get_draining_nodes", lambda: draining)
    assert room(ELASTIC) == Room(12, 9, leaving=False)
    draining["b"] = 0  # nothing runs there: an autoscaler takes idle nodes away
    assert room(ELASTIC) == Room(8, 5, leaving=False)
    draining["a"] = 0
    assert room(ELASTIC) == Room(4, 4, leaving=True)


@pytest.mark.parametrize(
    "cause", ["a node is about to go", "there is room for 6 workers", "stopped by its user"]
)
def test_a_group_is_asked_to_make_way(monkeypatch: pytest.MonkeyPatch, store_url: str, cause: str) -> None:
    config = make_config(changed("compute.workers", {"min": 2, "max": 6}))
    spec = JobSpec(configs=(config,), runs=store_url, mlflow="http://127.0.0.1:1", experiment="x")
    attempt = Attempt(spec, "job-0", [config], 4, ALONE)
    now = {
        "a node is about to go": Room(2, 0, leaving=True),
        "there is room for 6 workers": Room(8, 4, leaving=False),
    }
    calm = Room(4, 0, leaving=False)
    monkeypatch.setattr(attempt_module, "room", lambda compute: calm)
    monkeypatch.setattr(attempt_module, "SETTLED_SECONDS", 0.0)
    run = open_store(run_url(store_url, config))
    attempt._look()
    assert attempt.reason is None
    monkeypatch.setattr(attempt_module, "room", lambda compute: now.get(cause, calm))
    if cause not in now:
        wish(open_store(store_url), spec.digest, running=False)
    attempt._look()
    attempt._look()  # the group has no lease yet
    CommitLog(run).take_lease()
    attempt._look()
    assert attempt.reason == read_stop(run, 0) == cause
