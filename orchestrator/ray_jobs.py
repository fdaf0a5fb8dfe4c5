"""Ray's Jobs API: submit, look at, stop; its many errors told as ours."""

import contextlib
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray import job_submission
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus

from orchestrator.exposure import refuse_exposed
from orchestrator.site import Site
from workers.errors import DataError, root_cause
from workers.storage import Unavailable

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0
"""How long Ray's head may be too busy to answer before following a job ends."""
ANSWER_SECONDS = 30.0
"""How long it may say nothing to a question; Ray's client would wait for ever."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
LOG_LINES = 15
STOP_WAIT_SECONDS = 60
"""What Ray leaves a job that it stops, before it kills it: for a commit, and for telling MLflow."""
JOB_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",
    # Ray asks its workers every 2 s whether they have ended or died; a killed one costs less so.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
    # MLflow's client would wait 120 s for a server that hangs, and at the end of a run somebody waits for it.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Of every process of a job, with the site's settings. Ray shows it to whoever asks: nothing secret."""


class JobSubmissionClient(job_submission.JobSubmissionClient):  # type: ignore[misc] # Ray gives it no type
    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        """What changes something is not given up: it may have been done."""
        timeout = ANSWER_SECONDS if method == "GET" else None
        return super()._do_request(method, endpoint, **{"timeout": timeout} | arguments)


class RayJobs:
    def __init__(self, site: Site) -> None:
        self._site = site
        with self.errors():
            self._client = JobSubmissionClient(site.ray)

    def all(self) -> dict[str, JobDetails]:
        with self.errors():
            return {job.submission_id: job for job in self._client.list_jobs() if job.submission_id}

    def submit(
        self,
        module: str,
        arguments: Sequence[str],
        job: str,
        metadata: Mapping[str, str],
        code: Mapping[str, Any],
    ) -> None:
        """Start `module` on the cluster, unless a job of that name is there already.

        `code`: what its runtime environment has for the wheel that it brings. ConfigError where others could
        start jobs, too."""
        refuse_exposed(self._site)
        # `python` and not this process's own: the cluster's nodes have theirs elsewhere.
        entrypoint = ["python", "-P", "-m", module, *arguments]
        environment = self._site.settings() | JOB_ENVIRONMENT
        with self.errors():
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(entrypoint),
                    submission_id=job,
                    runtime_env={**code, "env_vars": environment | code.get("env_vars", {})},
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                # The same command, given twice, submitted it a moment ago.
                if "already exists" not in str(error):
                    raise

    def details(self, job: str) -> JobDetails:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self.errors():
                    return self._client.get_job_info(job)
            except DataError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_SECONDS)

    def stop(self, job: str) -> None:
        """And wait for its end."""
        with self.errors():
            self._client.stop_job(job)
            while self._client.get_job_status(job) not in ENDED:
                time.sleep(POLL_SECONDS)

    def log(self, job: str) -> str:
        """Of the driver, without colours."""
        with self.errors():
            return plain(self._client.get_job_logs(job))

    def log_tail(self, job: str, details: JobDetails) -> str:
        """Of the driver; if it never came to write one, what Ray has to say."""
        with contextlib.suppress(DataError):
            if lines := self.log(job).splitlines():
                return "\n".join(lines[-LOG_LINES:])
        return details.message or ""

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise DataError(
                f"Ray at {self._site.ray} refused the token; name its file in the site's ray_token_file"
            ) from error
        except (OSError, RuntimeError) as error:
            # After a traceback of the server's, the last line says what happened.
            reason = str(root_cause(error)).strip().rpartition("\n")[2]
            refused = isinstance(error, RuntimeError) and "status code 4" in str(error)
            raise (DataError if refused else Unavailable)(
                f"Ray at {self._site.ray} cannot be reached or refuses ({reason}); is it up? `vitscale up`"
            ) from error


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def newest_job(prefix: str, jobs: Mapping[str, JobDetails]) -> tuple[str, JobDetails] | None:
    """The running job of this name, else the last that Ray knows of. Jobs of a name are numbered."""
    ours = [job for job in jobs if re.fullmatch(rf"{re.escape(prefix)}-\d+", job)]
    if not ours:
        return None
    job = max(ours, key=lambda job: (jobs[job].status not in ENDED, int(job.rpartition("-")[2])))
    return job, jobs[job]


def next_job(prefix: str, jobs: Mapping[str, JobDetails]) -> tuple[str, bool]:
    """The running job of this name, or the name of a new one; and whether it runs."""
    newest = newest_job(prefix, jobs)
    if newest is not None and newest[1].status not in ENDED:
        return newest[0], True
    number = int(newest[0].rpartition("-")[2]) + 1 if newest is not None else 0
    return f"{prefix}-{number}", False
