"""What `vitscale status` says of a run: from its records, with Ray's word as a hint."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from orchestrator import status as status_module
from orchestrator.job import run_url
from orchestrator.job_records import wish, write_done, write_failure, write_note
from orchestrator.status import run_status
from tests.fake_ray import CONFIG, SITE, make_spec
from workers.errors import ConfigError, DataError
from workers.storage import Store, open_store
from workers.training.commits import CommitLog
from workers.training.metrics import EventWriter, newest_events


class FakeCluster:
    """Ray, with one job or none, or away."""

    found: Any = None

    def __init__(self, site: Any) -> None:
        if isinstance(self.found, Exception):
            raise self.found

    def newest(self, spec: Any) -> Any:
        return self.found


@pytest.fixture
def ray_says(monkeypatch: pytest.MonkeyPatch) -> type[FakeCluster]:
    monkeypatch.setattr(status_module, "Cluster", FakeCluster)
    FakeCluster.found = None
    return FakeCluster


def job(status: JobStatus, started: float = 0.0) -> tuple[str, Any]:
    return "job-0", SimpleNamespace(status=status, start_time=1000 * started)


def speak(run: Store, images: int, **values: float) -> None:
    writer = EventWriter(run, 0)
    writer.write("start", 0, world_size=3)
    writer.write("metrics", images, values=values)
    writer.flush()


def test_states_follow_the_records(ray_says: type[FakeCluster], store_url: str) -> None:
    spec, store = make_spec(store_url), open_store(store_url)
    run, log = open_store(run_url(store_url, CONFIG)), CommitLog(open_store(run_url(store_url, CONFIG)))

    def state() -> tuple[str, str]:
        found = run_status(SITE, spec, CONFIG.run)
        return found.state, found.detail

    wish(store, spec.digest, running=True)
    ray_says.found = job(JobStatus.RUNNING)
    write_note(store, "job-0", "waiting for nodes")
    assert state() == ("waiting", "waiting for nodes")
    lease = log.take_lease()
    speak(run, 64, loss=1.5)
    assert state()[0] == "running"
    ray_says.found = job(JobStatus.RUNNING, started=time.time() + 60)
    assert state()[0] == "waiting"  # what was heard is of an earlier job
    ray_says.found = DataError("Ray is away")
    assert state() == ("running", "Ray is away")
    ray_says.found = None
    assert state()[0] == "lost"
    ray_says.found = job(JobStatus.FAILED)
    write_failure(store, "job-0", ConfigError("data.subset: too many"))
    assert state() == ("failed", "data.subset: too many")
    wish(store, spec.digest, running=False)
    ray_says.found = job(JobStatus.RUNNING)
    assert state()[0] == "stopping"
    ray_says.found = None
    assert state()[0] == "stopped"
    log.append(lease, parent=None, manifest="m", digest="d", images_seen=640, complete=True)
    assert state()[0] == "complete" and "not done yet" in state()[1]
    write_done(store, spec.digest)
    assert state() == ("complete", "")
    found = run_status(SITE, spec, CONFIG.run)
    assert (found.workers, found.epoch, found.committed, found.values) == (3, 0, 640, {"loss": 1.5})


@pytest.mark.parametrize("segments", [0, 1, 2, 3, 4, 5, 7, 8, 9, 40])
def test_the_newest_events_are_found_without_reading_all(store_url: str, segments: int) -> None:
    store = open_store(store_url)
    writer = EventWriter(store, 2)
    for images in range(segments):
        writer.write("metrics", images, values={})
        writer.flush()
    seen = [event["images_seen"] for event in newest_events(store, 2)]
    assert seen == sorted({0, *range(max(0, segments - 4), segments)} if segments else set())
