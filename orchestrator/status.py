"""What is true of a run, from its own records; Ray's word is shown beside it."""

import time
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, is_done, is_wished, read_failure, read_note, run_url
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


def run_status(site: Site, spec: JobSpec, run: str) -> RunStatus:
    """Of one of a specification's runs. A cluster that cannot be reached is no error."""
    config = next(config for config in spec.configs if config.run == run)
    runs, store = open_store(spec.runs), open_store(run_url(spec.runs, config))
    log = CommitLog(store)
    head, epoch = log.head(), log.newest_epoch()
    events = newest_events(store, epoch) if epoch is not None else []
    job, ray_says, lives, since = _job(site, spec)
    failure = read_failure(runs, job) if job and not lives else None
    note = read_note(runs, job) if job else ""
    heard: float | None = events[-1]["time"] if events else None
    speaking: State = "running" if heard and time.time() - heard < QUIET_SECONDS else "silent"
    wished = is_wished(runs, spec.digest)
    state: State
    detail = ""
    if head is not None and head.complete:
        state = "complete"
        if not is_done(runs, spec.digest):
            detail = "its job is not done yet: other runs, or what is told to MLflow and the registry"
    elif lives is None:
        state, detail = speaking, ray_says
    elif lives and not wished:
        state, detail = "stopping", "it commits, then ends"
    elif lives and (heard is None or heard < since):
        state, detail = "waiting", note
    elif lives:
        state, detail = speaking, note
    elif failure is not None:
        state, detail = "failed", str(failure)
    elif not wished:
        state, detail = "stopped", "the same command goes on from its last commit"
    else:
        state, detail = (
            "lost",
            f"`vitscale supervise {run}`, or the same command, goes on from its last commit",
        )
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
        job=job,
        ray=ray_says,
    )


def _job(site: Site, spec: JobSpec) -> tuple[str, str, bool | None, float]:
    """The job's name, what Ray says of it, whether it lives (None if Ray says nothing), and since when."""
    try:
        found = Cluster(site).newest(spec)
    except DataError as error:
        return "", str(error), None, 0.0
    if found is None:
        return "", "no job", False, 0.0
    started = (found[1].start_time or 0) / 1000
    return found[0], found[1].status.value, found[1].status not in ENDED, started


def _newest(events: list[dict[str, Any]], name: str) -> Any:
    return next((event[name] for event in reversed(events) if name in event), None)


def _newest_values(events: list[dict[str, Any]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for event in events:
        values |= event.get("values", {})
    return values
