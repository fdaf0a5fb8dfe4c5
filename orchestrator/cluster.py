"""Submit jobs to Ray, follow and stop them, through its Jobs API.

Ray's word on a job is a hint: whether a run is complete is what its commit log says. A job's `submission_id`
is the digest of its specification and a number, so the same command finds the job that is still running.
"""

import logging
import shlex
import sys
import time
from collections.abc import Callable

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestrator.job import JobSpec, read_failure, run_url, write_spec
from orchestrator.site import Site
from workers.errors import DataError, VitscaleError
from workers.storage import open_store
from workers.training.commits import CommitLog

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


class Cluster:
    def __init__(self, site: Site) -> None:
        self._site = site
        try:
            self._client = JobSubmissionClient(site.ray)
        except AuthenticationError as error:
            raise DataError(
                f"Ray at {site.ray} refused the token; name its file in the site's ray_token_file"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise DataError(
                f"Ray at {site.ray} cannot be reached ({error}); is it up? `vitscale up`"
            ) from error

    def start(self, spec: JobSpec) -> str:
        """The running job of this specification if there is one, else a new one; returns its id."""
        attempts = self._attempts(spec)
        if attempts and attempts[-1].status not in ENDED:
            return str(attempts[-1].submission_id)
        write_spec(spec)
        job = f"{spec.digest[:16]}-{len(attempts)}"
        entrypoint = [sys.executable, "-P", "-m", "orchestrator.driver", spec.runs, spec.digest, job]
        self._client.submit_job(
            entrypoint=shlex.join(entrypoint),
            submission_id=job,
            runtime_env={"env_vars": {"PYTHONSAFEPATH": "1"}},
            metadata={"runs": ",".join(config.run for config in spec.configs)[:1000]},
        )
        return job

    def follow(self, spec: JobSpec, job: str, on_tick: Callable[[], None]) -> None:
        """Until all runs of the job are complete; the job's own error if it fails.

        `on_tick` is called every half second.
        """
        store = open_store(spec.runs)
        while (status := self._client.get_job_status(job)) not in ENDED:
            on_tick()
            time.sleep(POLL_SECONDS)
        on_tick()
        if status == JobStatus.SUCCEEDED and is_complete(spec):
            return
        raise read_failure(store, job) or VitscaleError(
            f"job {job} ended as {status.value}; the same command goes on from the last commit. "
            f"Its log ends:\n{self.log_tail(job)}"
        )

    def stop(self, job: str) -> None:
        self._client.stop_job(job)
        while self._client.get_job_status(job) not in ENDED:
            time.sleep(POLL_SECONDS)

    def log_tail(self, job: str, lines: int = 15) -> str:
        return "\n".join(self._client.get_job_logs(job).splitlines()[-lines:])

    def _attempts(self, spec: JobSpec) -> list[JobDetails]:
        prefix = f"{spec.digest[:16]}-"
        jobs = [j for j in self._client.list_jobs() if (j.submission_id or "").startswith(prefix)]
        return sorted(jobs, key=lambda j: int((j.submission_id or "").removeprefix(prefix)))


def is_complete(spec: JobSpec) -> bool:
    heads = [CommitLog(open_store(run_url(spec.runs, config))).head() for config in spec.configs]
    return all(head is not None and head.complete for head in heads)
