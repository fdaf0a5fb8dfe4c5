"""Metrics of kept evaluations where people look: as tags of the version and metrics of its run in MLflow."""

import math

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from orchestrator.evaluations import Measured
from orchestrator.site import Site
from orchestrator.tracking import mlflow_errors
from orchestrator.versions import SERVICE, Version
from workers.models.sizes import size_text

SHOWN = ("val_accuracy", "val_accuracy_low", "val_accuracy_high", "val_top5", "val_loss", "val_ece")
PREFIX = "evaluation."


def tell_mlflow(client: MlflowClient, version: Version, measured: Measured, site: Site) -> None:
    """`evaluation.<data>.<pixels>px.<metric>` on the version; again is harmless."""
    name = f"{PREFIX}{data_name(measured, site)}.{size_text(measured.image_size)}px"
    values = {metric: measured.metrics[metric] for metric in SHOWN if metric in measured.metrics}
    number = str(version.version)
    time = round(1000 * measured.time)
    with mlflow_errors(SERVICE):
        tags = {f"{name}.{metric}": f"{value:.6g}" for metric, value in values.items()}
        tags |= {f"{name}.fingerprint": measured.fingerprint[:16]}
        told = client.get_model_version(version.model, number).tags
        missing = {key: value for key, value in tags.items() if told.get(key) != value}
        if version.run_id and missing:
            metrics = [
                Metric(f"{name}.{metric}", value, time, 0)
                for metric, value in values.items()
                if math.isfinite(value)
            ]
            client.log_batch(version.run_id, metrics=metrics)
        for key, value in missing.items():
            client.set_model_version_tag(version.model, number, key, value)


def data_name(measured: Measured, site: Site) -> str:
    """Of a data set, as people call it: its place below the site's data root, else the end of its URL."""
    url = measured.data.rstrip("/")
    below = url.removeprefix(site.data + "/")
    path = below if below != url else "/".join(url.partition("://")[2].split("/")[-2:])
    return "".join(letter if letter.isalnum() or letter in "-_./" else "_" for letter in path)[:100]
