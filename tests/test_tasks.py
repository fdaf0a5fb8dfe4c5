"""Tasks on the cluster: a job with a fixed program and plain arguments, joined, followed and told of."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.job_submission import JobStatus

from orchestrator import ray_jobs, tasks
from orchestrator.daemons import ray_folder
from orchestrator.job_records import read_failure, write_failure
from orchestrator.site import Site
from orchestrator.tasks import TaskSpec, main, map_on_cluster
from pipelines.ingest import ingest
from tests.fake_ray import SITE, FakeRay
from tests.test_cluster import VITSCALE
from tests.test_ingest_options import encoded, smooth
from workers.errors import ConfigError, DataError, VitscaleError
from workers.storage import open_store


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.0)
    return fake


def run(site: Site, fake: FakeRay, act: Callable[[str], None], work: str = "s3://out") -> list[int]:
    """What the caller is told while the job does `act`, once for each look at it."""
    look, told = fake.get_job_info, list[int]()

    def get_job_info(job: str) -> Any:
        act(job)
        return look(job)

    fake.get_job_info = get_job_info  # type: ignore[method-assign]
    try:
        map_on_cluster(
            site, "pipelines.ingest.job", "examine", [[work, "x", 0], [work, "x", 1]], work, told.append
        )
    finally:
        fake.get_job_info = look  # type: ignore[method-assign]
    return told


def test_what_the_job_is_given_and_what_it_says(
    fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    site, store, looks = SITE.model_copy(update={"runs": store_url}), open_store(store_url), iter(range(9))

    def act(job: str) -> None:
        look = next(looks)
        store.write(f"jobs/{job}.progress", b"%d" % (100 * look))
        if look == 3:
            fake.jobs[job].status = JobStatus.SUCCEEDED

    assert run(site, fake, act) == [100, 100, 100]
    (job,) = fake.jobs.values()
    digest = job.entrypoint.split()[-2]
    name = f"{digest[:16]}-0"
    assert job.entrypoint == f"python -P -m pipelines.ingest.job {store_url} {digest} {name}"
    assert job.metadata == {"work": "s3://out"}
    written = store.read(f"jobs/{digest}.tasks.json")
    assert hashlib.sha256(written).hexdigest() == digest
    assert json.loads(written) == {
        "arguments": [["s3://out", "x", 0], ["s3://out", "x", 1]],
        "function": "examine",
        "work": "s3://out",
    }
    assert "canary" not in json.dumps(job.runtime_env) + written.decode()
    assert not any("KEY" in name or "TOKEN" in name for name in job.runtime_env["env_vars"])
    assert [info.key for info in store.list("jobs/") if info.key.endswith("progress")] == []


def test_another_job_on_the_same_work_is_stopped_first(fake: FakeRay, store_url: str) -> None:
    """Its command was killed, or is another one: the last one wins, and both write the same bytes."""
    site = SITE.model_copy(update={"runs": store_url})
    for job, work in (("a-0", "s3://out"), ("b-0", "s3://other")):
        fake.submit_job(submission_id=job, entrypoint="", runtime_env={}, metadata={"work": work})

    def act(job: str) -> None:
        fake.jobs[job].status = JobStatus.SUCCEEDED

    run(site, fake, act)
    assert [job.status for job in fake.jobs.values()] == ["STOPPED", "RUNNING", "SUCCEEDED"]


def test_how_a_job_can_end(fake: FakeRay, store_url: str) -> None:
    site, store = SITE.model_copy(update={"runs": store_url}), open_store(store_url)

    def fail(job: str) -> None:
        write_failure(store, job, DataError("cannot read x.jpg: No such file"))
        fake.jobs[job].status = JobStatus.FAILED

    with pytest.raises(DataError, match=r"cannot read x\.jpg"):
        run(site, fake, fail)

    def die(job: str) -> None:
        fake.jobs[job].status = JobStatus.FAILED
        fake.jobs[job].driver_exit_code = 1
        fake.log = "killed\n"

    with pytest.raises(
        VitscaleError, match=r"ended as FAILED \(exit code 1\); .* goes on from here.*\nkilled"
    ):
        run(site, fake, die)

    def interrupt(job: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(site, fake, interrupt)
    assert [job.status for job in fake.jobs.values()] == ["FAILED", "FAILED", "STOPPED"]


def test_only_functions_of_the_table_run(store_url: str) -> None:
    store, calls = open_store(store_url), list[int]()

    def start(data: bytes, digest: str | None = None) -> VitscaleError | None:
        digest = digest or hashlib.sha256(data).hexdigest()
        store.write(f"jobs/{digest}.tasks.json", data)
        assert main([store_url, digest, "job"], {"examine": lambda: calls.append(1) or 0}) == 1
        return read_failure(store, "job")

    spec = TaskSpec(function="os.system", arguments=(("true",),), work="s3://out")
    error = start(spec.to_bytes())
    assert type(error) is ConfigError
    assert "no function 'os.system'; known: examine" in str(error)
    error = start(spec.to_bytes(), "0" * 64)
    assert type(error) is DataError
    assert "tasks 000000000000 were changed after they were written" in str(error)
    error = start(b'{"function": "examine"}')
    assert type(error) is ConfigError
    assert "arguments: missing" in str(error)
    assert calls == []


def test_the_error_of_a_task_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {
        "ours": ray.exceptions.RayTaskError("examine", "Traceback ...", DataError("x is damaged")),
        "other": ray.exceptions.RayTaskError("examine", "Traceback ...", ZeroDivisionError("oops")),
        "lost": ray.exceptions.WorkerCrashedError(),
    }

    def get(reference: str) -> int:
        raise errors[reference]

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(DataError, match=r"^x is damaged$"):
        tasks._result("ours")
    with pytest.raises(VitscaleError, match="a task failed: ZeroDivisionError"):
        tasks._result("other")
    with pytest.raises(VitscaleError, match="lost its process 6 times"):
        tasks._result("lost")


def test_tasks_that_no_node_has_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "room", lambda compute: SimpleNamespace(total=0))
    spec = TaskSpec(function="predict", arguments=(), work="w", cpus=2, gpus=1)
    with pytest.raises(ConfigError, match=r"no node of the cluster has 2 CPU and 1 GPU"):
        tasks._check_room(spec)
    tasks._check_room(spec.model_copy(update={"autoscaling": True}))


@pytest.mark.services
@pytest.mark.timeout(300)
def test_an_ingest_on_the_cluster_survives_a_killed_worker(services: Site, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        data = encoded(smooth(1000, 800 + label), "JPEG")
        for number in range(800):
            # Bytes after the end of an image are no part of it, but of its digest.
            (root / name / f"{number:04d}.jpg").write_bytes(data + b"%d" % number)
    services.save(tmp_path / "site.yaml")
    command = [*VITSCALE, "ingest", str(root), "on-cluster", "--on-cluster", "--shard-size", "2M", "--json"]
    process = subprocess.Popen(
        [*command, "--site", str(tmp_path / "site.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        killed = kill_worker(services, process)
        out, error = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert killed
    report = json.loads(out)
    local = ingest(root, (tmp_path / "local").as_uri(), shard_bytes=2 << 20)
    assert report["train_fingerprint"] == local.train_fingerprint
    assert report["validation_fingerprint"] == local.validation_fingerprint
    assert report["num_shards"] == local.num_shards > 8


def kill_worker(services: Site, process: subprocess.Popen[str]) -> bool:
    """One that examines images, of this Ray alone."""
    folder = str(ray_folder(services.ray_token_file.parent))
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        for worker in psutil.process_iter(["name", "cmdline"]):
            if "ray::examine" in " ".join(worker.info["cmdline"] or []):
                parents = [" ".join(parent.cmdline()) for parent in worker.parents()]
                if any(folder in parent for parent in parents):
                    os.kill(worker.pid, signal.SIGKILL)
                    return True
        time.sleep(0.05)
    return False
