"""Submit jobs to Ray, follow and stop them, through its Jobs API.

Ray's word on a job is a hint: whether a run is complete is what its commit log says. A job's `submission_id`
is the digest of its specification and a number, so the same command finds the job that is still running.
"""

import contextlib
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestrator.job import JobSpec, clear_reports, is_complete, read_failure, write_spec
from orchestrator.site import Site
from workers.errors import DataError, VitscaleError, root_cause
from workers.storage import open_store

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0
"""How long Ray's head may be too busy to answer before following a job ends."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
LOG_LINES = 15
RUNS = "runs"
"""Key of a job's metadata: the runs that it trains, with commas between."""
JOB_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",
    # Ray asks its workers every 2 s whether they have ended or died; a killed one costs less so.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A job that is stopped says so in MLflow; Ray's 3 s are too few for that.
    "RAY_JOB_STOP_WAIT_TIME_S": "20",
    # MLflow's client would wait 120 s for a server that hangs, and at the end of a run somebody waits for it.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Of every process of a job, with the site's settings. Ray shows it to whoever asks: nothing secret."""


class Cluster:
    def __init__(self, site: Site) -> None:
        self._site = site
        with self._errors():
            self._client = JobSubmissionClient(site.ray)

    def start(self, spec: JobSpec) -> str:
        """The running job of this specification if there is one, else a new one; returns its id."""
        with self._errors():
            jobs = self._jobs()
            running = {job: details for job, details in jobs.items() if details.status not in ENDED}
            earlier = [job for job in jobs if _is_of(job, spec)]
            for job in earlier:
                if job in running:
                    return job
            _refuse_second_writer(spec, running)
            number = max((int(job.rpartition("-")[2]) for job in earlier), default=-1) + 1
            return self._submit(spec, f"{spec.digest[:16]}-{number}")

    def follow(self, spec: JobSpec, job: str, on_tick: Callable[[], None]) -> None:
        """Until all runs of the job are complete; the job's own error if it fails.

        `on_tick` is called every half second.
        """
        while (details := self._details(job)).status not in ENDED:
            on_tick()
            time.sleep(POLL_SECONDS)
        on_tick()
        if details.status == JobStatus.SUCCEEDED and all(is_complete(spec.runs, c) for c in spec.configs):
            return
        raise read_failure(open_store(spec.runs), job) or VitscaleError(
            f"job {job} ended as {details.status.value} (exit code {details.driver_exit_code}); the same "
            f"command goes on from the last commit. Its log ends:\n{self._log_tail(job, details)}"
        )

    def stop(self, spec: JobSpec) -> None:
        """End the running job of this specification, if there is one, and wait for that."""
        with self._errors():
            for job, details in self._jobs().items():
                if _is_of(job, spec) and details.status not in ENDED:
                    self._client.stop_job(job)
                    while self._client.get_job_status(job) not in ENDED:
                        time.sleep(POLL_SECONDS)

    def _jobs(self) -> dict[str, JobDetails]:
        return {job.submission_id: job for job in self._client.list_jobs() if job.submission_id}

    def _submit(self, spec: JobSpec, job: str) -> str:
        write_spec(spec)
        clear_reports(open_store(spec.runs), job)
        # `python` and not this process's own: the cluster's nodes have theirs elsewhere.
        entrypoint = ["python", "-P", "-m", "orchestrator.driver", spec.runs, spec.digest, job]
        try:
            self._client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=job,
                runtime_env={"env_vars": self._site.settings() | JOB_ENVIRONMENT},
                metadata={RUNS: ",".join(config.run for config in spec.configs)},
            )
        except RuntimeError as error:
            # The same command, given twice, submitted it a moment ago.
            if "already exists" not in str(error):
                raise
        return job

    def _details(self, job: str) -> JobDetails:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self._errors():
                    return self._client.get_job_info(job)
            except DataError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_SECONDS)

    def _log_tail(self, job: str, details: JobDetails) -> str:
        """Of the driver; if it never came to write one, what Ray has to say."""
        with contextlib.suppress(DataError), self._errors():
            lines = re.sub(r"\x1b\[[\d;]*m", "", self._client.get_job_logs(job)).splitlines()
            if lines:
                return "\n".join(lines[-LOG_LINES:])
        return details.message or ""

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise DataError(
                f"Ray at {self._site.ray} refused the token; name its file in the site's ray_token_file"
            ) from error
        except (OSError, RuntimeError) as error:
            # After a traceback of the server's, the last line says what happened.
            reason = str(root_cause(error)).strip().rpartition("\n")[2]
            raise DataError(
                f"Ray at {self._site.ray} cannot be reached or refuses ({reason}); is it up? `vitscale up`"
            ) from error


def _is_of(job: str, spec: JobSpec) -> bool:
    return re.fullmatch(rf"{spec.digest[:16]}-\d+", job) is not None


def _refuse_second_writer(spec: JobSpec, running: Mapping[str, JobDetails]) -> None:
    """Two jobs that train one run would take its lease from each other in turns, and neither would commit."""
    ours = {config.run for config in spec.configs}
    for job, details in running.items():
        both = sorted(ours & set((details.metadata or {}).get(RUNS, "").split(",")))
        if both:
            raise VitscaleError(
                f"{both[0]} is being trained by job {job}, which another command started (other workers, or "
                "another name to register as); wait for its end, or interrupt that command"
            )
