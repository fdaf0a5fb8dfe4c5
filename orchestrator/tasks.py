"""Many small tasks on the cluster's nodes, as a job of their own.

A task is the name of a function in a table of the program that the job runs, and plain arguments: no code,
no pickle and no secret goes by way of the store. Each must be safe to do twice, for one whose process or
node is lost is done again.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from pydantic import Field, ValidationError
from ray.job_submission import JobStatus

from orchestrator.capacity import room
from orchestrator.job_records import clear_reports, read_failure, write_failure
from orchestrator.ray_jobs import ENDED, POLL_SECONDS, RayJobs, next_job
from orchestrator.site import Site
from orchestrator.wheel import Wheel, check_running, keep_wheel, shipped, site_wheel
from workers.config import ComputeConfig
from workers.config_text import explain
from workers.errors import ConfigError, DataError, VitscaleError
from workers.part import Part
from workers.storage import AlreadyExists, NotFound, open_store

log = logging.getLogger(__name__)

Table = Mapping[str, Callable[..., int]]
RETRIES = 5
"""Processes or nodes that one task may lose. What fails five times in a row kills them itself."""
REPORT_SECONDS = 1.0
MAX_PENDING = 4096
"""Tasks that Ray knows of at a time; each costs it a few kilobytes."""
WORK = "work"
"""Key of a job's metadata: what it works on, which no other job may do at the same time."""


class TaskSpec(Part):
    function: str
    """A name in the table of the job's program."""
    arguments: tuple[tuple[Any, ...], ...]
    """Of each task; values of JSON."""
    work: str
    """What the tasks write to."""
    cpus: int = Field(default=1, gt=0)
    """Of each task."""
    gpus: int = Field(default=0, ge=0)
    autoscaling: bool = False
    """The cluster adds nodes on demand."""
    wheel: Wheel | None = None
    """The code that the job brings with it; None: what is installed on the nodes."""

    def to_bytes(self) -> bytes:
        """Without defaults, so that a version that knows more fields means the same tasks."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True).encode()


def map_on_cluster(
    site: Site,
    module: str,
    function: str,
    arguments: Sequence[Sequence[Any]],
    work: str,
    done: Callable[[int], None],
    *,
    cpus: int = 1,
    gpus: int = 0,
) -> None:
    """Each task once, in any order, on whatever nodes the site's cluster has; returns when all are done.

    `module` is the job's program, which calls `main` with its table. Each task has `cpus` and `gpus`.
    `done` is told how much more the tasks returned in sum. An interrupt stops the job; a job that an earlier
    command left running on the same `work` is stopped first.
    """
    spec = TaskSpec(
        function=function,
        arguments=tuple(map(tuple, arguments)),
        work=work,
        cpus=cpus,
        gpus=gpus,
        autoscaling=site.autoscaling,
        wheel=site_wheel(site),
    )
    digest = hashlib.sha256(spec.to_bytes()).hexdigest()
    store = open_store(site.runs)
    jobs = RayJobs(site)
    job, runs_already = next_job(digest[:16], jobs.all())
    if not runs_already:
        for other, details in jobs.all().items():
            if details.status not in ENDED and (details.metadata or {}).get(WORK) == work:
                jobs.stop(other)
        with contextlib.suppress(AlreadyExists):
            store.create(_spec_key(digest), spec.to_bytes())
        clear_reports(store, job)
        store.delete(_progress_key(job))
        keep_wheel(store, site, spec.wheel)
        with shipped(store, spec.wheel) as code:
            jobs.submit(module, [site.runs, digest, job], job, {WORK: work}, code)
    try:
        _follow(site, jobs, job, done)
    except KeyboardInterrupt:
        jobs.stop(job)
        raise
    finally:
        store.delete(_progress_key(job))


def _follow(site: Site, jobs: RayJobs, job: str, done: Callable[[int], None]) -> None:
    store, told = open_store(site.runs), 0
    while True:
        details = jobs.details(job)
        with contextlib.suppress(NotFound, ValueError):
            now = int(store.read(_progress_key(job)))
            if now > told:
                done(now - told)
                told = now
        if details.status in ENDED:
            break
        time.sleep(POLL_SECONDS)
    if details.status != JobStatus.SUCCEEDED:
        raise read_failure(store, job) or VitscaleError(
            f"job {job} ended as {details.status.value} (exit code {details.driver_exit_code}); the same "
            f"command goes on from here. Its log ends:\n{jobs.log_tail(job, details)}"
        )


def main(arguments: Sequence[str], table: Table) -> int:
    """The job's program, on the cluster."""
    runs, digest, job = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        spec = _read_spec(runs, digest, table)
        check_running(spec.wheel)
        # Ray tells its jobs alone which cluster is theirs; its own helpers have to know it too.
        address = os.environ["RAY_ADDRESS"]
        ray.init(address, runtime_env={"env_vars": {"RAY_ADDRESS": address}})
        _run(
            spec, table[spec.function], lambda sum_: open_store(runs).write(_progress_key(job), b"%d" % sum_)
        )
    except VitscaleError as error:
        log.error("%s", error)
        with contextlib.suppress(DataError):
            write_failure(open_store(runs), job, error)
        return 1
    return 0


def _run(spec: TaskSpec, function: Callable[..., int], report: Callable[[int], None]) -> None:
    _check_room(spec)
    # By default Ray starts a process anew for each task that has a GPU, and torch with it.
    task = ray.remote(num_cpus=spec.cpus, num_gpus=spec.gpus, max_retries=RETRIES, max_calls=0)(function)
    waiting = iter(spec.arguments)
    pending: list[Any] = []
    total, reported = 0, time.monotonic()
    while True:
        while len(pending) < MAX_PENDING and (given := next(waiting, None)) is not None:
            pending.append(task.remote(*given))
        if not pending:
            break
        ready, pending = ray.wait(pending, num_returns=1, timeout=REPORT_SECONDS)
        for reference in ready:
            total += _result(reference)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            with contextlib.suppress(DataError):
                report(total)
    report(total)


def _check_room(spec: TaskSpec) -> None:
    """ConfigError rather than tasks that wait for ever."""
    each = ComputeConfig(cpus_per_worker=spec.cpus, gpus_per_worker=spec.gpus)
    if not spec.autoscaling and not room(each).total:
        lack = f"{spec.cpus} CPU" + (f" and {spec.gpus} GPU" if spec.gpus else "")
        raise ConfigError(
            f"no node of the cluster has {lack}, which each task needs. Ask for less or, if the cluster adds "
            "nodes on demand, put `autoscaling: true` into the site file"
        )


def _result(reference: Any) -> int:
    try:
        return int(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, VitscaleError):
            raise cause from None
        raise VitscaleError(f"a task failed: {cause!r}") from error
    except ray.exceptions.RayError as error:
        raise VitscaleError(
            f"a task lost its process {RETRIES + 1} times (too little memory on the nodes?): {error}"
        ) from error


def _read_spec(runs: str, digest: str, table: Table) -> TaskSpec:
    data = open_store(runs).read(_spec_key(digest))
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(f"tasks {digest[:12]} were changed after they were written")
    try:
        spec = TaskSpec.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"tasks {digest[:12]}: {explain(error, TaskSpec)}") from None
    if spec.function not in table:
        raise ConfigError(f"tasks {digest[:12]}: no function {spec.function!r}; known: {', '.join(table)}")
    return spec


def _spec_key(digest: str) -> str:
    return f"jobs/{digest}.tasks.json"


def _progress_key(job: str) -> str:
    return f"jobs/{job}.progress"
