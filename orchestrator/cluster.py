"""Submit training to Ray, look at it and stop it.

Ray's word on a job is a hint: whether a run is complete is what its commit log says. A job's `submission_id`
is the digest of its specification and a number, so the same command finds the job that is still running.
"""

from collections.abc import Mapping

from ray.job_submission import JobDetails

from orchestrator.job import JobSpec, write_spec
from orchestrator.job_records import clear_reports
from orchestrator.kept_log import forget_old_logs
from orchestrator.ray_jobs import ENDED, RayJobs, newest_job, next_job
from orchestrator.site import Site
from orchestrator.wheel import shipped
from workers.errors import VitscaleError
from workers.storage import open_store

RUNS = "runs"
"""Key of a job's metadata: the runs that it trains, with commas between."""


class Cluster:
    def __init__(self, site: Site) -> None:
        self._jobs = RayJobs(site)

    def refuse_second_writer(self, spec: JobSpec) -> None:
        """VitscaleError if a running job of another specification trains one of these runs.

        Two such would take the run's lease from each other in turns, and neither would commit."""
        _refuse_second_writer(spec, self._jobs.all())

    def start(self, spec: JobSpec) -> str:
        """The running job of this specification if there is one, else a new one; returns its id."""
        jobs = self._jobs.all()
        job, runs_already = next_job(spec.digest[:16], jobs)
        if not runs_already:
            _refuse_second_writer(spec, jobs)
            write_spec(spec)
            clear_reports(open_store(spec.runs), job)
            forget_old_logs(open_store(spec.runs), spec.digest)
            names = ",".join(config.run for config in spec.configs)
            arguments = [spec.runs, spec.digest, job]
            with shipped(open_store(spec.runs), spec.wheel) as code:
                self._jobs.submit("orchestrator.driver", arguments, job, {RUNS: names}, code)
        return job

    def newest(self, spec: JobSpec) -> tuple[str, JobDetails] | None:
        """The running job of this specification, else the last that Ray knows of."""
        return newest_job(spec.digest[:16], self._jobs.all())

    def all(self) -> Mapping[str, JobDetails]:
        """All jobs that Ray knows of, by its names."""
        return self._jobs.all()

    def log_tail(self, job: str, details: JobDetails) -> str:
        return self._jobs.log_tail(job, details)

    def log(self, job: str) -> str:
        """All that the job's driver has written."""
        return self._jobs.log(job)

    def stop(self, spec: JobSpec) -> None:
        """End the running job of this specification, if there is one, and wait for that.

        Its workers commit before; who wants that it stays stopped says so first (`job.wish`)."""
        found = self.newest(spec)
        if found is not None and found[1].status not in ENDED:
            self._jobs.stop(found[0])


def _refuse_second_writer(spec: JobSpec, jobs: Mapping[str, JobDetails]) -> None:
    ours = {config.run for config in spec.configs}
    for job, details in jobs.items():
        if details.status in ENDED or job.startswith(f"{spec.digest[:16]}-"):
            continue
        both = sorted(ours & set((details.metadata or {}).get(RUNS, "").split(",")))
        if both:
            raise VitscaleError(
                f"{both[0]} is being trained by job {job}, which another command started (other workers, "
                "another name to register as, another wheel); wait for its end, or interrupt that command"
            )
