"""The MLflow run of a pipeline: how its stages stand, as a table in its description and as tags; the runs
that they trained lie below it."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mlflow.entities import Param, RunTag
from mlflow.tracking import MlflowClient

from orchestrator.tracking import MAX_PARAM, Tracking, flatten, mlflow_errors

PARENT_TAG = "mlflow.parentRunId"
DESCRIPTION_TAG = "mlflow.note.content"
"""Which its page shows as Markdown."""
MAX_DESCRIPTION = 5000
"""MLflow's limit of a tag, in letters."""
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class PipelineRun:
    def __init__(self, uri: str, experiment: str, name: str, values: Mapping[str, Any]) -> None:
        """Found again by its name; `values` become its parameters."""
        self._uri, self._experiment, self._name = uri, experiment, name
        self._values = values

    def tell(
        self, tags: Mapping[str, str], description: str, status: Status, children: Iterable[str]
    ) -> None:
        """All of it, each time: what an outage has cost is made up for by the next call.

        `children`: names of runs that are to lie below it, those that are there and below no other."""
        tracking = Tracking(self._uri, self._experiment)
        run_id = tracking.open_run(self._name, tags={"vitscale.stage": "pipeline"})
        with mlflow_errors(tracking.name):
            there = tracking.client.get_run(run_id).data
            params = [
                Param(name, str(value)[:MAX_PARAM])
                for name, value in flatten(self._values).items()
                if name not in there.params and value is not None
            ]
            told = [
                RunTag(name, value[:MAX_PARAM]) for name, value in tags.items() if value or name in there.tags
            ]
            told.append(RunTag(DESCRIPTION_TAG, description[:MAX_DESCRIPTION]))
            tracking.client.log_batch(run_id, params=params, tags=told)
            for child in filter(None, map(tracking.find_run, children)):
                _adopt(tracking.client, child, run_id)
        if status == "RUNNING":
            tracking.resume(run_id)
        else:
            tracking.finish(run_id, status)


def _adopt(client: MlflowClient, child: str, parent: str) -> None:
    if PARENT_TAG not in client.get_run(child).data.tags:
        client.set_tag(child, PARENT_TAG, parent)
