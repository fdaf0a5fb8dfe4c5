"""What was planned of a run, stored when it starts; when it is complete, how far that was off.

`runs/<run>/plan.json` and `score.json` in the store of runs, both create-once; metrics in MLflow.
"""

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from pydantic import BaseModel, ConfigDict

from orchestrator.fitting import needed_bytes
from orchestrator.host_memory import host_memory
from orchestrator.job import JobSpec, run_head, run_url
from orchestrator.past_runs import PastRun, as_past_run, forecast, key_of, read_past_runs
from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.hardware_label import cpu_label, gpu_label
from workers.models.memory import training_memory
from workers.storage import AlreadyExists, NotFound, Store, open_store
from workers.training.commits import CommitLog
from workers.training.metrics import newest_events

if TYPE_CHECKING:
    from orchestrator.tracking import Tracking

PLAN, SCORE = "plan.json", "score.json"
WARM_UP_POINTS = 1
"""Of a run's speed: its first point holds what is done once."""


class StoredPlan(BaseModel):
    """What was known when a run started."""

    model_config = ConfigDict(frozen=True)

    hardware: str
    workers: int
    num_validation: int
    memory_bytes: int
    """Of a worker: of its GPU, or resident."""
    seconds: float | None = None
    """From its start to its last commit; None: no run before it said how fast it would be."""
    images_per_second: float | None = None
    """Of all workers."""
    interval: tuple[float, float] | None = None
    """Of the seconds, 90 %."""
    source: str = ""


def write_plans(runs: str, configs: Sequence[RunConfig], workers: int) -> None:
    """Of runs that are about to start; one that has a plan keeps it."""
    past: list[PastRun] | None = None
    for config in configs:
        store = open_store(run_url(runs, config))
        if _read(store, PLAN) is None:
            past = read_past_runs(open_store(runs)) if past is None else past
            _create(store, PLAN, foretell(config, _hardware(config), workers, past).model_dump(mode="json"))


def foretell(config: RunConfig, hardware: str, workers: int, past: Sequence[PastRun]) -> StoredPlan:
    """By past runs alone."""
    num_validation = DatasetIndex.open(config.data.validation_url).num_samples
    host = host_memory(config, workers, DatasetIndex.open(config.data.url))
    memory = needed_bytes(training_memory(config, workers), host)
    plan = StoredPlan(hardware=hardware, workers=workers, num_validation=num_validation, memory_bytes=memory)
    found = forecast(as_past_run(config, hardware, workers, num_validation), past)
    if found is None:
        return plan
    rate = found.speed.images_per_second * workers
    said = {"seconds": found.seconds, "images_per_second": rate, "interval": found.interval}
    return plan.model_copy(update={**said, "source": found.speed.source})


def score(runs: str, config: RunConfig) -> PastRun | None:
    """Of a complete run with a plan, written to its folder and, if it ran without a break, for `vitscale
    plan` to read; again it is the same. None if it has no plan, or too little was told of it."""
    store = open_store(run_url(runs, config))
    known = _read(store, SCORE)
    if known is not None:
        return PastRun.from_json(known)
    planned, epoch = _read(store, PLAN), CommitLog(store).newest_epoch()
    if planned is None or epoch is None:
        return None
    past = _measure(config, StoredPlan.model_validate_json(planned), newest_events(store, epoch))
    if past is None:
        return None
    _create(store, SCORE, past.to_json())
    if epoch == 0:  # what was done twice says nothing of the next run
        _create(open_store(runs), key_of(past), past.to_json())
    return past


def _measure(config: RunConfig, plan: StoredPlan, events: Sequence[Mapping[str, Any]]) -> PastRun | None:
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event["kind"], []).append(event)
    points = [event["values"] for event in by_kind.get("metrics", ())]
    rates = [values["images_per_second"] for values in points if "images_per_second" in values]
    memory = [event["peak_bytes"] for event in by_kind.get("memory", ())]
    starts, ends = by_kind.get("start", []), [e for e in by_kind.get("commit", ()) if e["complete"]]
    if not (rates and memory and starts and ends):
        return None
    start, workers = starts[0], int(starts[0]["world_size"])
    wanted = as_past_run(config, start.get("hardware", plan.hardware), workers, plan.num_validation)
    rate = statistics.median(rates[WARM_UP_POINTS:] or rates)
    measured = {
        "time": ends[-1]["time"],
        "seconds": ends[-1]["time"] - start["time"],
        "images_per_second": rate,
        "memory_bytes": memory[-1],
    }
    planned = {f"planned_{name}": getattr(plan, name) for name in ("seconds", "images_per_second")}
    values = {**vars(wanted), **measured, **planned, "planned_memory_bytes": plan.memory_bytes}
    return PastRun(**values)


def log_scores(spec: JobSpec, tracking: "Tracking", ids: Mapping[str, str]) -> None:
    """Of the runs that are complete: planned / measured as metrics of their MLflow runs."""
    # On use: a run's plan is written before its workers start, and MLflow takes a second or two.
    from mlflow.entities import Metric

    from orchestrator.tracking import mlflow_errors

    for config in spec.configs:
        head = run_head(spec.runs, config)
        past = score(spec.runs, config) if head is not None and head.complete else None
        if past is None:
            continue
        ratios = past.to_json()["planned_to_measured"]
        milliseconds, images = int(past.time * 1000), past.images
        points = [Metric(f"plan/{name}", ratio, milliseconds, images) for name, ratio in ratios.items()]
        with mlflow_errors(tracking.name):
            tracking.client.log_batch(ids[config.run], metrics=points)
            tracking.client.set_tag(ids[config.run], "vitscale.hardware", past.hardware)


def _hardware(config: RunConfig) -> str:
    """Of the cluster's nodes with GPUs; without them of this machine."""
    if not config.compute.gpus_per_worker:
        return cpu_label(config.compute.cpus_per_worker)
    marks = [name for node in ray.nodes() if node["Alive"] for name in node["Resources"]]
    types = [name.removeprefix("accelerator_type:") for name in marks if name.startswith("accelerator_type:")]
    return gpu_label(types[0]) if types else "GPU"


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key)
    except NotFound:
        return None


def _create(store: Store, key: str, values: Mapping[str, Any]) -> None:
    with contextlib.suppress(AlreadyExists):
        store.create(key, json.dumps(values, indent=1).encode())
