"""What is true of a run, from its own records; Ray's word is shown beside it."""

import time
from dataclasses import dataclass
from typing import Literal

from ray.job_submission import JobDetails

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec
from orchestrator.job_records import is_done, is_wished, read_failure, read_note, why_stopped
from orchestrator.ray_jobs import ENDED
from orchestrator.run_records import RunRecords
from orchestrator.site import Site
from workers.errors import DataError
from workers.storage import Store, open_store

QUIET_SECONDS = 120.0
"""Without a word from its workers a run whose job lives is not called running."""
State = Literal["complete", "running", "silent", "waiting", "stopping", "stopped", "failed", "lost"]


@dataclass(frozen=True)
class RunStatus:
    run: str
    state: State
    """complete; running: its workers were heard of lately; silent: not lately, though its job lives; waiting:
    its job lives and has not begun; stopping, stopped: its user wishes so; failed: of itself; lost: its job
    is gone though it is wished."""
    detail: str
    """Why, or what is waited for."""
    images_seen: int
    """By the newest point of its workers."""
    committed: int
    """Images, by the newest commit that counts."""
    committed_at: float | None
    """When, in seconds since 1970, by the store's clock."""
    total: int
    epoch: int | None
    """Of the newest lease: starts of a worker group, less one."""
    workers: int | None
    heard: float | None
    """When, in seconds since 1970."""
    values: dict[str, float]
    """The newest metrics."""
    job: str
    ray: str
    """What Ray says of the job; a hint."""


@dataclass(frozen=True)
class RayJob:
    """Ray's word on a specification's job."""

    name: str
    ray: str
    lives: bool | None
    """None if Ray does not answer."""
    since: float = 0.0
    """When it began, in seconds since 1970."""


def run_status(site: Site, spec: JobSpec, run: str) -> RunStatus:
    """Of one of a specification's runs. A cluster that cannot be reached is no error."""
    config = next(config for config in spec.configs if config.run == run)
    records = RunRecords(spec, config)
    records.look()
    return describe(records, _ask_ray(site, spec), open_store(spec.runs))


def describe(records: RunRecords, job: RayJob, store: Store) -> RunStatus:
    """What follows from a run's records, what Ray says of its job, and what is noted of that in the store of
    runs."""
    spec, config, head = records.spec, records.config, records.head
    if head is not None and head.complete:
        state, detail = _state_of_complete(store, spec)
    elif job.lives is False:
        state, detail = _state_of_ended(store, spec, job, config.run)
    else:
        state, detail = _state_of_living(store, spec, job, records.heard)
    return RunStatus(
        run=config.run,
        state=state,
        detail=detail,
        images_seen=max(head.images_seen if head else 0, records.images_seen),
        committed=head.images_seen if head else 0,
        committed_at=records.committed_at,
        total=config.num_steps * config.train.global_batch_size,
        epoch=records.lease.epoch if records.lease else None,
        workers=records.workers,
        heard=records.heard,
        values=dict(records.values),
        job=job.name,
        ray=job.ray,
    )


def _ask_ray(site: Site, spec: JobSpec) -> RayJob:
    try:
        return ray_job(Cluster(site).newest(spec))
    except DataError as error:
        return RayJob("", str(error), None)


def ray_job(found: tuple[str, JobDetails] | None) -> RayJob:
    """Of a job that Ray knows, or None if it knows none."""
    if found is None:
        return RayJob("", "no job", False)
    name, details = found
    return RayJob(name, details.status.value, details.status not in ENDED, (details.start_time or 0) / 1000)


def _state_of_complete(store: Store, spec: JobSpec) -> tuple[State, str]:
    if is_done(store, spec.digest):
        return "complete", ""
    return "complete", "its job is not done yet: other runs, or what is told to MLflow and the registry"


def _state_of_living(store: Store, spec: JobSpec, job: RayJob, heard: float | None) -> tuple[State, str]:
    """Also of one of which Ray says nothing: then what its workers say counts."""
    speaking: State = "running" if heard and time.time() - heard < QUIET_SECONDS else "silent"
    if job.lives is None:
        return speaking, job.ray
    if not is_wished(store, spec.digest):
        return "stopping", why_stopped(store, spec.digest, "it commits, then ends")
    # What was heard before it began is of an earlier job.
    return "waiting" if heard is None or heard < job.since else speaking, read_note(store, job.name)


def _state_of_ended(store: Store, spec: JobSpec, job: RayJob, run: str) -> tuple[State, str]:
    if failure := read_failure(store, job.name) if job.name else None:
        return "failed", str(failure)
    if not is_wished(store, spec.digest):
        return "stopped", why_stopped(store, spec.digest, "the same command goes on from its last commit")
    return "lost", f"`vitscale supervise {run}`, or the same command, goes on from its last commit"
