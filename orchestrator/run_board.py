"""How runs stand, looked at again and again: of one run, or of all. Nothing is asked twice that cannot have
changed, and who does not answer leaves what was known before."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray.job_submission import JobDetails

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, find_digest, list_runs, read_spec
from orchestrator.ray_jobs import newest_job
from orchestrator.run_records import RunRecords
from orchestrator.site import Site
from orchestrator.status import RayJob, RunStatus, describe, ray_job
from workers.errors import DataError, VitscaleError
from workers.storage import NotFound, Unavailable, open_store

RAY_SECONDS = 5.0
"""Between two questions to Ray, which answers with all of its jobs."""
LIST_SECONDS = 30.0
"""Between two looks for new runs, and for new commands for those that there are."""
ENDED_SECONDS = 60.0
"""Between two looks at a run whose job does not live."""
PATIENCE_SECONDS = 2.0
"""How long a look waits for the store."""


@dataclass(frozen=True)
class Board:
    runs: tuple[RunStatus, ...]
    """As far as they are known."""
    troubles: tuple[str, ...]
    """Who does not answer, or what cannot be read."""


@dataclass
class _Watched:
    records: RunRecords
    status: RunStatus | None = None
    looked: float = field(default=float("-inf"))
    """time.monotonic()."""


class RunBoard:
    def __init__(self, site: Site, run: str | None = None) -> None:
        """Of this run; without it of all that were ever submitted."""
        self._site, self._run = site, run
        self._store = open_store(site.runs, patience=PATIENCE_SECONDS)
        self._watched: dict[str, _Watched] = {}
        self._specs: dict[str, JobSpec] = {}
        """By their digests: the runs of a study share one."""
        self._listed = self._asked = float("-inf")
        self._cluster: Cluster | None = None
        self._jobs: Mapping[str, JobDetails] | None = None
        """As Ray last had them; None until it has answered once."""
        self._ray_trouble = ""
        self._damaged: dict[str, str] = {}
        """What cannot be read of runs."""

    def look(self) -> Board:
        """ConfigError if the one run was never submitted."""
        self._ask_ray()
        store_trouble = ""
        try:
            self._find_runs()
            for name, watched in self._watched.items():
                self._look_at(name, watched)
        except Unavailable as error:
            store_trouble = f"the store of runs does not answer: {error}"
        found = (watched.status for watched in self._watched.values())
        troubles = (self._ray_trouble, store_trouble, *self._damaged.values())
        return Board(tuple(status for status in found if status is not None), tuple(filter(None, troubles)))

    def _ask_ray(self) -> None:
        if time.monotonic() - self._asked < RAY_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            self._cluster = self._cluster or Cluster(self._site)
            self._jobs, self._ray_trouble = self._cluster.all(), ""
        except DataError as error:
            self._cluster, self._ray_trouble = None, str(error)

    def _find_runs(self) -> None:
        if time.monotonic() - self._listed < LIST_SECONDS:
            return
        for name in [self._run] if self._run else list_runs(self._store):
            try:
                self._find_run(name)
                self._damaged.pop(name, None)
            except Unavailable:
                raise
            except VitscaleError as error:
                if self._run and not self._watched:
                    raise
                self._damaged[name] = f"{name}: {error}"
        self._listed = time.monotonic()

    def _find_run(self, name: str) -> None:
        digest = find_digest(self._store, name)
        if name in self._watched and self._watched[name].records.spec.digest == digest:
            return
        spec = self._specs.get(digest) or read_spec(self._store.url, digest)
        self._specs[digest] = spec
        config = next((config for config in spec.configs if config.run == name), None)
        if config is None:
            raise NotFound(f"run {name} is of a version of vitscale that named it otherwise")
        self._watched[name] = _Watched(RunRecords(spec, config, patience=PATIENCE_SECONDS))

    def _look_at(self, name: str, watched: _Watched) -> None:
        job = self._job(watched.records.spec)
        age = time.monotonic() - watched.looked
        if watched.status is not None and job.lives is False and age < ENDED_SECONDS:
            return
        try:
            watched.records.look()
            watched.status = describe(watched.records, job, self._store)
            self._damaged.pop(name, None)
        except Unavailable:
            raise
        except VitscaleError as error:
            self._damaged[name] = f"{name}: {error}"
        watched.looked = time.monotonic()

    def _job(self, spec: JobSpec) -> RayJob:
        if self._jobs is None:
            return RayJob("", "Ray does not answer", None)
        return ray_job(newest_job(spec.digest[:16], self._jobs))
