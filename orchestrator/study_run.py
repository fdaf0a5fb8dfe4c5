"""A study in MLflow: a run above those of its rungs, with all points as artifacts; what is known of each rung
beside what its workers told."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from orchestrator.pipeline_run import DESCRIPTION_TAG, MAX_DESCRIPTION, Status
from orchestrator.tracking import BATCH, MAX_PARAM, Tracking, flatten, mlflow_errors

POINTS_TAG = "vitscale.study_points"
"""How many points of a rung were sent: it is not done again for as many."""


@dataclass(frozen=True)
class RungPoint:
    images_seen: int
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]


@dataclass(frozen=True)
class RungFacts:
    run: str
    params: Mapping[str, Any]
    points: Sequence[RungPoint]


def tell_study(
    tracking: Tracking,
    name: str,
    *,
    params: Mapping[str, Any],
    description: str,
    rungs: Sequence[RungFacts],
    files: Mapping[str, bytes],
    status: Status,
) -> str:
    """Id of the study's run. Again it is the same."""
    run_id = tracking.open_run(name, tags={"vitscale.stage": "study-parent"})
    for rung in rungs:
        _tell_rung(tracking, rung)
    with mlflow_errors(tracking.name):
        _log_params(tracking, run_id, flatten(params))
        tracking.client.set_tag(run_id, DESCRIPTION_TAG, description[:MAX_DESCRIPTION])
        with tempfile.TemporaryDirectory(prefix="vitscale-study-") as folder:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            tracking.client.log_artifacts(run_id, folder)
    tracking.finish(run_id, status)
    return run_id


def _tell_rung(tracking: Tracking, rung: RungFacts) -> None:
    run_id = tracking.find_run(rung.run)
    if run_id is None:
        return
    with mlflow_errors(tracking.name):
        if tracking.client.get_run(run_id).data.tags.get(POINTS_TAG) == str(len(rung.points)):
            return
        _log_params(tracking, run_id, rung.params)
        metrics = [
            Metric(name, value, int(point.time * 1000), point.images_seen)
            for point in rung.points
            for name, value in point.values.items()
        ]
        for first in range(0, len(metrics), BATCH):
            tracking.client.log_batch(run_id, metrics=metrics[first : first + BATCH])
        tracking.client.log_batch(run_id, tags=[RunTag(POINTS_TAG, str(len(rung.points)))])


def _log_params(tracking: Tracking, run_id: str, params: Mapping[str, Any]) -> None:
    logged = tracking.client.get_run(run_id).data.params
    entries = [
        Param(name, str(value)[:MAX_PARAM])
        for name, value in params.items()
        if value is not None and name not in logged
    ]
    if entries:
        tracking.client.log_batch(run_id, params=entries)
