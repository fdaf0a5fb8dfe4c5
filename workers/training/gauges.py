"""What a run shows to whoever watches the cluster: a few numbers, each under the run's name.

Fed by the events that rank 0 writes anyway, so a step costs nothing more. Who exports them is told by
`workers/ray_entry.py`; `infra/monitoring/` has alerts and a dashboard for them.
"""

from collections.abc import Callable, Mapping
from typing import Any

GAUGES = {
    "vitscale_training": "1 while a worker group trains the run, 0 when that has ended",
    "vitscale_attempt": "Worker groups that trained the run before this one, and times that it went back",
    "vitscale_world_size": "Workers of the group",
    "vitscale_images_seen": "Images that the run has been trained on",
    "vitscale_images_per_second": "Images trained on per second, of all workers together",
    "vitscale_mfu": "Share of the devices' peak that the model's own matrix products used",
    "vitscale_data_wait_ratio": "Share of the time for which the first rank waited for data",
    "vitscale_loss": "Training loss, mean over the steps since the last report",
    "vitscale_learning_rate": "Learning rate",
    "vitscale_val_accuracy": "Share of right answers in the newest evaluation",
    "vitscale_last_commit_images": "Images seen at the newest commit; at first, of the one that it continues",
    "vitscale_last_commit_timestamp_seconds": "When that was committed, or the group began",
    "vitscale_quarantined_samples": "Damaged training samples, others in their place",
    "vitscale_bad_steps": "Steps that were left out since their loss or gradient was not finite",
    "vitscale_stragglers": "Times that a worker of this group was found to be slow",
}
"""Names, as Prometheus has them behind Ray's own prefix `ray_`, and what they say."""
OF_METRICS = {
    "images_per_second": "vitscale_images_per_second",
    "mfu": "vitscale_mfu",
    "data_wait": "vitscale_data_wait_ratio",
    "loss": "vitscale_loss",
    "learning_rate": "vitscale_learning_rate",
    "val_accuracy": "vitscale_val_accuracy",
}
"""Values of a `metrics` event."""

Listener = Callable[[str, Mapping[str, Any]], None]
"""Of a run and an event of it."""
SetGauge = Callable[[str, str, float], None]
"""Of a gauge's name, a run and a value; called by several threads."""


class Gauges:
    """Those of the runs that this worker group trains, one after another."""

    def __init__(self, set_gauge: SetGauge) -> None:
        self._set = set_gauge
        self._run: str | None = None
        self._stragglers = 0

    def hear(self, run: str, event: Mapping[str, Any]) -> None:
        """An event as `EventReader` gives it."""
        images = float(event["images_seen"])
        match event["kind"]:
            case "start":
                self._start(run, event)
            case "metrics":
                self._set("vitscale_images_seen", run, images)
                for name, gauge in OF_METRICS.items():
                    if name in event["values"]:
                        self._set(gauge, run, float(event["values"][name]))
            case "commit":
                self._commit(run, event)
            case "bad_samples" if event["of"] == "training":
                self._set("vitscale_quarantined_samples", run, float(len(event["samples"])))
            case "bad_step":
                self._set("vitscale_bad_steps", run, float(event["count"]))
            case "straggler":
                self._stragglers += 1
                self._set("vitscale_stragglers", run, float(self._stragglers))

    def end(self) -> None:
        """Of what the group does, however it ends."""
        if self._run is not None:
            self._set("vitscale_training", self._run, 0.0)

    def _start(self, run: str, event: Mapping[str, Any]) -> None:
        self.end()
        self._run, self._stragglers = run, 0
        self._set("vitscale_training", run, 1.0)
        self._set("vitscale_attempt", run, float(event["epoch"]))
        self._set("vitscale_world_size", run, float(event["world_size"]))
        self._set("vitscale_images_seen", run, float(event["images_seen"]))
        self._commit(run, event)

    def _commit(self, run: str, event: Mapping[str, Any]) -> None:
        self._set("vitscale_last_commit_images", run, float(event["images_seen"]))
        self._set("vitscale_last_commit_timestamp_seconds", run, float(event["time"]))
