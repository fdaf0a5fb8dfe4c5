"""MLflow runs: found again by name, fed from the events that workers leave in the store.

Workers never talk to MLflow. The driver drains their events: only points that a commit covers are sent, so
what was recomputed after a failure appears once. Sending is idempotent (MLflow's key of a point is metric,
time, step and value), so draining from the start again is harmless.
"""

import logging
import urllib.error
import urllib.request
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
ALIVE_SECONDS = 10.0
RUN_TAG = "vitscale.run"
MAX_PARAM = 500


class Tracking:
    """One experiment on an MLflow server."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        _check_alive(uri)
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
        """What was logged first stays: MLflow takes no other value, though a run may go on elsewhere."""
        logged = self.client.get_run(run_id).data.params
        params = flatten(config.model_dump(mode="json"))
        entries = [
            Param(name, str(value)[:MAX_PARAM])
            for name, value in params.items()
            if value is not None and name not in logged
        ]
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
        self._points: list[Metric] = []
        """Covered and not sent yet; so is the table."""
        self._confusion: dict[str, Any] | None = None

    def step(self) -> None:
        """Read what is new, send what a commit covers; after an error of MLflow call again for the rest."""
        for event in self._reader.read():
            if event["kind"] in ("start", "commit"):
                self._cover(event["images_seen"])
            if event["kind"] == "start":
                self._waiting.clear()
            elif event["kind"] in ("metrics", "confusion"):
                self._waiting.append(event)
        client = self._tracking.client
        while self._points:
            client.log_batch(self._run_id, metrics=self._points[:BATCH])
            del self._points[:BATCH]
        if self._confusion is not None:
            client.log_dict(self._run_id, self._confusion, "confusion.json")
            self._confusion = None

    def _cover(self, images_seen: int) -> None:
        for event in self._waiting:
            if event["images_seen"] > images_seen:
                continue
            if event["kind"] == "confusion":
                self._confusion = {"counts": event["counts"]}
            else:
                time_ms = int(event["time"] * 1000)
                self._points += [
                    Metric(name, value, time_ms, event["images_seen"])
                    for name, value in event["values"].items()
                ]
        self._waiting = [event for event in self._waiting if event["images_seen"] > images_seen]


def _check_alive(uri: str) -> None:
    """DataError within seconds if nobody answers there; MLflow's own client would try for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=ALIVE_SECONDS).close()  # noqa: S310 - http(s), see above
    except urllib.error.HTTPError as error:
        error.close()  # it answers, if only to ask who we are
    except OSError as error:
        raise DataError(f"MLflow at {uri} cannot be reached ({error}); is it up? `vitscale up`") from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
