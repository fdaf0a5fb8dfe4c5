"""The entry point of a job, on the cluster: specification → `TorchTrainer.fit()` → registry.

python -P -m orchestrator.driver RUNS_URL SPEC_DIGEST JOB_ID
"""

import gc
import sys

if __name__ == "__main__":
    # To look through all that the imports bring, again and again, takes a fifth of their time.
    gc.disable()

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray
import ray.train
from ray.autoscaler.sdk import request_resources

from orchestrator.attempt import Attempt
from orchestrator.capacity import room
from orchestrator.job import JobSpec, is_complete, read_spec, run_head
from orchestrator.job_records import (
    Stopped,
    raise_if_stopped,
    read_stop,
    wished_at,
    write_done,
    write_failure,
    write_note,
    write_run_failure,
    write_stop,
)
from orchestrator.job_runs import JobRuns
from orchestrator.kept_log import keep_log
from orchestrator.packing import worker_resources
from orchestrator.place import Place
from orchestrator.queue import Entry, Share
from orchestrator.ray_jobs import STOP_WAIT_SECONDS
from orchestrator.scoring import log_scores, write_plans
from orchestrator.time_limit import watch_time
from orchestrator.trials import run_trials
from orchestrator.turn import await_turn, no_room
from orchestrator.wheel import check_running
from workers.config import ComputeConfig, RunConfig
from workers.errors import DataError, VitscaleError
from workers.storage import Unavailable, open_store, probe

if TYPE_CHECKING:
    from orchestrator.tracking import Tracking

log = logging.getLogger(__name__)

RESTARTS = 3
"""Worker groups that may die without a new commit before the job gives up."""
LOST_NODE_SECONDS = 300.0
"""How long a job waits for a cluster of fixed size to get back a node that it lost."""
TRACKING_PATIENCE = 600.0
"""How long a job that is done waits for MLflow to hear of it."""
STOP_SECONDS = STOP_WAIT_SECONDS - 10
"""For a commit and the end, of those that Ray leaves a job that it stops."""


def main(arguments: Sequence[str]) -> int:
    runs, digest, job = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with keep_log(runs, job):
        log.info("job %s begins", job)
        return _main(runs, digest, job)


def _main(runs: str, digest: str, job: str) -> int:
    try:
        # Ray tells its jobs alone which cluster is theirs; Ray Train's helpers have to know it too.
        address = os.environ["RAY_ADDRESS"]
        ray.init(address, runtime_env={"env_vars": {"RAY_ADDRESS": address}})
        _stop_in_time(runs, job)
        spec = read_spec(runs, digest)
        check_running(spec.wheel)
        watch_time(spec)
        run_job(spec, job)
    except Stopped as stopped:
        log.info("%s", stopped)
        return 1
    except VitscaleError as error:
        log.error("%s", error)
        with contextlib.suppress(DataError):
            write_failure(open_store(runs), job, error)
        return 1
    except Exception:
        # Here, so that the log that is kept has it.
        log.exception("job %s fails", job)
        return 1
    return 0


def _stop_in_time(runs: str, job: str) -> None:
    """SIGTERM, which is how Ray stops a job, has the workers commit and end; if that takes too long, it
    ends this process as it is."""

    def at_term(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)
        # Not here: a signal handler may have interrupted whatever holds the locks that this needs.
        threading.Thread(target=write_stop, args=(open_store(runs), job, "the job is stopped")).start()

    def at_alarm(number: int, frame: object) -> None:
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, at_term)
    signal.signal(signal.SIGALRM, at_alarm)


def run_job(spec: JobSpec, job: str) -> None:
    problem = probe(open_store(spec.runs))
    if problem:
        raise DataError(f"{spec.runs} cannot hold runs: {problem}; use file:// or another S3 server for runs")
    runs = JobRuns(spec)
    try:
        with runs:
            _fit_all(spec, job)
    except BaseException as error:
        # SystemExit is Ray's way to stop a job. What went wrong matters more than that MLflow is down too.
        stopped = isinstance(error, Stopped) or not isinstance(error, Exception)
        with contextlib.suppress(VitscaleError):
            # What is complete counts, whatever became of the others.
            _register(spec, runs, runs.end("KILLED" if stopped else "FAILED"))
        raise
    try:
        _register(spec, runs, runs.end("FINISHED", patience=TRACKING_PATIENCE))
    except DataError as error:
        kind = Unavailable if isinstance(error, Unavailable) else DataError
        raise kind(
            f"training is complete and committed, but not recorded: {error}; then the same command records it"
        ) from error
    write_done(open_store(spec.runs), spec.digest)


def _register(spec: JobSpec, runs: JobRuns, tracking: "Tracking") -> None:
    """The versions of runs that are complete, in the order in which they were asked for."""
    # On use: it brings MLflow and the models, and the workers are to start first.
    from orchestrator.registry import Registry

    registry = Registry(tracking.client, spec.runs)
    for config, model in zip(spec.configs, spec.models, strict=True):
        if model is not None and is_complete(spec.runs, config):
            registry.register(model, config, runs.ids[config.run])
    try:
        log_scores(spec, tracking, runs.ids)
    except VitscaleError as error:
        log.warning("what was planned is not compared with what was needed: %s", error)


def _fit_all(spec: JobSpec, job: str) -> None:
    configs = _incomplete(spec.runs, spec.configs)
    if not configs:
        return
    compute = configs[0].compute
    now, fewest = room(compute), compute.worker_counts[0]
    if now.total < fewest and not spec.autoscaling:
        raise no_room(compute, now)
    size = max((count for count in compute.worker_counts if count <= now.total), default=fewest)
    at_once = max(1, now.total // size)
    groups = share_out(configs, num_trials(len(configs), at_once, spec.runs_per_trial))
    if len(groups) == 1:
        _fit(spec, job, groups[0])
        return
    _fit_groups(spec, job, groups, at_once)


def num_trials(runs: int, at_once: int, runs_per_trial: int | None) -> int:
    """Worker groups, one after another or side by side, that share the runs."""
    return at_once if runs_per_trial is None else max(at_once, -(-runs // runs_per_trial))


def _fit_groups(spec: JobSpec, job: str, groups: list[list[RunConfig]], at_once: int) -> None:
    """Each as a trial. When one fails, the others go on; the first failure is raised when all have ended."""

    def trial(index: int) -> VitscaleError | None:
        if read_stop(open_store(spec.runs), spec.digest, job) is not None:
            return None
        try:
            _fit(spec, job, groups[index], index)
        except Stopped:
            return None
        except VitscaleError as error:
            return error
        return None

    failures = run_trials(trial, len(groups), at_once, restarts=RESTARTS)
    raise_if_stopped(open_store(spec.runs), spec.digest, job)
    if failures:
        raise failures[0]


def share_out(configs: Sequence[RunConfig], num_groups: int) -> list[list[RunConfig]]:
    """Runs to worker groups so that all end at about the same time: the longest first, to the least busy."""
    groups: list[list[RunConfig]] = [[] for _ in range(min(num_groups, len(configs)))]
    loads = [0.0] * len(groups)
    for config in sorted(configs, key=lambda c: c.training_flops, reverse=True):
        least = loads.index(min(loads))
        groups[least].append(config)
        loads[least] += config.training_flops
    return groups


def _fit(spec: JobSpec, job: str, group: Sequence[RunConfig], trial: int | None = None) -> None:
    """Train a group's runs, one after another, in one worker group, which has a place in the queue.

    One that dies is started again from the last commits. A run that cannot be trained does not keep the
    others from it; what was wrong with the first such is raised when they are done.
    """
    with Place(spec.runs, _entry(spec, job, group, trial)) as place:
        _fit_at(place, spec, job, group)


def _entry(spec: JobSpec, job: str, group: Sequence[RunConfig], trial: int | None) -> Entry:
    compute = spec.configs[0].compute
    return Entry(
        name=spec.digest if trial is None else f"{spec.digest}.{trial}",
        job=job,
        runs=tuple(config.run for config in group),
        queue=compute.queue,
        priority=compute.priority,
        at=wished_at(open_store(spec.runs), spec.digest),
        counts=tuple(compute.worker_counts),
        worker=worker_resources(compute),
    )


def _fit_at(place: Place, spec: JobSpec, job: str, group: Sequence[RunConfig]) -> None:
    failures: dict[str, VitscaleError] = {}
    deaths, progress = 0, _images_seen(spec.runs, group)
    patience = 0.0
    while waiting := _incomplete(spec.runs, [c for c in group if c.run not in failures]):
        size = await_turn(spec, job, place, patience=patience)
        patience = LOST_NODE_SECONDS
        if spec.autoscaling:
            _ask_for_nodes(waiting[0].compute, place.share(None))
        with contextlib.suppress(VitscaleError):
            write_plans(spec.runs, waiting, size)
        attempt = Attempt(spec, job, waiting, size, place)
        death = "a worker died"
        try:
            attempt.run()
            _make_way(spec, job, attempt)
            continue
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            cause = _as_ours(error)
        # Who waits may have been there before it; and the nodes may be lost that it was on.
        place.wait("")
        if type(cause) is VitscaleError and (hang := attempt.hangs()):
            cause, death = VitscaleError(f"training failed: {hang}"), hang
        if isinstance(cause, DataError):
            raise cause  # the data, or a service: the other runs need them too
        stuck = _incomplete(spec.runs, waiting)
        before, progress = progress, _images_seen(spec.runs, group)
        deaths = 1 if progress > before else deaths + 1
        # An error of ours would come again; above all, who lost a run's lease must not take it back.
        if stuck and (type(cause) is not VitscaleError or deaths > RESTARTS):
            failures[stuck[0].run], deaths = cause, 0
            with contextlib.suppress(DataError):
                write_run_failure(open_store(spec.runs), job, stuck[0].run, cause)
            log.error("%s cannot be trained: %s", stuck[0].run, cause)
        else:
            log.warning("the worker group died at image %d, starting it again: %s", progress, cause)
            write_note(open_store(spec.runs), job, f"{death}; starting again from image {progress:,}")
    if failures:
        raise next(iter(failures.values()))


def _ask_for_nodes(compute: ComputeConfig, share: Share) -> None:
    """For an elastic group to grow into; those that it begins with Ray Train asks for."""
    if len(compute.worker_counts) > 1:
        request_resources(bundles=[worker_resources(compute)] * share.workers)


def _make_way(spec: JobSpec, job: str, attempt: Attempt) -> None:
    """After a group has ended by itself; Stopped if its job is to end with it."""
    if attempt.reason is None or not _incomplete(spec.runs, attempt.runs):
        return
    raise_if_stopped(open_store(spec.runs), spec.digest, job)
    log.info("the worker group has made way: %s", attempt.reason)
    write_note(open_store(spec.runs), job, f"{attempt.reason}; going on from the commit made for it")


def _incomplete(runs: str, configs: Sequence[RunConfig]) -> list[RunConfig]:
    return [config for config in configs if not is_complete(runs, config)]


def _images_seen(runs: str, group: Sequence[RunConfig]) -> int:
    heads = [run_head(runs, config) for config in group]
    return sum(head.images_seen for head in heads if head)


def _as_ours(error: BaseException) -> VitscaleError:
    """The error of ours behind one of Ray's, else Ray's as one of ours."""
    seen: list[BaseException] = [error]
    for item in seen:
        # Ray makes a traceback of a task's error look like that error's own class.
        if isinstance(item, VitscaleError) and not isinstance(item, ray.exceptions.RayTaskError):
            return item
        nested = [
            *getattr(item, "worker_failures", {}).values(),
            getattr(item, "controller_failure", None),
            getattr(item, "cause", None),
            item.__cause__,
        ]
        seen += [other for other in nested if isinstance(other, BaseException) and other not in seen]
    return VitscaleError(f"training failed: {error}")


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main(sys.argv[1:]))
