"""Jobs on Ray: found again, followed through outages, stopped; by a fake of its Jobs API and the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from orchestrator import cluster as cluster_module
from orchestrator import ray_jobs
from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, run_url, write_failure
from orchestrator.site import Site
from tests.test_config import VALUES, changed
from workers.config import RunConfig, make_config
from workers.errors import ConfigError, DataError, VitscaleError
from workers.storage import open_store
from workers.training.commits import CommitLog

CONFIG = make_config(VALUES)


@dataclass
class FakeRay:
    """The Jobs API: jobs run until `status` says otherwise."""

    jobs: dict[str, Any] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    """What the next calls raise."""
    log: str = ""

    def _up(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def list_jobs(self) -> list[Any]:
        self._up()
        return [SimpleNamespace(submission_id=None, status=JobStatus.RUNNING), *self.jobs.values()]

    def submit_job(self, **details: Any) -> str:
        self._up()
        job = details.pop("submission_id")
        if job in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: Job {job} already exists.")
        self.jobs[job] = SimpleNamespace(
            submission_id=job, status=JobStatus.RUNNING, message="", driver_exit_code=None, **details
        )
        return job

    def get_job_info(self, job: str) -> Any:
        self._up()
        return self.jobs[job]

    def get_job_status(self, job: str) -> JobStatus:
        return self.jobs[job].status

    def get_job_logs(self, job: str) -> str:
        self._up()
        return self.log

    def stop_job(self, job: str) -> None:
        self.jobs[job].status = JobStatus.STOPPED


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(cluster_module, "POLL_SECONDS", 0.0)
    return fake


@pytest.fixture
def cluster(fake: FakeRay) -> Cluster:
    return Cluster(SITE)


SITE = Site(
    ray="http://head:8265",
    mlflow="http://mlflow",
    data="s3://data",
    runs="s3://runs",
    s3_endpoint="http://s3:9000",
    aws_credentials_file=Path("/home/me/.aws/credentials"),
    ray_token_file=Path("/home/me/.ray/auth_token"),
)


def make_spec(runs: str, config: RunConfig = CONFIG, **changes: Any) -> JobSpec:
    return JobSpec(configs=(config,), runs=runs, mlflow="http://mlflow", experiment="vitscale", **changes)


def complete(runs: str, config: RunConfig = CONFIG) -> None:
    log = CommitLog(open_store(run_url(runs, config)))
    log.append(log.take_lease(), parent=None, manifest="m", digest="d", images_seen=64, complete=True)


def test_the_same_command_joins_its_job_and_starts_a_new_one_when_that_has_ended(
    cluster: Cluster, fake: FakeRay, store_url: str
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    assert cluster.start(spec) == job == f"{spec.digest[:16]}-0"
    for status in (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED):
        fake.jobs[job].status = status
        job = cluster.start(spec)
        assert cluster.start(spec) == job
    assert job == f"{spec.digest[:16]}-3"
    del fake.jobs[f"{spec.digest[:16]}-0"]  # Ray keeps only so many
    fake.jobs[job].status = JobStatus.FAILED
    assert cluster.start(spec) == f"{spec.digest[:16]}-4"


def test_the_same_command_given_twice_at_once_is_one_job(
    cluster: Cluster, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    monkeypatch.setattr(fake, "list_jobs", list)  # as the other saw it a moment ago
    assert cluster.start(spec) == job
    assert list(fake.jobs) == [job]


@pytest.mark.parametrize(
    "change", [{"register_as": "other"}, {"config": make_config(changed("compute.workers", 4))}]
)
def test_a_run_is_trained_by_one_job(
    cluster: Cluster, fake: FakeRay, store_url: str, change: dict[str, Any]
) -> None:
    job = cluster.start(make_spec(store_url))
    other = make_spec(store_url, **change)
    with pytest.raises(VitscaleError, match=rf"{CONFIG.run} is being trained by job {job}, .* wait"):
        cluster.start(other)
    cluster.start(make_spec(store_url, make_config(changed("seed", 2))))
    fake.jobs[job].status = JobStatus.STOPPED
    cluster.start(other)


def test_nothing_that_a_person_typed_reaches_the_shell_and_no_secret_the_job(
    cluster: Cluster, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    spec = make_spec(store_url, tags={"note": "$(touch x); `y`"})
    job = fake.jobs[cluster.start(spec)]
    assert job.entrypoint == (
        f"python -P -m orchestrator.driver {store_url} {spec.digest} {job.submission_id}"
    )
    environment = job.runtime_env["env_vars"]
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["AWS_ENDPOINT_URL_S3"] == "http://s3:9000"
    assert not any("KEY" in name or "TOKEN" in name or "FILE" in name for name in environment)
    assert "canary" not in json.dumps(job.runtime_env) + json.dumps(job.metadata)


def test_following_ends_when_the_runs_are_complete(cluster: Cluster, fake: FakeRay, store_url: str) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    ticks = iter(range(5))

    def on_tick() -> None:
        if next(ticks) == 3:
            complete(store_url)
            fake.jobs[job].status = JobStatus.SUCCEEDED

    cluster.follow(spec, job, on_tick)
    assert next(ticks, None) is None


def test_a_head_that_is_busy_for_a_moment_ends_nothing(
    cluster: Cluster, fake: FakeRay, store_url: str
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    complete(store_url)
    fake.jobs[job].status = JobStatus.SUCCEEDED
    fake.failures = [ConnectionError("reset"), RuntimeError("Request failed with status code 500: x")]
    cluster.follow(spec, job, lambda: None)
    assert fake.failures == []


def test_a_head_that_is_gone_is_told(
    cluster: Cluster, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "PATIENCE_SECONDS", 0.0)
    spec = make_spec(store_url)
    job = cluster.start(spec)
    fake.failures = [ConnectionError("refused")] * 100
    with pytest.raises(DataError, match=r"Ray at http://head:8265 cannot be reached or refuses \(refused\)"):
        cluster.follow(spec, job, lambda: None)
    with pytest.raises(DataError, match="refused"):
        cluster.start(spec)
    fake.failures = [AuthenticationError("401")]
    with pytest.raises(DataError, match="refused the token; name its file in the site's ray_token_file"):
        cluster.start(spec)


def test_a_job_s_own_error_is_raised_again(cluster: Cluster, fake: FakeRay, store_url: str) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    fake.jobs[job].status = JobStatus.FAILED
    write_failure(open_store(store_url), job, ConfigError("data.subset: too many"))
    with pytest.raises(ConfigError, match=r"^data\.subset: too many$"):
        cluster.follow(spec, job, lambda: None)


def test_a_driver_that_died_leaves_the_end_of_its_log(
    cluster: Cluster, fake: FakeRay, store_url: str
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    fake.jobs[job].status = JobStatus.FAILED
    fake.jobs[job].driver_exit_code = -9
    fake.jobs[job].message = "the head had no node for it"
    fake.log = "".join(f"\x1b[36m(worker)\x1b[0m line {number}\n" for number in range(100))
    with pytest.raises(VitscaleError) as caught:
        cluster.follow(spec, job, lambda: None)
    first, *log = str(caught.value).splitlines()
    assert first == (
        f"job {job} ended as FAILED (exit code -9); the same command goes on from the last commit. "
        "Its log ends:"
    )
    assert log == [f"(worker) line {number}" for number in range(85, 100)]
    fake.log = ""
    with pytest.raises(VitscaleError, match="the head had no node for it"):
        cluster.follow(spec, job, lambda: None)


def test_a_job_of_a_head_that_forgot_its_jobs_is_not_told_the_error_of_an_earlier_one(
    cluster: Cluster, fake: FakeRay, store_url: str
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    write_failure(open_store(store_url), job, DataError("MLflow is down"))
    fake.jobs.clear()
    assert cluster.start(spec) == job
    fake.jobs[job].status = JobStatus.FAILED
    with pytest.raises(VitscaleError, match="ended as FAILED"):
        cluster.follow(spec, job, lambda: None)


def test_stopping_ends_this_job_and_no_other(cluster: Cluster, fake: FakeRay, store_url: str) -> None:
    spec, other = make_spec(store_url), make_spec(store_url, make_config(changed("seed", 2)))
    cluster.stop(spec)
    jobs = [cluster.start(spec), cluster.start(other)]
    cluster.stop(spec)
    assert [fake.jobs[job].status for job in jobs] == [JobStatus.STOPPED, JobStatus.RUNNING]


VITSCALE = [sys.executable, "-m", "pipelines.cli"]


@pytest.fixture(scope="module")
def train(services: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that trains on 400 digits, on real services of four CPUs."""
    site = tmp_path_factory.mktemp("site") / "site.yaml"
    services.save(site)
    data = ["--data", "cluster-digits", "--site", str(site)]
    ingest = [*VITSCALE, "ingest", "digits", "cluster-digits", "--limit", "400", "--site", str(site)]
    subprocess.run(ingest, check=True, capture_output=True, timeout=100)
    yield [*VITSCALE, "train", "vit-digits", *data, "--set", "train.checkpoint_every_images=1000"]


@pytest.mark.services
def test_more_workers_than_the_cluster_holds_are_one_clear_error(train: list[str]) -> None:
    done = subprocess.run([*train, "--set", "compute.workers=8"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("error: compute.workers: no room for 8 workers of 1 CPU each; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.services
@pytest.mark.timeout(300)
def test_a_command_that_is_ended_ends_its_job_and_the_next_goes_on(services: Site, train: list[str]) -> None:
    command = [*train, "--set", "train.images=8000", "--set", "seed=77", "--as", "ended", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = wait_for_commit(services)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert error.splitlines()[-2:] == [
        "  stopping train vit-digits; the same command goes on from its last commit",
        "interrupted; the same command again goes on from here",
    ]
    head = CommitLog(open_store(run.as_uri())).head()
    assert head is not None and not head.complete
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == run.name
    new = CommitLog(open_store(run.as_uri())).head()
    assert new is not None and new.complete
    lineage = [commit.seq for commit in CommitLog(open_store(run.as_uri())).lineage_from(new.seq)]
    assert head.seq in lineage


def wait_for_commit(services: Site, seconds: float = 100) -> Path:
    """The run under way, once it has committed something."""
    runs = Path(services.runs.removeprefix("file://")) / "runs"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for run in runs.glob("vit-digits-*"):
            head = CommitLog(open_store(run.as_uri())).head()
            if head is not None and not head.complete:
                return run
        time.sleep(0.2)
    raise AssertionError(f"no commit after {seconds} s; {os.getloadavg()}")
