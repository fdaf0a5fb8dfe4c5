"""A job's runs in MLflow, while the driver does its work.

MLflow is imported on use, which is on the thread that feeds it: that takes a second or two of a core. It
waits before that until there is something to send, since a worker group that starts may need the core.
"""

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Self

from orchestrator.job import JobSpec, is_complete, run_head, run_url
from workers.errors import DataError
from workers.storage import Unavailable, open_store

if TYPE_CHECKING:
    from orchestrator.tracking import Drain, Tracking

log = logging.getLogger(__name__)

DRAIN_SECONDS = 2.0
RETRY_SECONDS = 5.0
GROUP_SECONDS = 30.0
"""Until a run is opened of which nothing is heard: its group waits, or compiles."""


class JobRuns:
    """The MLflow runs of a job: opened, fed from a thread while it trains, and ended.

    An outage of MLflow delays all of that and stops nothing; no point is lost, they wait in the store.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._parent: str | None = None
        self.ids: dict[str, str] = {}
        """By the runs' names, once they are open."""
        self._drains: dict[str, Drain] = {}
        self._tracking: Tracking | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, name="drain-events")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def end(self, status: str, *, patience: float = 0.0) -> "Tracking":
        """Send what is left; a run that is not complete ends as `status`. Unavailable if MLflow is down for
        longer than `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._end(status)
            except Unavailable as error:
                if time.monotonic() >= deadline:
                    raise
                log.warning("waiting for MLflow: %s", error)
            time.sleep(RETRY_SECONDS)

    def _end(self, status: str) -> "Tracking":
        from orchestrator.tracking import mlflow_errors

        tracking = self.open()
        for config in self._spec.configs:
            head = run_head(self._spec.runs, config)
            with mlflow_errors(tracking.name):
                self._drains[config.run].step(committed=head.images_seen if head else 0)
            done = head is not None and head.complete
            tracking.finish(self.ids[config.run], "FINISHED" if done else status)
        if self._parent:
            tracking.finish(self._parent, status)
        return tracking

    def open(self) -> "Tracking":
        """What is open already is not opened again."""
        from orchestrator.tracking import Drain, Tracking

        tracking = self._tracking = self._tracking or Tracking(self._spec.mlflow, self._spec.experiment)
        if self._spec.parent and not self._parent:
            self._parent = tracking.open_run(self._spec.parent)
            tracking.resume(self._parent)
        for config in self._spec.configs:
            if config.run in self._drains:
                continue
            run_id = tracking.open_run(config.run, parent=self._parent, tags=self._spec.tags)
            tracking.log_config(run_id, config)
            tracking.log_code(run_id)
            if not is_complete(self._spec.runs, config):
                tracking.resume(run_id)
            self.ids[config.run] = run_id
            self._drains[config.run] = Drain(tracking, run_id, open_store(run_url(self._spec.runs, config)))
        return tracking

    def _feed(self) -> None:
        self._await_events()
        while not self._stop.wait(DRAIN_SECONDS):
            from orchestrator.tracking import mlflow_errors

            try:
                tracking = self.open()
                with mlflow_errors(tracking.name):
                    for drain in self._drains.values():
                        drain.step()
            except DataError as error:
                log.warning("metrics wait in the store: %s", error)

    def _await_events(self) -> None:
        stores = [open_store(run_url(self._spec.runs, config)) for config in self._spec.configs]
        deadline = time.monotonic() + GROUP_SECONDS
        while time.monotonic() < deadline and not self._stop.wait(DRAIN_SECONDS):
            with contextlib.suppress(DataError):
                if any(True for store in stores for _ in store.list("events/")):
                    return
