"""Submit training to Ray, follow and stop it.

Ray's word on a job is a hint: whether a run is complete is what its commit log says. A job's `submission_id`
is the digest of its specification and a number, so the same command finds the job that is still running.
"""

import re
import time
from collections.abc import Callable, Mapping

from ray.job_submission import JobDetails, JobStatus

from orchestrator.job import JobSpec, clear_reports, is_complete, read_failure, write_spec
from orchestrator.ray_jobs import ENDED, POLL_SECONDS, RayJobs, next_job
from orchestrator.site import Site
from workers.errors import VitscaleError
from workers.storage import open_store

RUNS = "runs"
"""Key of a job's metadata: the runs that it trains, with commas between."""


class Cluster:
    def __init__(self, site: Site) -> None:
        self._jobs = RayJobs(site)

    def start(self, spec: JobSpec) -> str:
        """The running job of this specification if there is one, else a new one; returns its id."""
        jobs = self._jobs.all()
        job, runs_already = next_job(spec.digest[:16], jobs)
        if not runs_already:
            _refuse_second_writer(
                spec, {j: details for j, details in jobs.items() if details.status not in ENDED}
            )
            write_spec(spec)
            clear_reports(open_store(spec.runs), job)
            names = ",".join(config.run for config in spec.configs)
            self._jobs.submit("orchestrator.driver", [spec.runs, spec.digest, job], job, {RUNS: names})
        return job

    def follow(self, spec: JobSpec, job: str, on_tick: Callable[[], None]) -> None:
        """Until all runs of the job are complete; the job's own error if it fails.

        `on_tick` is called every half second.
        """
        while (details := self._jobs.details(job)).status not in ENDED:
            on_tick()
            time.sleep(POLL_SECONDS)
        on_tick()
        if details.status == JobStatus.SUCCEEDED and all(is_complete(spec.runs, c) for c in spec.configs):
            return
        raise read_failure(open_store(spec.runs), job) or VitscaleError(
            f"job {job} ended as {details.status.value} (exit code {details.driver_exit_code}); the same "
            f"command goes on from the last commit. Its log ends:\n{self._jobs.log_tail(job, details)}"
        )

    def stop(self, spec: JobSpec) -> None:
        """End the running job of this specification, if there is one, and wait for that."""
        for job, details in self._jobs.all().items():
            if re.fullmatch(rf"{spec.digest[:16]}-\d+", job) and details.status not in ENDED:
                self._jobs.stop(job)


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
