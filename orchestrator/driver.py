"""The entry point of a job, on the cluster: specification → `TorchTrainer.fit()` → registry.

python -P -m orchestrator.driver RUNS_URL SPEC_DIGEST JOB_ID
"""

import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from mlflow.exceptions import MlflowException
from ray.train.torch import TorchTrainer

import workers
from orchestrator.job import JobSpec, read_spec, run_url, write_failure
from orchestrator.registry import Registry
from orchestrator.tracking import Drain, Tracking
from workers.config import RunConfig
from workers.errors import ConfigError, DataError, VitscaleError
from workers.ray_entry import train_entry
from workers.storage import open_store, probe
from workers.training.commits import CommitLog

log = logging.getLogger(__name__)

RESTARTS = 3
"""Worker groups that may die without a new commit before the job gives up."""
DRAIN_SECONDS = 2.0


def main(arguments: Sequence[str]) -> int:
    runs, digest, job = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        if getattr(workers, "DISTRIBUTION", None) != "vitscale":
            raise ConfigError(f"{workers.__file__} is not vitscale's; install vitscale on the cluster")
        # Ray names the cluster of a job in its environment.
        ray.init(address="auto")
        run_job(read_spec(runs, digest))
    except VitscaleError as error:
        log.error("%s", error)
        write_failure(open_store(runs), job, error)
        return 1
    return 0


def run_job(spec: JobSpec) -> None:
    problem = probe(open_store(spec.runs))
    if problem:
        raise DataError(f"{spec.runs} cannot hold runs: {problem}; use file:// or another S3 server for runs")
    tracking = Tracking(spec.mlflow, spec.experiment)
    parent = tracking.open_run(spec.parent) if spec.parent else None
    run_ids: dict[str, str] = {}
    for config in spec.configs:
        run_ids[config.run] = tracking.open_run(config.run, parent=parent, tags=spec.tags)
        tracking.log_config(run_ids[config.run], config)
    everything = [*run_ids.values(), *([parent] if parent else [])]
    drains = _Drains(tracking, spec, run_ids)
    try:
        with drains:
            _fit_all(spec)
    except VitscaleError:
        for run_id in everything:
            tracking.finish(run_id, "FAILED")
        raise
    drains.finish()
    if spec.register_as:
        registry = Registry(tracking.client, spec.runs)
        for config in spec.configs:
            registry.register(spec.register_as, config, run_ids[config.run])
    for run_id in everything:
        tracking.finish(run_id, "FINISHED")


def _fit_all(spec: JobSpec) -> None:
    groups = share_out(spec.configs, _room(spec.configs[0]))
    if len(groups) == 1:
        _fit(spec.runs, groups[0])
        return
    # Each group's driver is a task without resources of its own.
    fit = ray.remote(num_cpus=0, max_retries=0)(_fit)
    tasks = [fit.remote(spec.runs, group) for group in groups]
    try:
        ray.get(tasks)
    except ray.exceptions.RayTaskError as error:
        raise _as_ours(error) from error


def _room(config: RunConfig) -> int:
    """Worker groups of this shape that the cluster holds at once."""
    total = ray.cluster_resources()
    compute = config.compute
    wanted = {
        "CPU": compute.cpus_per_worker * compute.workers,
        "GPU": compute.gpus_per_worker * compute.workers,
    }
    return max(1, min(int(total.get(name, 0) // amount) for name, amount in wanted.items() if amount))


def share_out(configs: Sequence[RunConfig], num_groups: int) -> list[list[RunConfig]]:
    """Runs to worker groups so that all end at about the same time: the longest first, to the least busy."""
    groups: list[list[RunConfig]] = [[] for _ in range(min(num_groups, len(configs)))]
    loads = [0.0] * len(groups)
    for config in sorted(configs, key=lambda c: c.training_flops, reverse=True):
        least = loads.index(min(loads))
        groups[least].append(config)
        loads[least] += config.training_flops
    return groups


def _fit(runs: str, group: Sequence[RunConfig]) -> None:
    """Train a group's runs in one worker group; one that dies is started again from the last commits."""
    payload: dict[str, Any] = {
        "runs": [{"config": c.model_dump(mode="json"), "url": run_url(runs, c)} for c in group]
    }
    deaths, progress = 0, _images_seen(runs, group)
    while not _complete(runs, group):
        try:
            with tempfile.TemporaryDirectory(prefix="vitscale-") as scratch:
                _trainer(payload, group[0], scratch).fit()
        except ray.train.TrainingFailedError as error:
            cause = _as_ours(error)
            before, progress = progress, _images_seen(runs, group)
            deaths = 1 if progress > before else deaths + 1
            if isinstance(cause, ConfigError | DataError) or deaths > RESTARTS:
                raise cause from error
            log.warning("the worker group died at image %d, starting it again: %s", progress, cause)


def _trainer(payload: dict[str, Any], config: RunConfig, scratch: str) -> TorchTrainer:
    compute = config.compute
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    return TorchTrainer(
        train_entry,
        train_loop_config=payload,
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers, use_gpu=compute.gpus_per_worker > 0, resources_per_worker=resources
        ),
        # Ray keeps its own notes here; checkpoints and their log are ours, Ray is never given one.
        run_config=ray.train.RunConfig(name=config.run, storage_path=scratch),
    )


def _images_seen(runs: str, group: Sequence[RunConfig]) -> int:
    heads = [CommitLog(open_store(run_url(runs, config))).head() for config in group]
    return sum(head.images_seen for head in heads if head)


def _complete(runs: str, group: Sequence[RunConfig]) -> bool:
    heads = [CommitLog(open_store(run_url(runs, config))).head() for config in group]
    return all(head is not None and head.complete for head in heads)


def _as_ours(error: BaseException) -> VitscaleError:
    """The error of ours behind one of Ray's, else Ray's as one of ours."""
    seen: list[BaseException] = [error]
    for item in seen:
        if isinstance(item, VitscaleError):
            return item
        nested = [
            *getattr(item, "worker_failures", {}).values(),
            getattr(item, "cause", None),
            item.__cause__,
        ]
        seen += [other for other in nested if isinstance(other, BaseException) and other not in seen]
    return VitscaleError(f"training failed: {error}")


class _Drains:
    """Sends the runs' events to MLflow from a thread; an outage of MLflow delays points and stops nothing."""

    def __init__(self, tracking: Tracking, spec: JobSpec, run_ids: dict[str, str]) -> None:
        self._drains = [
            Drain(tracking, run_ids[config.run], open_store(run_url(spec.runs, config)))
            for config in spec.configs
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="drain-events")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self) -> None:
        """Send the rest; DataError if MLflow does not take it."""
        try:
            for drain in self._drains:
                drain.step()
        except MlflowException as error:
            raise DataError(
                f"training is complete and committed, but MLflow did not take its metrics ({error}); "
                "the same command again sends them"
            ) from error

    def _loop(self) -> None:
        while not self._stop.wait(DRAIN_SECONDS):
            try:
                for drain in self._drains:
                    drain.step()
            except (MlflowException, DataError) as error:
                log.warning("metrics wait in the store: %s", error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
