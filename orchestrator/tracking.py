"""MLflow runs: found again by name, fed from the events that workers leave in the store.

Workers never talk to MLflow. The driver drains their events: only points that a commit covers are sent, so
what was recomputed after a failure appears once. Sending is idempotent (MLflow's key of a point is metric,
time, step and value), so draining from the start again is harmless.
"""

import contextlib
import http.client
import logging
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from workers.code_digests import code_digests
from workers.config import RunConfig
from workers.errors import DataError, root_cause
from workers.storage import Store, Unavailable
from workers.training.commits import Window
from workers.training.metrics import EventReader

log = logging.getLogger(__name__)

BATCH = 1000
"""MLflow's limit of metrics per request."""
ALIVE_SECONDS = 10.0
RUN_TAG = "vitscale.run"
SKIPPED_TAG = "vitscale.skipped"
"""Of a run that went back: the steps that it skipped, as `first-last`."""
KINDS = ("metrics", "confusion", "epoch", "bad_samples", "bad_step", "evaluation", "probe")
"""Of events that are sent."""
MAX_PARAM = 500


class Tracking:
    """One experiment on an MLflow server."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self.name = f"MLflow at {uri}"
        self.client = connect(uri)
        with mlflow_errors(self.name):
            self.experiment_id = self._experiment(experiment)

    def find_run(self, name: str) -> str | None:
        """Id of the run that bears this name."""
        query = f"tags.`{RUN_TAG}` = '{name}'"
        with mlflow_errors(self.name):
            runs = self.client.search_runs([self.experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None

    def is_finished(self, name: str) -> bool:
        run_id = self.find_run(name)
        with mlflow_errors(self.name):
            return run_id is not None and self.client.get_run(run_id).info.status == "FINISHED"

    def open_run(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """The run of this name, made if it is not there; its id."""
        run_id = self.find_run(name)
        if run_id is None:
            all_tags = {RUN_TAG: name, "mlflow.runName": name, **(tags or {})}
            if parent is not None:
                all_tags["mlflow.parentRunId"] = parent
            with mlflow_errors(self.name):
                run_id = self.client.create_run(self.experiment_id, tags=all_tags).info.run_id
        return run_id

    def log_config(self, run_id: str, config: RunConfig) -> None:
        """What was logged first stays: MLflow takes no other value, though a run may go on elsewhere."""
        params = flatten(config.model_dump(mode="json"))
        with mlflow_errors(self.name):
            logged = self.client.get_run(run_id).data.params
            entries = [
                Param(name, str(value)[:MAX_PARAM])
                for name, value in params.items()
                if value is not None and name not in logged
            ]
            self.client.log_batch(run_id, params=entries)

    def log_code(self, run_id: str) -> None:
        """Digests of what runs now, where they are known; of a run that went on with other code the last."""
        with mlflow_errors(self.name):
            for name, digest in code_digests().items():
                self.client.set_tag(run_id, f"vitscale.{name}", digest)

    def log_file(self, run_id: str, path: Path) -> None:
        with mlflow_errors(self.name):
            self.client.log_artifact(run_id, str(path))

    def log_dict(self, run_id: str, values: Mapping[str, Any], name: str) -> None:
        with mlflow_errors(self.name):
            self.client.log_dict(run_id, dict(values), name)

    def resume(self, run_id: str) -> None:
        """It runs again, whatever it ended as before."""
        with mlflow_errors(self.name):
            self.client.update_run(run_id, "RUNNING")

    def finish(self, run_id: str, status: str) -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""
        with mlflow_errors(self.name):
            self.client.set_terminated(run_id, status)

    def delete_run(self, name: str) -> None:
        run_id = self.find_run(name)
        if run_id is not None:
            with mlflow_errors(self.name):
                self.client.delete_run(run_id)

    def run_page(self, run_id: str) -> str:
        return f"{self.uri}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except MlflowException:
                # Another command may have made it at this moment.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


@contextlib.contextmanager
def mlflow_errors(what: str) -> Iterator[None]:
    """MLflow's errors as ours, of `what` part of it."""
    try:
        yield
    except (MlflowException, OSError) as error:
        # OSError: what requests raises for an artifact that the server could not pass on to its store.
        status = error.get_http_status_code() if isinstance(error, MlflowException) else 500
        hint = "is it up? `vitscale up`"
        if status in (401, 403):
            hint = (
                "it asks who you are: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "~/.mlflow/credentials, say that, and its administrator what you may do"
            )
        kind = DataError if 400 <= status < 429 else Unavailable
        raise kind(f"{what} failed ({root_cause(error)}); {hint}") from error


class Drain:
    """Sends one run's events to its MLflow run; `step` as often as you like."""

    def __init__(self, tracking: Tracking, run_id: str, store: Store) -> None:
        self._tracking = tracking
        self._run_id = run_id
        self._reader = EventReader(store)
        self._waiting: list[dict[str, Any]] = []
        self._points: list[Metric] = []
        """Covered and not sent yet; so are the tables and the probes."""
        self._tables: dict[str, Any] = {}
        """By the file's name."""
        self._probes: dict[int, Mapping[str, Any]] = {}
        """By images seen."""
        self._skipped: list[Window] = []
        """Not sent yet."""

    def step(self, committed: int = 0) -> None:
        """Read what is new, send what a commit covers; after an error of MLflow call again for the rest.

        `committed`: images seen at the newest commit, which may lack its event if a worker died after it.
        """
        for event in self._reader.read():
            if event["kind"] in ("start", "commit"):
                self._cover(event["images_seen"])
            if event["kind"] == "start":
                self._waiting.clear()
                self._skipped = [Window(*window) for window in event.get("skipped", ())]
            elif event["kind"] in KINDS:
                self._waiting.append(event)
        self._cover(committed)
        client = self._tracking.client
        if self._skipped:
            client.set_tag(self._run_id, SKIPPED_TAG, ", ".join(str(window) for window in self._skipped))
            self._skipped.clear()
        while self._points:
            client.log_batch(self._run_id, metrics=self._points[:BATCH])
            del self._points[:BATCH]
        while self._tables:
            name, table = next(iter(self._tables.items()))
            client.log_dict(self._run_id, table, name)
            del self._tables[name]
        while self._probes:
            images_seen, values = next(iter(self._probes.items()))
            self._send_probes(images_seen, values)
            del self._probes[images_seen]

    def _send_probes(self, images_seen: int, values: Mapping[str, Any]) -> None:
        """`probes/<images seen>.json` and the figures in `probes/<images seen>/`; again they are the same."""
        # On use: matplotlib takes a second, and many runs have no probes.
        from orchestrator.figures import write_checkpoint

        with tempfile.TemporaryDirectory(prefix="vitscale-probes-") as folder:
            write_checkpoint(Path(folder), f"{images_seen:012d}", values)
            self._tracking.client.log_artifacts(self._run_id, folder, "probes")

    def _cover(self, images_seen: int) -> None:
        for event in self._waiting:
            if event["images_seen"] > images_seen:
                continue
            self._take(event)
        self._waiting = [event for event in self._waiting if event["images_seen"] > images_seen]

    def _take(self, event: dict[str, Any]) -> None:
        if event["kind"] == "confusion":
            self._tables["confusion.json"] = {"counts": event["counts"]}
            return
        if event["kind"] == "evaluation":
            self._tables[f"evaluation/{event['images_seen']}.json"] = event["details"]
            return
        values = event.get("values", {})
        if event["kind"] == "bad_samples":
            # Each event lists all that were bad so far.
            self._tables[f"bad_samples_{event['of']}.json"] = {"samples": event["samples"]}
            values = {f"bad_samples_{event['of']}": len(event["samples"])}
        elif event["kind"] == "bad_step":
            values = {"bad_steps": event["count"]}
        elif event["kind"] == "epoch":
            values = {f"epochs_proved_{event['source']}": event["epoch"] + 1}
        elif event["kind"] == "probe":
            from workers.probes.result import Probes  # on use: it brings torch

            self._probes[event["images_seen"]] = event["probes"]
            values = Probes.from_json(event["probes"]).summary()
        time_ms = int(event["time"] * 1000)
        self._points += [Metric(name, value, time_ms, event["images_seen"]) for name, value in values.items()]


def connect(uri: str) -> MlflowClient:
    """Unavailable within seconds if nobody answers there. Who we are is in MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, or in ~/.mlflow/credentials."""
    _check_alive(uri)
    return MlflowClient(tracking_uri=uri)


def _check_alive(uri: str) -> None:
    """Unavailable within seconds if nobody answers there; MLflow's own client would try for minutes."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=ALIVE_SECONDS).close()  # noqa: S310 - http(s), see above
    except urllib.error.HTTPError as error:
        error.close()  # it answers, if only to ask who we are
    except (OSError, http.client.HTTPException) as error:
        reason = root_cause(error)
        raise Unavailable(f"MLflow at {uri} cannot be reached ({reason}); is it up? `vitscale up`") from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
