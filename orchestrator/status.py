"""What is true of a run, from its own records; Ray's word is shown beside it."""

import time
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, run_url
from orchestrator.job_records import is_done, is_wished, read_failure, read_note, why_stopped
from orchestrator.ray_jobs import ENDED
from orchestrator.site import Site
from workers.errors import DataError
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.metrics import newest_events

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
class _Job:
    name: str
    ray: str
    lives: bool | None
    """None if Ray does not answer."""
    since: float = 0.0
    """When it began, in seconds since 1970."""


def run_status(site: Site, spec: JobSpec, run: str) -> RunStatus:
    """Of one of a specification's runs. A cluster that cannot be reached is no error."""
    config = next(config for config in spec.configs if config.run == run)
    store = open_store(run_url(spec.runs, config))
    log = CommitLog(store)
    head, epoch = log.head(), log.newest_epoch()
    events = newest_events(store, epoch) if epoch is not None else []
    heard: float | None = events[-1]["time"] if events else None
    job = _find_job(site, spec)
    if head is not None and head.complete:
        state, detail = _state_of_complete(spec)
    elif job.lives is False:
        state, detail = _state_of_ended(spec, job, run)
    else:
        state, detail = _state_of_living(spec, job, heard)
    return RunStatus(
        run=run,
        state=state,
        detail=detail,
        images_seen=max([head.images_seen if head else 0, *(event["images_seen"] for event in events)]),
        committed=head.images_seen if head else 0,
        total=config.num_steps * config.train.global_batch_size,
        epoch=epoch,
        workers=_newest(events, "world_size"),
        heard=heard,
        values=_newest_values(events),
        job=job.name,
        ray=job.ray,
    )


def _find_job(site: Site, spec: JobSpec) -> _Job:
    try:
        found = Cluster(site).newest(spec)
    except DataError as error:
        return _Job("", str(error), None)
    if found is None:
        return _Job("", "no job", False)
    name, details = found
    return _Job(name, details.status.value, details.status not in ENDED, (details.start_time or 0) / 1000)


def _state_of_complete(spec: JobSpec) -> tuple[State, str]:
    if is_done(open_store(spec.runs), spec.digest):
        return "complete", ""
    return "complete", "its job is not done yet: other runs, or what is told to MLflow and the registry"


def _state_of_living(spec: JobSpec, job: _Job, heard: float | None) -> tuple[State, str]:
    """Also of one of which Ray says nothing: then what its workers say counts."""
    speaking: State = "running" if heard and time.time() - heard < QUIET_SECONDS else "silent"
    if job.lives is None:
        return speaking, job.ray
    store = open_store(spec.runs)
    if not is_wished(store, spec.digest):
        return "stopping", why_stopped(store, spec.digest, "it commits, then ends")
    # What was heard before it began is of an earlier job.
    return "waiting" if heard is None or heard < job.since else speaking, read_note(store, job.name)


def _state_of_ended(spec: JobSpec, job: _Job, run: str) -> tuple[State, str]:
    store = open_store(spec.runs)
    if failure := read_failure(store, job.name) if job.name else None:
        return "failed", str(failure)
    if not is_wished(store, spec.digest):
        return "stopped", why_stopped(store, spec.digest, "the same command goes on from its last commit")
    return "lost", f"`vitscale supervise {run}`, or the same command, goes on from its last commit"


def _newest(events: list[dict[str, Any]], name: str) -> Any:
    return next((event[name] for event in reversed(events) if name in event), None)


def _newest_values(events: list[dict[str, Any]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for event in events:
        values |= event.get("values", {})
    return values
