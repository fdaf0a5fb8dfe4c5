"""`compute.max_hours`: counted from the user's command, ended by whoever looks, begun anew by the next."""

import json
import threading
from typing import Any

import pytest
from ray.job_submission import JobStatus

from orchestrator import time_limit
from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, name_runs, write_spec
from orchestrator.job_records import (
    Restarts,
    find_wish,
    is_wished,
    read_stop,
    read_wish,
    wish,
    write_restarts,
)
from orchestrator.status import run_status
from orchestrator.supervisor import Stopped, Supervisor
from orchestrator.time_limit import max_hours, watch_time, write_off
from tests.fake_ray import SITE, FakeRay, complete, make_spec
from tests.test_config import VALUES, changed
from workers.config import make_config
from workers.storage import Store, open_store

CONFIG = make_config(changed("compute.max_hours", 2))
OVER = "compute.max_hours 2 are over"


class Clock:
    """Of all who look."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time", clock.time)
    return clock


@pytest.fixture
def store(store_url: str) -> Store:
    return open_store(store_url)


@pytest.fixture
def spec(store_url: str) -> JobSpec:
    """Of a job that was just wished."""
    spec = make_spec(store_url, CONFIG)
    write_spec(spec)
    name_runs(open_store(store_url), spec)
    return spec


def test_hours_count_from_the_command_and_not_from_restarts(
    clock: Clock, store: Store, spec: JobSpec
) -> None:
    wish(store, spec.digest, running=True)
    clock.now += 7199
    write_restarts(store, spec.digest, Restarts(1, 0))
    assert not write_off(store, spec)
    assert read_stop(store, spec.digest, "job-0") is None
    clock.now += 2
    assert write_off(store, spec) and write_off(store, spec)
    assert read_wish(store, spec.digest) is False
    # What every wait of a driver asks, for room, too.
    assert read_stop(store, spec.digest, "job-0") == OVER
    wish(store, spec.digest, running=True)
    clock.now += 7199
    assert not write_off(store, spec) and is_wished(store, spec.digest)
    wish(store, spec.digest, running=False)
    clock.now += 2
    assert not write_off(store, spec)
    assert read_stop(store, spec.digest, "job-0") == "stopped by its user"


def test_a_wish_of_an_earlier_version_is_one_without_a_limit(
    clock: Clock, store: Store, spec: JobSpec
) -> None:
    for running in (True, False):
        store.write(f"jobs/{spec.digest}.wish.json", json.dumps({"running": running}).encode())
        found = find_wish(store, spec.digest)
        assert found is not None and (found.running, found.at, found.reason) == (running, None, "")
        assert not write_off(store, spec)
        assert read_wish(store, spec.digest) is running


def test_of_several_runs_the_fewest_hours_count_and_without_any_nobody_is_asked(store_url: str) -> None:
    others = [make_config(changed("compute.max_hours", hours)) for hours in (0.5, None)]
    assert max_hours(make_spec(store_url).model_copy(update={"configs": (CONFIG, *others)})) == 0.5
    spec = make_spec(store_url, others[1])
    assert max_hours(spec) is None
    assert not write_off(open_store(store_url), spec)


def test_a_limit_is_no_part_of_a_run_s_identity() -> None:
    assert make_config(VALUES).run == CONFIG.run


def test_what_is_complete_is_still_told_of(clock: Clock, store: Store, spec: JobSpec) -> None:
    wish(store, spec.digest, running=True)
    complete(store.url, CONFIG)
    clock.now += 1e6
    assert not write_off(store, spec)
    assert is_wished(store, spec.digest)


def test_a_supervisor_ends_what_has_no_driver_and_the_same_command_goes_on(
    clock: Clock,
    store: Store,
    spec: JobSpec,
    fake: FakeRay,
) -> None:
    site = SITE.model_copy(update={"runs": store.url})

    def state() -> tuple[str, str]:
        found = run_status(site, spec, CONFIG.run)
        return found.state, found.detail

    wish(store, spec.digest, running=True)
    job = Cluster(site).start(spec)
    supervisor = Supervisor(site, spec, job)
    clock.now += 7201
    fake.failures = [ConnectionError("refused")]
    assert not supervisor.step()  # Ray is away; its driver, if it lives, sees it
    assert read_stop(store, spec.digest, job) == OVER
    assert state() == ("stopping", f"{OVER}; it commits, then ends")
    fake.jobs[job].status = JobStatus.FAILED
    with pytest.raises(Stopped, match=f"stopped at image 0; {OVER}; the same command goes on from there"):
        supervisor.step()
    assert len(fake.jobs) == 1
    assert state() == ("stopped", f"{OVER}; the same command goes on from its last commit")
    wish(store, spec.digest, running=True)
    assert Cluster(site).start(spec) != job
    assert not supervisor.step()
    assert state()[0] == "waiting"


def test_a_driver_ends_itself_when_its_workers_do_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    ended = threading.Event()

    def kill(*arguments: Any) -> None:
        killed.append((*arguments, read_stop(store, spec.digest, "job-0")))
        ended.set()

    monkeypatch.setattr(time_limit, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(time_limit, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(time_limit.os, "kill", kill)
    spec = make_spec(store.url, make_config(changed("compute.max_hours", 1e-6)))
    wish(store, spec.digest, running=True)
    watch_time(spec)
    assert ended.wait(60)
    ((process, number, reason),) = killed
    assert process == time_limit.os.getpid() and number == time_limit.signal.SIGTERM
    assert reason == "compute.max_hours 1e-06 are over"
