"""A job: which runs the driver on the cluster is to get done, as an object in the store of runs.

The specification is written under its own digest and holds no secret; the entry point of every job is the
same fixed command with that digest, so nothing that a person typed ever reaches a shell.
"""

import hashlib
import json
import re
from typing import Self

from pydantic import Field, ValidationError, model_validator

from orchestrator.job_records import is_done, is_wished
from orchestrator.wheel import Wheel
from workers.config import NAME, RunConfig
from workers.config_text import explain
from workers.errors import ConfigError, DataError
from workers.part import Part
from workers.storage import RECORD_BYTES, AlreadyExists, NotFound, Store, join_url, open_store
from workers.training.commits import Commit, CommitLog

MAX_SPEC_BYTES = 64 << 20
"""Of a specification: some 20,000 runs."""
SPEC = re.compile(r"jobs/([0-9a-f]{64})\.json")


class JobSpec(Part):
    """Runs to get done. They share worker groups, as many at a time as the cluster has room for."""

    configs: tuple[RunConfig, ...]
    runs: str
    """Root URL of the store of runs."""
    mlflow: str
    experiment: str
    parent: str | None = None
    """Name of the MLflow run under which these nest, such as a study's."""
    tags: dict[str, str] = Field(default_factory=dict)
    register_as: str | None = None
    """Name of the registered model whose next version the run's result becomes."""
    register_each: tuple[str, ...] = ()
    """Instead of that: such a name for each of the runs."""
    runs_per_trial: int | None = Field(default=None, gt=0)
    """So many share a worker group, one after another; None: as many as makes one group for each place that
    the cluster has for one. Never more than that."""
    autoscaling: bool = False
    """The cluster adds nodes on demand: runs that do not fit wait for them."""
    wheel: Wheel | None = None
    """The code that the job brings with it; None: what is installed on the nodes."""

    @model_validator(mode="after")
    def _can_be_registered(self) -> Self:
        # Now, and not when the training is done.
        for name in self.models:
            if name is not None:
                check_name(name, "model")
        if self.register_each and (self.register_as or len(self.register_each) != len(self.configs)):
            raise ValueError("register_each: expected a name for each of configs, and no register_as")
        return self

    @property
    def models(self) -> tuple[str | None, ...]:
        """What each of the runs becomes a version of."""
        return self.register_each or (self.register_as,) * len(self.configs)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Without defaults, so that a version that knows more fields means the same job."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True).encode()


def check_name(name: str, what: str) -> None:
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{what} name {name[:100]!r}: letters, digits, '.', '_' and '-' only, at most 100")


def run_url(runs: str, config: RunConfig) -> str:
    return join_url(runs, "runs", config.run)


def run_head(runs: str, config: RunConfig) -> Commit | None:
    """The newest commit of a run that counts."""
    return CommitLog(open_store(run_url(runs, config))).head()


def is_complete(runs: str, config: RunConfig) -> bool:
    head = run_head(runs, config)
    return head is not None and head.complete


def write_spec(spec: JobSpec) -> None:
    store = open_store(spec.runs)
    try:
        store.create(_spec_key(spec.digest), spec.to_bytes())
    except AlreadyExists:
        return


def read_spec(runs: str, digest: str) -> JobSpec:
    data = open_store(runs).read(_spec_key(digest), MAX_SPEC_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError(f"job specification {digest[:12]} was changed after it was written")
    try:
        return JobSpec.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"job specification {digest[:12]}: {explain(error, JobSpec)}") from None


def name_runs(store: Store, spec: JobSpec) -> None:
    """So that a run's job is found by the run's name."""
    for config in spec.configs:
        store.write(_run_key(config.run), spec.digest.encode())


def find_digest(store: Store, run: str) -> str:
    """Of the newest specification that trains this run; ConfigError if there is none."""
    check_name(run, "run")
    try:
        return store.read(_run_key(run), RECORD_BYTES).decode()
    except NotFound:
        raise ConfigError(
            f"no run {run} was ever submitted to {store.url}; `vitscale status` lists them"
        ) from None


def find_spec(runs: str, run: str) -> JobSpec:
    """Likewise, whole."""
    try:
        spec = read_spec(runs, find_digest(open_store(runs), run))
    except NotFound:
        raise ConfigError(f"the job of run {run} is gone from {runs}; give its command again") from None
    if all(config.run != run for config in spec.configs):
        raise ConfigError(f"run {run} is of a version of vitscale that named it otherwise; use that version")
    return spec


def list_runs(store: Store) -> list[str]:
    """Names of all runs that were submitted."""
    prefix = _run_key("")
    return sorted(item.key.removeprefix(prefix) for item in store.list(prefix))


def unfinished_on(runs: str, manifest: str) -> list[str]:
    """Names of runs that begin with this checkpoint, of jobs that are not done: they are to get done, or were
    stopped after a first commit."""
    store = open_store(runs)
    found = []
    for info in store.list("jobs/"):
        match = SPEC.fullmatch(info.key)
        if match is None or is_done(store, match[1]):
            continue
        for config in read_spec(runs, match[1]).configs:
            origins = {origin.manifest for origin in (config.init, config.fork) if origin is not None}
            if manifest in origins and (is_wished(store, match[1]) or run_head(runs, config) is not None):
                found.append(config.run)
    return sorted(found)


def delete_job(spec: JobSpec) -> None:
    """Its specification, and all that is noted of its jobs, once none of them runs."""
    store = open_store(spec.runs)
    for config in spec.configs:
        store.delete(_run_key(config.run))
    for found in list(store.list(f"jobs/{spec.digest[:16]}")):
        store.delete(found.key)


def _spec_key(digest: str) -> str:
    return f"jobs/{digest}.json"


def _run_key(run: str) -> str:
    return f"jobs/runs/{run}"
