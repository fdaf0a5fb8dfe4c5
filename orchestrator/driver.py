"""The entry point of a job, on the cluster: specification → `TorchTrainer.fit()` → registry.

python -P -m orchestrator.driver RUNS_URL SPEC_DIGEST JOB_ID
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from orchestrator.job import JobSpec, is_complete, read_spec, run_head, run_url, write_failure, write_note
from orchestrator.registry import Registry
from orchestrator.tracking import JobRuns, Tracking
from workers.config import ComputeConfig, RunConfig
from workers.errors import ConfigError, DataError, VitscaleError
from workers.ray_entry import train_entry
from workers.storage import open_store, probe

log = logging.getLogger(__name__)

RESTARTS = 3
"""Worker groups that may die without a new commit before the job gives up."""
LOST_NODE_SECONDS = 300.0
"""How long a job waits for a cluster of fixed size to get back a node that it lost."""
POLL_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    runs, digest, job = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        # Ray tells its jobs alone which cluster is theirs; Ray Train's helpers have to know it too.
        address = os.environ["RAY_ADDRESS"]
        ray.init(address, runtime_env={"env_vars": {"RAY_ADDRESS": address}})
        run_job(read_spec(runs, digest), job)
    except VitscaleError as error:
        log.error("%s", error)
        with contextlib.suppress(DataError):
            write_failure(open_store(runs), job, error)
        return 1
    return 0


def run_job(spec: JobSpec, job: str) -> None:
    problem = probe(open_store(spec.runs))
    if problem:
        raise DataError(f"{spec.runs} cannot hold runs: {problem}; use file:// or another S3 server for runs")
    tracking = Tracking(spec.mlflow, spec.experiment)
    runs = JobRuns(tracking, spec)
    try:
        with runs:
            _fit_all(spec, job)
    except BaseException as error:
        # SystemExit is Ray's way to stop a job. What went wrong matters more than that MLflow is down too.
        with contextlib.suppress(DataError):
            runs.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    try:
        runs.end("FINISHED")
        if spec.register_as:
            registry = Registry(tracking.client, spec.runs)
            for config in spec.configs:
                registry.register(spec.register_as, config, runs.ids[config.run])
    except DataError as error:
        raise DataError(
            f"training is complete and committed, but not recorded: {error}; then the same command records it"
        ) from error


def _fit_all(spec: JobSpec, job: str) -> None:
    configs = _incomplete(spec.runs, spec.configs)
    if not configs:
        return
    _await_room(spec, job, patience=0)
    compute = configs[0].compute
    groups = share_out(configs, max(1, count_slots(ray.nodes(), compute) // compute.workers))
    if len(groups) == 1:
        _fit(spec, job, groups[0])
        return
    # Each group's driver is a task without resources of its own. When one fails, the others go on.
    fit = ray.remote(num_cpus=0, max_retries=RESTARTS)(_fit)
    pending = [fit.remote(spec, job, group) for group in groups]
    failure: VitscaleError | None = None
    while pending:
        (done,), pending = ray.wait(pending)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            failure = failure or _as_ours(error)
    if failure:
        raise failure


def _await_room(spec: JobSpec, job: str, *, patience: float) -> None:
    """ConfigError if the nodes of a cluster of fixed size cannot hold one worker group.

    A cluster that adds nodes does so for what Ray Train asks of it, so there is nothing to wait for here.
    """
    compute = spec.configs[0].compute
    deadline = time.monotonic() + patience
    while (slots := count_slots(ray.nodes(), compute)) < compute.workers:
        each = f"{compute.cpus_per_worker} CPU"
        if compute.gpus_per_worker:
            each += f" and {compute.gpus_per_worker} GPU"
        lack = f"{compute.workers} workers of {each} each; the cluster's nodes have room for {slots}"
        if spec.autoscaling:
            _note(spec, job, f"waiting for nodes for {lack}")
            return
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"compute.workers: no room for {lack}. Ask for less or, if the cluster adds nodes on "
                "demand, put `autoscaling: true` into the site file"
            )
        _note(spec, job, f"waiting for lost nodes: no room for {lack}")
        time.sleep(POLL_SECONDS)


def count_slots(nodes: Iterable[Mapping[str, Any]], compute: ComputeConfig) -> int:
    """Workers that the nodes, as `ray.nodes()` has them, hold when nothing else runs; none spans two."""
    wanted = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker}
    return sum(
        min(int(node["Resources"].get(name, 0) // amount) for name, amount in wanted.items() if amount)
        for node in nodes
        if node["Alive"]
    )


def share_out(configs: Sequence[RunConfig], num_groups: int) -> list[list[RunConfig]]:
    """Runs to worker groups so that all end at about the same time: the longest first, to the least busy."""
    groups: list[list[RunConfig]] = [[] for _ in range(min(num_groups, len(configs)))]
    loads = [0.0] * len(groups)
    for config in sorted(configs, key=lambda c: c.training_flops, reverse=True):
        least = loads.index(min(loads))
        groups[least].append(config)
        loads[least] += config.training_flops
    return groups


def _fit(spec: JobSpec, job: str, group: Sequence[RunConfig]) -> None:
    """Train a group's runs, one after another, in one worker group.

    One that dies is started again from the last commits. A run that cannot be trained does not keep the
    others from it; what was wrong with the first such is raised when they are done.
    """
    failures: dict[str, VitscaleError] = {}
    deaths, progress = 0, _images_seen(spec.runs, group)
    while waiting := _incomplete(spec.runs, [c for c in group if c.run not in failures]):
        try:
            with tempfile.TemporaryDirectory(prefix="vitscale-") as scratch:
                _trainer(spec.runs, waiting, scratch).fit()
            continue
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            cause = _as_ours(error)
        if isinstance(cause, DataError):
            raise cause  # the data, or a service: the other runs need them too
        stuck = _incomplete(spec.runs, waiting)
        before, progress = progress, _images_seen(spec.runs, group)
        deaths = 1 if progress > before else deaths + 1
        # An error of ours would come again; above all, who lost a run's lease must not take it back.
        if stuck and (type(cause) is not VitscaleError or deaths > RESTARTS):
            failures[stuck[0].run], deaths = cause, 0
            log.error("%s cannot be trained: %s", stuck[0].run, cause)
        else:
            log.warning("the worker group died at image %d, starting it again: %s", progress, cause)
            _note(spec, job, f"a worker died; starting again from image {progress:,}")
            _await_room(spec, job, patience=LOST_NODE_SECONDS)
    if failures:
        raise next(iter(failures.values()))


def _trainer(runs: str, group: Sequence[RunConfig], scratch: str) -> TorchTrainer:
    compute = group[0].compute
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    return TorchTrainer(
        train_entry,
        train_loop_config={
            "runs": [{"config": c.model_dump(mode="json"), "url": run_url(runs, c)} for c in group]
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers, use_gpu=compute.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # Ray keeps its own notes here; checkpoints and their log are ours, Ray is never given one.
        run_config=ray.train.RunConfig(name=group[0].run, storage_path=scratch),
    )


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


def _note(spec: JobSpec, job: str, text: str) -> None:
    with contextlib.suppress(DataError):
        write_note(open_store(spec.runs), job, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
