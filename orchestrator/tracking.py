"""MLflow runs: found again by name, fed from the events that workers leave in the store.

Workers never talk to MLflow. The driver drains their events: only points that a commit covers are sent, so
what was recomputed after a failure appears once. Sending is idempotent (MLflow's key of a point is metric,
time, step and value), so draining from the start again is harmless.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from workers.config import RunConfig
from workers.errors import DataError
from workers.storage import Store
from workers.training.metrics import EventReader

log = logging.getLogger(__name__)

BATCH = 1000
"""MLflow's limit of metrics per request."""
RUN_TAG = "vitscale.run"
MAX_PARAM = 500


class Tracking:
    """One experiment on an MLflow server."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)
        try:
            found = self.client.get_experiment_by_name(experiment)
            self.experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)
        except MlflowException as error:
            raise DataError(f"MLflow at {uri} cannot be used ({error}); is it up? `vitscale up`") from error

    def find_run(self, name: str) -> str | None:
        """Id of the run that bears this name."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{RUN_TAG}` = '{name}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def is_finished(self, name: str) -> bool:
        run_id = self.find_run(name)
        return run_id is not None and self.client.get_run(run_id).info.status == "FINISHED"

    def open_run(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """The run of this name, made if it is not there; its id."""
        run_id = self.find_run(name)
        if run_id is None:
            all_tags = {RUN_TAG: name, "mlflow.runName": name, **(tags or {})}
            if parent is not None:
                all_tags["mlflow.parentRunId"] = parent
            run_id = self.client.create_run(self.experiment_id, tags=all_tags).info.run_id
        return run_id

    def log_config(self, run_id: str, config: RunConfig) -> None:
        params = flatten(config.model_dump(mode="json"))
        entries = [Param(name, str(value)[:MAX_PARAM]) for name, value in params.items() if value is not None]
        self.client.log_batch(run_id, params=entries)

    def log_values(self, run_id: str, values: Mapping[str, float], tags: Mapping[str, str]) -> None:
        for name, value in values.items():
            self.client.log_metric(run_id, name, value)
        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, str(path), folder)

    def finish(self, run_id: str, status: str) -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""
        self.client.set_terminated(run_id, status)

    def run_page(self, run_id: str) -> str:
        return f"{self.uri}/#/experiments/{self.experiment_id}/runs/{run_id}"


class Drain:
    """Sends one run's events to its MLflow run; `step` as often as you like."""

    def __init__(self, tracking: Tracking, run_id: str, store: Store) -> None:
        self._tracking = tracking
        self._run_id = run_id
        self._reader = EventReader(store)
        self._waiting: list[dict[str, Any]] = []
        self._covered: list[dict[str, Any]] = []

    def step(self) -> None:
        """Read what is new, send what a commit covers; after an error of MLflow call again for the rest."""
        for event in self._reader.read():
            if event["kind"] in ("start", "commit"):
                self._cover(event["images_seen"])
            if event["kind"] == "start":
                self._waiting.clear()
            elif event["kind"] in ("metrics", "confusion"):
                self._waiting.append(event)
        while self._covered:
            self._send(self._covered[0])
            self._covered.pop(0)

    def _cover(self, images_seen: int) -> None:
        self._covered += [event for event in self._waiting if event["images_seen"] <= images_seen]
        self._waiting = [event for event in self._waiting if event["images_seen"] > images_seen]

    def _send(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "confusion":
            self._tracking.client.log_dict(self._run_id, {"counts": event["counts"]}, "confusion.json")
            return
        time_ms = int(event["time"] * 1000)
        metrics = [
            Metric(name, value, time_ms, event["images_seen"]) for name, value in event["values"].items()
        ]
        self._tracking.client.log_batch(self._run_id, metrics=metrics)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
