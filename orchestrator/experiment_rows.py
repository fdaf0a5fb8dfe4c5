"""The runs of an MLflow experiment as rows: parameters, last metrics and tags."""

from orchestrator.tracking import connect, mlflow_errors
from workers.errors import ConfigError

PAGE = 1000
OWN_TAGS = ("vitscale.", "mlflow.runName")
"""Beginnings of the tags that become columns."""


def experiment_rows(uri: str, experiment: str) -> list[dict[str, object]]:
    """A row per finished run; ConfigError names the experiments that there are if it is none of them."""
    client = connect(uri)
    rows: list[dict[str, object]] = []
    with mlflow_errors(f"MLflow at {uri}"):
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = ", ".join(sorted(one.name for one in client.search_experiments()))
            raise ConfigError(f"MLflow at {uri} has no experiment {experiment}; it has {names}")
        token: str | None = None
        while True:
            page = client.search_runs(
                [found.experiment_id], "attributes.status = 'FINISHED'", max_results=PAGE, page_token=token
            )
            for run in page:
                tags = {name: value for name, value in run.data.tags.items() if name.startswith(OWN_TAGS)}
                rows.append({**tags, **run.data.params, **run.data.metrics})
            token = page.token
            if not token:
                return rows
