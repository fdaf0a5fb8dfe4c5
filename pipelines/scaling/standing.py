"""How each rung of a study stands, from what its workers have written."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.job import is_complete, run_url
from pipelines.scaling.rungs import Rung
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.metrics import EventReader

State = Literal["waiting", "running", "done", "failed"]
QUIET_SECONDS = 120.0
"""Without a word from its workers a rung waits again."""


@dataclass
class Standing:
    rung: Rung
    state: State = "waiting"
    config: RunConfig | None = None
    """None of a cooldown whose checkpoint is not there yet."""
    before: bool = False
    """It was done when this command began."""
    images_seen: int = 0
    workers: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    """The newest of each metric."""
    failure: str = ""
    heard: float = 0.0
    """When, in seconds since 1970."""
    _reader: EventReader | None = None

    def begin(self, runs: str, config: RunConfig) -> None:
        """Read what there is; nobody is known to train it now."""
        self.config = config
        self._reader = EventReader(open_store(run_url(runs, config)))
        if self.state == "done":
            return
        self.read()
        self.state, self.before = ("done", True) if is_complete(runs, config) else ("waiting", False)

    def read(self) -> bool:
        """Take what is new; whether there was anything."""
        heard = False
        for event in self._reader.read() if self._reader else ():
            heard = True
            self._take(event)
        if heard and self.state == "waiting":
            self.state = "running"
        return heard

    def _take(self, event: dict[str, Any]) -> None:
        self.heard = event["time"]
        self.workers = event.get("world_size", self.workers)
        if event["kind"] == "commit":
            if event["complete"]:
                self.state = "done"
        else:
            self.images_seen = event["images_seen"]
        self.values |= event.get("values", {})

    @property
    def seconds_left(self) -> float | None:
        rate = self.values.get("images_per_second")
        if self.state != "running" or not rate:
            return None
        return max(0, self.rung.images_seen - self.images_seen) / rate

    @property
    def quiet(self) -> bool:
        return time.time() - self.heard > QUIET_SECONDS

    def to_json(self) -> dict[str, Any]:
        shown = ("loss", "val_loss", "val_accuracy", "images_per_second")
        return {
            "rung": self.rung.name,
            "state": self.state,
            "before": self.before,
            "run": self.config.run if self.config else None,
            "images_seen": self.images_seen,
            "images": self.rung.images_seen,
            "workers": self.workers,
            "failure": self.failure or None,
            **{name: self.values.get(name) for name in shown},
        }


def stand(runs: str, rungs: Iterable[Rung], configs: dict[str, RunConfig]) -> list[Standing]:
    """`configs` by the rungs' names; of those without one nothing is known yet."""
    found = []
    for rung in rungs:
        standing = Standing(rung)
        if rung.name in configs:
            standing.begin(runs, configs[rung.name])
        found.append(standing)
    return found
