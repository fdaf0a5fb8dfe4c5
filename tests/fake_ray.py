"""A Jobs API of Ray in memory, and what is handed to it."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.job_submission import JobStatus

from orchestrator.job import JobSpec, run_url
from orchestrator.site import Site
from tests.test_config import VALUES
from workers.config import RunConfig, make_config
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
            submission_id=job,
            status=JobStatus.RUNNING,
            message="",
            driver_exit_code=None,
            start_time=None,
            **details,
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


SITE = Site(
    ray="http://127.0.0.1:1",
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


def end(fake: FakeRay, job: str, status: JobStatus) -> None:
    fake.jobs[job].status = status
